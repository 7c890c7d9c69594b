"""How long an HLWQ directory takes to load onto a GPU, and the memory it takes there.

    python -m benchmarks.load                       # Qwen3-8B's shape at 4 bits, random codes, 5.4 GB on disk
    python -m benchmarks.load --output benchmarks/results/load.json

Writes the directory to a temporary place, reads its files once (that time is the baseline, and leaves them in the page
cache), then times `from_pretrained`: what it takes beyond the read is the conversion of every code to the device layout
and transformers itself. Weights are everything the model holds: codes, norms, and what is not quantized.
The last line of the output is the JSON that `--output` writes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

import hlwq_cuda  # noqa: F401  (makes the method known to transformers)
from benchmarks.random_models import SHAPES, make_config, weight_bytes
from benchmarks.report import report
from convert.codebook import codebook
from convert.format import ModuleSpec, QuantizationConfig, codes_name, default_block_size, norms_name

REPEATS = 3
SHARD_BYTES = 2 << 30


def write_random(shape: str, bits: int, directory: Path, device: str = "cuda") -> None:
    """An HLWQ directory of `shape` with random codes: linear layers and head quantized, the embedding bf16.

    device: where random numbers are made.
    """
    config = make_config(shape, 4096)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    specs = {name: ModuleSpec(bits, default_block_size(m.in_features), m.in_features) for name, m in linears.items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, spec in specs.items():
        rows = linears[name].out_features
        words = torch.randint(-(2**31), 2**31, (rows, spec.words), dtype=torch.int32, device=device)
        tensors[codes_name(name)] = words.cpu().view(torch.uint32)
        tensors[norms_name(name)] = torch.empty(rows, spec.blocks, dtype=torch.float16).uniform_(0.1, 0.3)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in specs:
            tensors[name] = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02).cpu()
    block_size = default_block_size(config.hidden_size)
    quantization = QuantizationConfig(bits, block_size, {bits: tuple(codebook(bits))}, specs).to_dict()
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if sum(t.nbytes for t in shards[-1].values()) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, directory / name, {"format": "pt"})
    index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    record = {**config.to_dict(), "architectures": [type(model).__name__], "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(record))


def read_seconds(directory: Path) -> float:
    """To read every byte of the directory once."""
    buffer = bytearray(64 << 20)
    start = time.perf_counter()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def measure(directory: Path) -> dict:
    """Load REPEATS times; the first is reported apart, because it compiles and touches every page."""
    first_read = read_seconds(directory)
    seconds, reads = [], []
    for _ in range(REPEATS + 1):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        reads.append(read_seconds(directory))
        start = time.perf_counter()
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, device_map={"": 0})
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        weights, used, peak = weight_bytes(model), torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        del model
    return {
        "read_seconds_cold": round(first_read, 2),
        "read_seconds": round(statistics.median(reads), 2),
        "load_seconds_first": round(seconds[0], 2),
        "load_seconds": round(statistics.median(seconds[1:]), 2),
        "beyond_reading_first": round(seconds[0] - reads[0], 2),
        "beyond_reading": round(statistics.median(seconds[1:]) - statistics.median(reads), 2),
        "weight_gigabytes": round(weights / 1e9, 3),
        "memory_over_weights": round(used / weights, 4),
        "peak_over_weights": round(peak / weights, 4),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--output", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("this benchmark needs an NVIDIA GPU; PyTorch sees none", file=sys.stderr)
        return 1
    result = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "command": f"python -m benchmarks.load --shape {args.shape} --bits {args.bits}",
        "date": time.strftime("%Y-%m-%d"),
    }
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root) / "model"
        write_random(args.shape, args.bits, directory)
        result.update(measure(directory))
    report(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
