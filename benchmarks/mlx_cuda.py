"""MLX on an NVIDIA GPU: HLWQ against MLX's affine quantization and unquantized products, in one process.

    python -m benchmarks.mlx_cuda --output benchmarks/results/mlx_cuda.json

Random weights made on the device. Kernels: microseconds of one product in a chain where each input is the output before
it, so that no two run at once, over more than 250 MB of different weights; "wall" counts what the host adds (building
the graph in Python, launching), "gpu" is the busy time of the kernels alone, as torch.profiler reads it, without the
copies that make the next input. Models:
prefill and decode tokens/s of mlx_lm's generate_step, greedy, and what one token costs the host and the GPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.models import qwen3, qwen3_5
from mlx_lm.models.cache import make_prompt_cache

from convert.codebook import codebook
from convert.format import ModuleSpec
from hlwq_mlx import cuda
from hlwq_mlx.fused import fuse_layers
from hlwq_mlx.kernels import kernels_for
from hlwq_mlx.layers import HLWQEmbedding, HLWQLinear
from hlwq_mlx.selfcheck import random_codes
from hlwq_mlx.siblings import link
from hlwq_mlx.steps import compile_steps

SHAPES = ((4096, 4096), (6144, 4096), (24576, 4096), (4096, 12288))  # N, K
COLD_BYTES = 256e6  # more than the L2 cache holds
REPEATS = 7
PARTS = ("products", "prefill", "rows", "dense", "hybrid")

QWEN3_8B = qwen3.ModelArgs(
    model_type="qwen3",
    hidden_size=4096,
    num_hidden_layers=36,
    intermediate_size=12288,
    num_attention_heads=32,
    rms_norm_eps=1e-6,
    vocab_size=151936,
    num_key_value_heads=8,
    max_position_embeddings=40960,
    head_dim=128,
    tie_word_embeddings=False,
    rope_theta=1e6,
)
# hybrid: three gated delta layers to one of attention
QWEN35_9B = qwen3_5.ModelArgs(
    model_type="qwen3_5",
    text_config={
        "model_type": "qwen3_5_text",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "vocab_size": 248320,
    },
)


def median_microseconds(step: Callable[[], mx.array], count: int) -> float:
    """Of one of the `count` products that `step` chains."""
    mx.eval(step())
    times = []
    for _ in range(REPEATS):
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(step())
        times.append((time.perf_counter() - start) / count)
    return round(1e6 * statistics.median(times), 2)


class GpuTime(NamedTuple):
    """Of the kernels that a step launches, as torch.profiler reads them; copies (a chain's slicing) apart."""

    microseconds: float
    kernels: int
    copies: float  # microseconds


def gpu_time(step: Callable[[], object], repeats: int = 1) -> GpuTime:
    from torch.profiler import ProfilerActivity, profile

    step()
    mx.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            step()
        mx.synchronize()
    events = [event for event in profiler.key_averages() if event.device_time_total]
    copies = sum(event.device_time_total for event in events if "copy" in event.key.lower())
    total, count = sum(event.device_time_total for event in events), sum(event.count for event in events)
    return GpuTime((total - copies) / repeats, round(count / repeats), copies / repeats)


def gpu_microseconds(step: Callable[[], mx.array], count: int) -> float:
    """The GPU's busy time in one of the `count` products of `step`, without the copies between them."""
    return round(gpu_time(lambda: mx.eval(step())).microseconds / count, 2)


def chain(
    product: Callable[[mx.array, int], mx.array], x: mx.array, count: int, columns: int
) -> Callable[[], mx.array]:
    """`count` products, each of the first `columns` outputs of the one before (repeated where there are fewer)."""

    def step() -> mx.array:
        value = x
        for i in range(count):
            value = product(value, i)
            if value.shape[-1] < columns:
                value = mx.concatenate([value] * (columns // value.shape[-1]), axis=-1)
            value = value[..., :columns]
        return value

    return step


def time_products(outputs: int, columns: int, rows: int) -> dict[str, dict[str, float]]:
    """Microseconds of one product, every provider on the same shapes."""
    x = mx.random.normal((rows, columns)).astype(mx.float16)
    ours = kernels_for(codebook(4), ModuleSpec(4, 128, columns))
    scale = columns**-0.5
    times: dict[str, dict[str, float]] = {}

    def add(name: str, make: Callable[[], tuple], multiply: Callable, bits: float) -> None:
        count = max(2, int(COLD_BYTES / (outputs * columns * bits / 8)) + 1)
        weights = [make() for _ in range(count)]
        mx.eval(weights)
        chained = max(count, 24)
        step = chain(lambda v, i: multiply(v, *weights[i % count]), x, chained, columns)
        times[name] = {"wall": median_microseconds(step, chained), "gpu": gpu_microseconds(step, chained)}

    def packed() -> tuple[mx.array, mx.array]:
        norms = mx.random.uniform(0.5, 1.5, (outputs, columns // 128)) * scale * 128**0.5
        return random_codes(outputs, columns // 8), norms.astype(mx.float16)

    def affine() -> tuple[mx.array, mx.array, mx.array]:
        scales = mx.full((outputs, columns // 64), scale / 4.6, mx.float16)
        return random_codes(outputs, columns // 8), scales, -7.5 * scales

    def dense() -> tuple[mx.array]:
        return ((mx.random.normal((outputs, columns)) * scale).astype(mx.float16),)

    add("hlwq", packed, lambda v, c, n: ours.product(v, c, n)[0], 4.125)
    add(
        "affine",
        affine,
        lambda v, w, s, b: mx.quantized_matmul(v, w, s, b, transpose=True, group_size=64, bits=4),
        4.5,
    )
    add("fp16", dense, lambda v, w: v @ w.T, 16)
    return times


def launch_costs() -> dict[str, float]:
    """Microseconds of one launch in a chain of 200 that do next to nothing."""
    x = mx.random.normal((1, 4096)).astype(mx.float16)

    def repeat(function: Callable[[mx.array], mx.array]) -> Callable[[], mx.array]:
        return chain(lambda v, _: function(v), x, 200, 4096)

    return {
        "built-in (abs)": median_microseconds(repeat(mx.abs), 200),
        "rotate": median_microseconds(repeat(lambda v: cuda.rotate(v, 128)), 200),
    }


def fill(model: nn.Module, kind: str) -> None:
    """Random weights of `kind` ("hlwq", "affine" or "bf16"), made on the device, layer by layer."""
    model.set_dtype(mx.bfloat16)
    layers = []
    for path, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Embedding)):
            continue
        outputs, columns = layer.weight.shape
        if kind == "hlwq":
            spec = ModuleSpec(4, 128, columns)
            cls = HLWQLinear if isinstance(layer, nn.Linear) else HLWQEmbedding
            new = cls((outputs,), spec, codebook(4), mx.bfloat16)
            new.weight_codes = random_codes(outputs, columns // 8)
            new.weight_norms = mx.full((outputs, columns // 128), (128 / columns) ** 0.5, mx.float16)
            layers.append((path, new))
        elif kind == "bf16":
            layer.weight = (mx.random.normal(layer.weight.shape) * columns**-0.5).astype(mx.bfloat16)
    model.update_modules(tree_unflatten(layers))
    if kind == "affine":
        nn.quantize(model, group_size=64, bits=4)
    model.eval()
    link(model.modules())
    compile_steps(model.modules())
    fuse_layers(model.modules())
    for module in model.modules():
        mx.eval(module.parameters())


def token_costs(model: nn.Module, step: mx.array) -> dict[str, float]:
    """Milliseconds of one token: of the host to build the graph and to evaluate it, and of the GPU's kernels."""
    cache = make_prompt_cache(model)
    mx.eval(model(step, cache=cache))
    graph, evaluate = [], []
    for _ in range(20):
        start = time.perf_counter()
        y = model(step, cache=cache)
        built = time.perf_counter()
        mx.async_eval(y)
        evaluate.append(time.perf_counter() - built)
        graph.append(built - start)
        mx.synchronize()
    gpu = gpu_time(lambda: mx.eval(model(step, cache=cache)), 8)
    return {
        "host_graph_ms": round(1e3 * statistics.median(graph), 2),
        "host_eval_ms": round(1e3 * statistics.median(evaluate), 2),
        "gpu_ms": round((gpu.microseconds + gpu.copies) / 1e3, 2),
        "gpu_kernels": gpu.kernels,
    }


def time_model(make: Callable[[], nn.Module], kind: str, prompt: int, tokens: int) -> dict[str, float]:
    """Tokens/s of prefill and decode, peak GB, bits a weight: medians of three after one to warm up."""
    mx.reset_peak_memory()
    model = make()
    count = sum(layer.weight.size for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Embedding)))
    fill(model, kind)
    stored = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    ids = mx.random.randint(0, 500, (prompt,))
    prefill, decode = [], []
    for _ in range(4):
        start = time.perf_counter()
        for i, (token, _) in enumerate(generate_step(ids, model, max_tokens=tokens)):
            if i == 0:
                mx.eval(token)
                first = time.perf_counter()
        end = time.perf_counter()
        prefill.append(prompt / (first - start))
        decode.append((tokens - 1) / (end - first))
    out = {
        "prefill": round(statistics.median(prefill[1:]), 1),
        "decode": round(statistics.median(decode[1:]), 1),
        "peak_gb": round(mx.get_peak_memory() / 1e9, 2),
        "bits_per_weight": round(8 * stored / count, 3),
        **token_costs(model, ids[:1][None]),
    }
    del model
    gc.collect()
    mx.clear_cache()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="a JSON file")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="parts to run",
    )
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens of the dense model")
    parser.add_argument("--hybrid-prompt", type=int, default=128, help="prompt tokens of the hybrid model")
    args = parser.parse_args()
    mx.random.seed(0)
    results: dict = {
        "gpu": mx.device_info().get("device_name", "unknown"),
        "versions": {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")},
    }

    def record(key: str, value: object) -> None:
        results[key] = value
        print(key, json.dumps(value), flush=True)
        if args.output:
            with open(args.output, "w", encoding="utf-8") as file:
                json.dump(results, file, indent=1)

    if "dense" in args.only:
        for kind in ("hlwq", "affine", "bf16"):
            record(f"Qwen3-8B {kind}", time_model(lambda: qwen3.Model(QWEN3_8B), kind, args.prompt, 128))
    if "products" in args.only:
        for outputs, columns in SHAPES:
            record(f"us {outputs}x{columns} M=1", time_products(outputs, columns, 1))
        record("launch_us", launch_costs())
    if "prefill" in args.only:
        for outputs, columns in SHAPES:
            record(f"us {outputs}x{columns} M=512", time_products(outputs, columns, 512))
    if "rows" in args.only:
        for rows in (2, 4, 8):
            record(f"us 24576x4096 M={rows}", time_products(24576, 4096, rows))
    if "hybrid" in args.only:
        for kind in ("hlwq", "affine", "bf16"):
            record(f"Qwen3.5-9B {kind}", time_model(lambda: qwen3_5.Model(QWEN35_9B), kind, args.hybrid_prompt, 128))


if __name__ == "__main__":
    main()
