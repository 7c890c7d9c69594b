"""Llama, and the families that use its names: Mistral, and Qwen2, whose biases travel with the projections."""

from __future__ import annotations

from torch import nn

from hlwq_cuda.families import Layer

MODEL_TYPES = ("llama", "mistral", "qwen2")


def layer(block: nn.Module) -> Layer:
    """The parts of a LlamaDecoderLayer."""
    attention, mlp = block.self_attn, block.mlp
    return Layer(
        attention_norm=block.input_layernorm,
        query=attention.q_proj,
        key=attention.k_proj,
        value=attention.v_proj,
        output=attention.o_proj,
        mlp_norm=block.post_attention_layernorm,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
    )
