"""target_cuda.py: what is quantized and what is kept, by name, shape and config."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from convert.target import Kind
from convert.target_cuda import CudaTarget, classify
from convert.tensors import DTYPES, TensorInfo
from tests.sources import LLAMA, random_tensors, write_source

QWEN3_5 = {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", "hidden_size": 64}}


def kind_of(name: str, shape: tuple[int, ...], config: dict = LLAMA, dtype: str = "BF16") -> Kind | None:
    kind, reason = classify(name, TensorInfo(Path("f"), DTYPES[dtype], shape, 0), config)
    assert (kind is None) == bool(reason)
    return kind


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), Kind.LINEAR),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", (96, 64), Kind.LINEAR),
        ("model.layers.0.mlp.experts.12.gate_proj.weight", (96, 64), Kind.LINEAR),
        ("model.layers.0.mlp.gate_proj.weight", (96, 64), Kind.LINEAR),
        ("gpt_neox.layers.0.attention.query_key_value.weight", (192, 64), Kind.LINEAR),
        ("model.embed_tokens.weight", (259, 64), Kind.EMBEDDING),
        ("transformer.wte.weight", (259, 64), Kind.EMBEDDING),
        ("lm_head.weight", (259, 64), Kind.HEAD),
        ("model.layers.0.mlp.gate.weight", (8, 64), None),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 64), None),
        ("model.layers.0.feed_forward.router.weight", (8, 64), None),
        ("model.layers.0.mlp.shared_expert_gate.weight", (8, 64), None),
        ("model.layers.0.input_layernorm.weight", (4096,), None),
        ("model.layers.0.self_attn.q_proj.bias", (4096,), None),
        ("model.layers.0.self_attn.q_proj.weight", (4, 32), None),  # 128 weights
        ("model.layers.0.self_attn.q_proj.weight", (64, 16), None),  # rows of 16
        ("model.layers.0.mixer.conv1d.weight", (64, 1, 64), None),
        ("model.layers.0.mixer.dt_proj.weight", (64, 64), None),
        ("model.layers.0.mixer.A_log", (64, 64), None),
        ("transformer.wpe.weight", (512, 64), None),
        ("model.decoder.embed_positions.weight", (512, 64), None),
        ("vision_tower.blocks.0.attn.qkv.weight", (192, 64), None),
        ("multi_modal_projector.linear_1.weight", (64, 64), None),
        ("audio_tower.layers.0.fc1.weight", (64, 64), None),
        ("mtp.layers.0.mlp.up_proj.weight", (96, 64), None),
    ],
)
def test_llama_like_names(name: str, shape: tuple[int, ...], kind: Kind | None):
    assert kind_of(name, shape) is kind


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.language_model.layers.0.linear_attn.in_proj_qkv.weight", (192, 64), Kind.LINEAR),
        ("model.language_model.layers.0.linear_attn.in_proj_b.weight", (32, 64), Kind.LINEAR),
        ("model.language_model.layers.0.linear_attn.conv1d.weight", (192, 1, 4), None),
        ("model.language_model.layers.0.linear_attn.norm.weight", (64,), None),
        ("model.language_model.embed_tokens.weight", (259, 64), Kind.EMBEDDING),
        ("model.visual.blocks.0.attn.qkv.weight", (192, 64), None),
        ("model.visual.pos_embed.weight", (256, 64), None),
        ("model.language_model.layers.0.mlp.experts.gate_up_proj", (4, 192, 64), Kind.EXPERTS),
        ("model.language_model.layers.0.mlp.experts.down_proj", (4, 64, 96), Kind.EXPERTS),
        ("model.language_model.layers.0.mlp.experts.down_proj", (4, 96, 64), None),  # [experts, in, out]
    ],
)
def test_qwen3_5_names(name: str, shape: tuple[int, ...], kind: Kind | None):
    assert kind_of(name, shape, QWEN3_5) is kind


def test_transposed_stores_are_kept():
    """Conv1D of GPT-2 and some expert stacks have K first: blocks along the last axis would mix outputs."""
    assert kind_of("h.0.attn.c_attn.weight", (64, 192), {"model_type": "gpt2"}) is None
    assert kind_of("wte.weight", (259, 64), {"model_type": "gpt2"}) is Kind.EMBEDDING
    assert kind_of("h.0.attn.c_attn.weight", (192, 64), {"model_type": "gpt_bigcode"}) is Kind.LINEAR  # nn.Linear
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert kind_of(experts, (4, 64, 64), {"model_type": "gpt_oss", "hidden_size": 64}) is None  # square: by name only
    assert kind_of(experts, (4, 64, 64), {"model_type": "qwen3_moe", "hidden_size": 64}) is Kind.EXPERTS
    llama4 = {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "hidden_size": 64}}
    assert kind_of("language_model.layers.0.feed_forward.experts.down_proj", (4, 64, 64), llama4) is None


@pytest.mark.parametrize("dtype", ["I8", "U8", "I64", "F8_E4M3"])
def test_other_dtypes_are_not_weights(dtype: str):
    assert kind_of("model.layers.0.mlp.up_proj.weight", (96, 64), dtype=dtype) is None


def test_files_beside_the_weights_are_copied(tmp_path: Path):
    source = write_source(tmp_path / "m", random_tensors({"model.embed_tokens.weight": (259, 64)}), LLAMA, shards=1)
    for name in ("chat_template.jinja", "LICENSE", "modeling_x.py", "tokenizer.model", ".gitattributes", "x.bin"):
        (source / name).write_text(name)
    (source / "onnx").mkdir()
    files = CudaTarget(source).files()
    expected = {"LICENSE", "chat_template.jinja", "modeling_x.py", "tokenizer.json", "tokenizer.model"}
    assert set(files) == expected


def test_remote_code_is_a_known_architecture(tmp_path: Path):
    config = {**LLAMA, "model_type": "frobnicator", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    source = write_source(tmp_path / "m", random_tensors({"model.embed_tokens.weight": (259, 64)}), config)
    target = CudaTarget(source)
    assert json.loads((source / "config.json").read_text())["model_type"] == "frobnicator"
    (tensor,) = target.tensors
    assert tensor.kind is Kind.EMBEDDING
    assert np.array_equal(target.read(tensor, slice(3, 9)), target.read(tensor, slice(None))[3:9])
