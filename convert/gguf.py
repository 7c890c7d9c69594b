"""Decode a GGUF file into an ordinary model directory: safetensors, config.json, tokenizer.

GGUF is llama.cpp's format; package `gguf` reads it and decodes its block formats. What llama.cpp changed when the file
was made is undone here: tensor names, and the order of rows in q and k of Llama models (llama.cpp rotates neighboring
pairs, transformers rotates halves).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from convert.errors import ConvertError, writing
from convert.gguf_tokenizer import tokenizer_files
from convert.progress import ProgressBar, no_progress_bar
from convert.shard import ShardFile, StoredTensor

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

CHUNK_WEIGHTS = 2**22  # decoded at a time

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1 and later: the frequency scaling, as a tensor


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file and what it becomes."""

    name: str  # in the output
    shape: tuple[int, ...]
    source: ReaderTensor
    rotary_head_dim: int = 0  # rows of a head to put back into transformers' order; 0: leave the rows alone


def decode_gguf(path: Path, directory: Path, weights: bool = True, progress_bar: ProgressBar = no_progress_bar) -> None:
    """Write the model of the GGUF file `path` to `directory`; without `weights` only their headers.

    (A file of headers has the size of the real one but holds no data: a sparse file, made in no time, for --plan.)
    """
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    architecture = str(fields.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ConvertError(
            f"{path}: GGUF architecture {architecture!r} is not supported; this release reads {supported}"
        )
    hyper = {name.removeprefix(f"{architecture}."): value for name, value in fields.items()}
    dtype = _common_dtype(reader)
    config = _config(path, reader, architecture, hyper, dtype)
    tensors = [_rename(path, tensor, architecture, config) for tensor in reader.tensors if tensor.name != ROPE_FACTORS]
    directory.mkdir(parents=True)
    weights_path = directory / "model.safetensors"
    with writing(weights_path), weights_path.open("wb") as file:
        shard = ShardFile(file, [StoredTensor(each.name, dtype, each.shape) for each in tensors], {"format": "pt"})
        with progress_bar(sum(math.prod(each.shape) for each in tensors), "weights decoded") as progress:
            for each in tensors if weights else ():
                for first_row, data in _decode(path, each):
                    shard.write(each.name, first_row, data.astype(dtype))
                    progress(data.size)
    tokenizer = {name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    files = tokenizer_files(path, tokenizer)
    files["config.json"] = json.dumps(config, indent=2)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")


def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ConvertError(f"{path}: reading GGUF needs the gguf package: pip install 'hlwq-mlx[gguf]'") from None
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise ConvertError(f"{path}: truncated or not a GGUF file ({error}); download it again") from None


def _common_dtype(reader: GGUFReader) -> np.dtype:
    """The dtype of the decoded model: F16 and F32 files keep theirs, anything coarser fits bfloat16's 8 bits.

    (Rounding a decoded weight to bfloat16 adds a relative error of 2**-9, 2 % of that of 6-bit codes.)
    """
    weights: dict[str, int] = {}
    for tensor in reader.tensors:
        if len(tensor.shape) > 1:
            weights[tensor.tensor_type.name] = weights.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    most = max(weights, key=lambda name: weights[name], default="BF16")
    return {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}.get(most, np.dtype(ml_dtypes.bfloat16))


def _config(path: Path, reader: GGUFReader, architecture: str, hyper: Mapping[str, Any], dtype: np.dtype) -> dict:
    """config.json as transformers writes it for this architecture."""
    names = {tensor.name for tensor in reader.tensors}
    vocabulary = next((int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight"), None)
    if vocabulary is None:
        raise ConvertError(f"{path}: tensor token_embd.weight is missing; download the file again")
    if hyper.get("expert_count"):
        raise ConvertError(f"{path}: a mixture of experts in GGUF is not supported; convert the original checkpoint")
    try:
        hidden, heads = int(hyper["embedding_length"]), int(hyper["attention.head_count"])
        config = {
            "architectures": [ARCHITECTURES[architecture]],
            "model_type": architecture,
            "hidden_size": hidden,
            "intermediate_size": int(hyper["feed_forward_length"]),
            "num_hidden_layers": int(hyper["block_count"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(hyper.get("attention.head_count_kv", heads)),
            "head_dim": int(hyper.get("attention.key_length", hidden // heads)),
            "hidden_act": "silu",
            "rms_norm_eps": _decimal(hyper["attention.layer_norm_rms_epsilon"]),
            "rope_theta": _decimal(hyper.get("rope.freq_base", 10000.0)),
            "max_position_embeddings": int(hyper["context_length"]),
            "vocab_size": vocabulary,
            "attention_bias": "blk.0.attn_q.bias" in names,
            "tie_word_embeddings": "output.weight" not in names,
            "torch_dtype": dtype.name,
        }
    except KeyError as error:
        raise ConvertError(f"{path}: the GGUF key {architecture}.{error.args[0]} is missing") from None
    scaling = _rope_scaling(path, reader, hyper, config)
    if scaling:
        config["rope_scaling"] = scaling
    for key, field in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        found = reader.fields.get(f"tokenizer.ggml.{field}_token_id")
        if found is not None:
            config[key] = int(found.contents())
    return config


def _decimal(value: Any) -> float:
    """The shortest decimal that rounds to the file's float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(path: Path, reader: GGUFReader, hyper: Mapping[str, Any], config: Mapping) -> dict | None:
    kind = hyper.get("rope.scaling.type", "none")
    factors = next((tensor for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
    if factors is not None:
        stored = np.array(factors.data, np.float32)
        scaling = {"rope_type": "llama3", "factor": float(stored.max())}
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        if stored.shape != (config["head_dim"] // 2,) or not np.allclose(
            stored, _llama3_factors(scaling, config), 1e-3
        ):
            raise ConvertError(
                f"{path}: tensor {ROPE_FACTORS} is not the scaling of Llama 3; convert the original model"
            )
        return scaling
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ConvertError(f"{path}: rope scaling {kind!r} is not supported; convert the original checkpoint")
    scaling = {"rope_type": kind, "factor": float(hyper["rope.scaling.factor"])}
    if "rope.scaling.original_context_length" in hyper:
        scaling["original_max_position_embeddings"] = int(hyper["rope.scaling.original_context_length"])
    return scaling


def _llama3_factors(scaling: Mapping[str, Any], config: Mapping) -> np.ndarray:
    """What Llama 3.1's frequencies are divided by: 1 for short waves, `factor` for long ones, a blend between."""
    head_dim, context = config["head_dim"], scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - blend) / scaling["factor"] + blend)


def _rename(path: Path, tensor: ReaderTensor, architecture: str, config: Mapping) -> GgufTensor:
    stem, _, suffix = tensor.name.rpartition(".")
    parts = stem.split(".")
    shape = tuple(int(length) for length in reversed(tensor.shape))  # ggml counts axes from the last
    if stem in TOP_NAMES:
        return GgufTensor(f"{TOP_NAMES[stem]}.{suffix}", shape, tensor)
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER_NAMES:
        permuted = architecture == "llama" and parts[2] in ("attn_q", "attn_k")
        name = f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{suffix}"
        return GgufTensor(name, shape, tensor, config["head_dim"] if permuted else 0)
    raise ConvertError(f"{path}: tensor {tensor.name} has no place in architecture {architecture!r}")


def _decode(path: Path, tensor: GgufTensor) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces (first row, float32 rows) of a tensor, in whole heads where rows must be reordered."""
    from gguf import dequantize

    source = tensor.source
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    unit = tensor.rotary_head_dim if len(tensor.shape) > 1 else 0
    step = max(CHUNK_WEIGHTS * rows // max(math.prod(tensor.shape), 1), 1)
    step = max(step // unit, 1) * unit if unit else step
    row_bytes = int(source.n_bytes) // rows
    for first in range(0, rows, step):
        count = min(step, rows - first)
        offset = int(source.data_offset) + first * row_bytes
        data = np.fromfile(path, source.data.dtype, count * row_bytes // source.data.dtype.itemsize, offset=offset)
        try:
            piece = dequantize(data.reshape(count, -1), source.tensor_type)
        except NotImplementedError:
            name = source.tensor_type.name
            raise ConvertError(f"{path}: tensor {source.name} is {name}, which package gguf cannot decode") from None
        piece = piece.reshape(count, *tensor.shape[1:]) if len(tensor.shape) > 1 else piece.reshape(tensor.shape)
        yield first, _restore_rows(piece, tensor.rotary_head_dim)


def _restore_rows(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """From llama.cpp's order of a head's rows (pairs) to transformers' (halves)."""
    if not head_dim:
        return rows
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
