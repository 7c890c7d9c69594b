"""`mlx_lm.benchmark`, as anybody runs it, on directories with random weights that are made on the device.

    python -m benchmarks.mlx_commands --output benchmarks/results/mlx_commands.json

One directory of a shape for each kind (HLWQ, MLX's affine 4-bit, bf16), written under --root, which should be a file
system in memory: the command reads it once. The tokenizer is made up too: byte-level, one word for each id.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import re
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.benchmark
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3, qwen3_5
from tokenizers import Tokenizer, decoders, models

from benchmarks.mlx_cuda import QWEN3_8B, QWEN35_9B, fill
from convert.codebook import codebook
from convert.format import QuantizationConfig
from convert.target_mlx import MODEL_TYPE
from hlwq_mlx.layers import HLWQEmbedding, HLWQLinear
from tests.mlx_startup import ensure_found

SHAPES = {"qwen3-8b": (qwen3, QWEN3_8B), "qwen3.5-9b": (qwen3_5, QWEN35_9B)}
KINDS = ("hlwq", "affine", "bf16")
AVERAGES = re.compile(r"Averages: prompt_tps=([\d.]+), generation_tps=([\d.]+), peak_memory=([\d.]+)")


def write_directory(shape: str, kind: str, directory: Path) -> float:
    """A model directory of `shape` with random weights of `kind`; returns its bits a weight."""
    module, args = SHAPES[shape]
    model = module.Model(args)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    weights = sum(layer.weight.size for layer in layers)
    fill(model, kind)
    config = {name: value for name, value in asdict(args).items() if value is not None}
    if kind == "affine":
        config["quantization"] = {"group_size": 64, "bits": 4}
    if kind == "hlwq":
        quantized = {path: m.spec for path, m in model.named_modules() if isinstance(m, (HLWQLinear, HLWQEmbedding))}
        quantization = QuantizationConfig(4, 128, {4: tuple(codebook(4))}, quantized, base_model_type=args.model_type)
        config |= {"model_type": MODEL_TYPE, "quantization_config": quantization.to_dict()}
    arrays = dict(tree_flatten(model.parameters()))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(directory / "model.safetensors"), arrays, {"format": "mlx"})
    _write_tokenizer((config.get("text_config") or config)["vocab_size"], directory)
    return 8 * sum(array.nbytes for array in arrays.values()) / weights


def _write_tokenizer(size: int, directory: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"Ġw{i}": i for i in range(size)}, unk_token="Ġw0"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "Ġw1"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def benchmark(directory: Path, options: Sequence[str]) -> dict[str, float]:
    """What `mlx_lm.benchmark --model directory ...` prints: the averages of its trials."""
    ensure_found()
    printed = io.StringIO()
    with mock.patch("sys.argv", ["mlx_lm.benchmark", "--model", str(directory), *options]), redirect_stdout(printed):
        mlx_lm.benchmark.main()
    found = AVERAGES.search(printed.getvalue())
    if found is None:
        raise RuntimeError(f"mlx_lm.benchmark printed no averages: {printed.getvalue()!r}")
    return {"prefill": float(found[1]), "decode": float(found[2]), "peak_gb": float(found[3])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--root", default="/dev/shm", help="where the directories are written, and removed")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    options = ["-p", str(args.prompt), "-g", str(args.tokens), "-n", str(args.trials)]
    results: dict = {
        "gpu": mx.device_info().get("device_name", "unknown"),
        "versions": {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")},
        "command": " ".join(["mlx_lm.benchmark", "--model", args.shape, *options]),
    }
    for kind in args.kinds:
        mx.random.seed(0)
        with tempfile.TemporaryDirectory(dir=args.root) as root:
            bits = write_directory(args.shape, kind, Path(root, "model"))
            mx.clear_cache()
            mx.reset_peak_memory()
            results[kind] = {**benchmark(Path(root, "model"), options), "bits_per_weight": round(bits, 3)}
        print(kind, json.dumps(results[kind]), flush=True)
        if args.output:
            args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
