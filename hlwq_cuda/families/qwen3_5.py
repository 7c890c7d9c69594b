"""Qwen3.5's text model: gated DeltaNet, with gated attention in every fourth block; norms of 1 + weight."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from hlwq_cuda.families import DeltaNet, Layer, qwen3

MODEL_TYPES = ("qwen3_5_text",)


def layer(block: nn.Module) -> Layer:
    """The parts of a Qwen3_5DecoderLayer."""
    if not hasattr(block, "linear_attn"):
        parts = qwen3.layer(block)
        return replace(parts, mixer=replace(parts.mixer, gated=True))
    mlp = block.mlp
    return Layer(
        mixer_norm=block.input_layernorm,
        mixer=DeltaNet(block.linear_attn),
        mlp_norm=block.post_attention_layernorm,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
    )


def gain(norm: nn.Module) -> torch.Tensor:
    """The factors of a Qwen3_5RMSNorm."""
    return 1.0 + norm.weight.data.float()
