"""Small source checkpoints written with numpy alone: converter tests need no framework."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert.__main__ import main
from convert.shard import ShardFile, StoredTensor
from convert.tensors import INDEX_NAME

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
HIDDEN, INTERMEDIATE, VOCABULARY = 192, 200, 259  # blocks of 64; of 128 with padding; an odd number of rows
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "vocab_size": VOCABULARY,
    "torch_dtype": "bfloat16",
}


def llama_shapes(tied: bool = True, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small Llama with biases on q."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}.self_attn.q_proj.bias"] = (HIDDEN,)
        shapes[f"{prefix}.self_attn.k_proj.weight"] = (HIDDEN // 2, HIDDEN)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (HIDDEN // 2, HIDDEN)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    return shapes if tied else {**shapes, "lm_head.weight": (VOCABULARY, HIDDEN)}


def random_tensors(shapes: Mapping[str, tuple[int, ...]], dtype: str = "bfloat16", seed: int = 0) -> dict:
    """Normal values for every shape."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype]) for name, shape in shapes.items()
    }


def write_source(directory: Path, tensors: Mapping[str, np.ndarray], config: Mapping, shards: int = 1) -> Path:
    """A model directory with `shards` files, a tokenizer file and a README; returns the directory."""
    directory.mkdir(parents=True)
    names = list(tensors)
    weight_map = {}
    for index in range(shards):
        file_name = f"model-{index + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        with (directory / file_name).open("wb") as file:
            stored = [StoredTensor(name, tensors[name].dtype, tensors[name].shape) for name in part]
            shard = ShardFile(file, stored, {"format": "pt"})
            for name in part:
                shard.write(name, 0, tensors[name])
                weight_map[name] = file_name
    if shards > 1:
        (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "README.md").write_text("the source's model card")
    return directory


def write_llama(directory: Path, dtype: str = "bfloat16", shards: int = 1, tied: bool = True) -> Path:
    """A small random Llama."""
    config = {**LLAMA, "tie_word_embeddings": tied, "torch_dtype": dtype}
    return write_source(directory, random_tensors(llama_shapes(tied), dtype), config, shards)


def arguments(source: Path, output: Path, *more: str) -> list[str]:
    """A command line of the converter."""
    return ["--model", str(source), "--output", str(output), "--target", "cuda", "--encoder", "plain", *more]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def refuse(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one sentence with which `argv` fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # numpy would print more than the sentence
        assert main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err
