"""Speed and memory of `python -m convert`, file to file, on a synthetic Llama checkpoint.

    python benchmarks/convert.py                       # 3.2 billion weights: 6.4 GB of bf16 in, 1.7 GB out
    python benchmarks/convert.py --layers 2            # a quick look

The checkpoint has the shapes of Llama-3.2-3B (hidden 3072, vocabulary 128256, tied) and normal random weights; it is
written shard by shard and deleted at the end. Every run is a fresh process, and source files are dropped from the page
cache before it (where the system allows), so reading from the disk counts. The table gives weights a second, peak
resident memory beside the bound that the converter promises (1.5 GB + 3 x the largest tensor in float32), and the
ratio to a plain read of the source files. The figures also go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run from a checkout without an installation

from convert.shard import ShardFile, StoredTensor
from convert.tensors import INDEX_NAME

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, LAYERS = 3072, 8192, 24, 8, 128, 128256, 28
LAYER = {
    "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
}
BF16 = np.dtype(ml_dtypes.bfloat16)
POOL_WEIGHTS = 2**24  # normal numbers, drawn once; every tensor starts at another place in them
READ_BYTES = 2**23


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--encoder", default="plain")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where the files go (default: a temporary directory)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "convert.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hlwq-benchmark-", dir=arguments.directory) as scratch:
        source = Path(scratch) / "source"
        tensors = write_checkpoint(source, arguments.layers)
        runs = [one_run(source, Path(scratch) / "output", arguments) for _ in range(arguments.runs)]
    weights = sum(tensor.nbytes // BF16.itemsize for tensor in tensors)
    largest_float32 = max(tensor.nbytes // BF16.itemsize for tensor in tensors) * 4
    result = {
        "command": " ".join(["python", "benchmarks/convert.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "weights": weights,
        "bits": arguments.bits,
        "encoder": arguments.encoder,
        "weights_per_second": round(weights / statistics.median(run["seconds"] for run in runs)),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "peak_rss_bound_bytes": round(1.5e9) + 3 * largest_float32,
        "ratio_to_plain_read": round(statistics.median(run["seconds"] / run["read_seconds"] for run in runs), 2),
        "runs": runs,
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result)


def write_checkpoint(directory: Path, layers: int) -> list[StoredTensor]:
    """A bf16 checkpoint: one file for the embedding, one for every four layers."""
    directory.mkdir()
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    files = [[StoredTensor(name, BF16, shape) for name, shape in shapes.items()]]
    for layer in range(layers):
        if layer % 4 == 0:
            files.append([])
        files[-1] += [StoredTensor(f"model.layers.{layer}.{name}", BF16, shape) for name, shape in LAYER.items()]
    pool = (np.random.default_rng(0).standard_normal(POOL_WEIGHTS, dtype=np.float32) * 0.02).astype(BF16)
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(files, 1):
        name = f"model-{index:05}-of-{len(files):05}.safetensors"
        with (directory / name).open("wb") as file:
            shard = ShardFile(file, tensors, {"format": "pt"})
            for tensor in tensors:
                write_tensor(shard, tensor, np.roll(pool, 7919 * len(weight_map)))
                weight_map[tensor.name] = name
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config(layers)))
    return [tensor for tensors in files for tensor in tensors]


def write_tensor(shard: ShardFile, tensor: StoredTensor, pool: np.ndarray) -> None:
    """Fill a tensor with numbers of the pool, again and again if it is larger."""
    rows = tensor.shape[0]
    row = tensor.nbytes // BF16.itemsize // rows
    step = len(pool) // row
    for first in range(0, rows, step):
        shard.write(tensor.name, first, pool[: min(step, rows - first) * row])


def config(layers: int) -> dict:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def one_run(source: Path, output: Path, arguments: argparse.Namespace) -> dict:
    """Read the files, then convert them, both from the disk; the conversion in a process of its own."""
    drop_from_cache(source)
    load = os.getloadavg()[0]
    started = time.perf_counter()
    for path in source.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(READ_BYTES):
                pass
    read_seconds = time.perf_counter() - started
    drop_from_cache(source)
    command = [sys.executable, "-m", "convert", "--target", "cuda", "--model", str(source), "--output", str(output)]
    command += ["--bits", str(arguments.bits), "--encoder", arguments.encoder, "--json"]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"the conversion failed with status {status}")
    shutil.rmtree(output)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return {
        "seconds": round(seconds, 2),
        "read_seconds": round(read_seconds, 2),
        "load_average_before": round(load, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_bytes": usage.ru_maxrss * unit,
    }


def drop_from_cache(directory: Path) -> None:
    """Make the next read come from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return  # macOS: files stay cached
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def machine() -> dict:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": platform.system(), "cpu": model, "cores": cores}


def print_table(result: dict) -> None:
    bound = result["peak_rss_bound_bytes"]
    print(f"{result['weights']:,} weights, {result['bits']} bits, encoder {result['encoder']}, {result['machine']}")
    print(f"million weights a second  {result['weights_per_second'] / 1e6:.1f} (median of {len(result['runs'])})")
    cpu = statistics.median(run["cpu_seconds"] for run in result["runs"])
    print(f"a processor-second        {result['weights'] / cpu / 1e6:.1f} million (what other load does not change)")
    print(f"peak resident memory      {result['peak_rss_bytes'] / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB")
    print(f"time over a plain read    {result['ratio_to_plain_read']:.2f}")
    for run in result["runs"]:
        print(f"  {run}")


if __name__ == "__main__":
    main()
