"""Llama, and the families that use its names: Mistral, and Qwen2, whose biases travel with the projections."""

from __future__ import annotations

import torch
from torch import nn

from hlwq_cuda.families import Attention, Layer

MODEL_TYPES = ("llama", "mistral", "qwen2")


def layer(block: nn.Module) -> Layer:
    """The parts of a LlamaDecoderLayer."""
    attention, mlp = block.self_attn, block.mlp
    return Layer(
        mixer_norm=block.input_layernorm,
        mixer=Attention(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        mlp_norm=block.post_attention_layernorm,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
    )


def gain(norm: nn.Module) -> torch.Tensor:
    """The factors of a LlamaRMSNorm."""
    return norm.weight.data
