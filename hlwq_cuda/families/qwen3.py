"""Qwen3: Llama's block with an RMSNorm over each head of q and k before the rotary embedding."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from hlwq_cuda.families import Layer, llama
from hlwq_cuda.families.llama import gain

__all__ = ["MODEL_TYPES", "gain", "layer"]

MODEL_TYPES = ("qwen3",)


def layer(block: nn.Module) -> Layer:
    """The parts of a Qwen3DecoderLayer."""
    parts, attention = llama.layer(block), block.self_attn
    return replace(parts, mixer=replace(parts.mixer, query_norm=attention.q_norm, key_norm=attention.k_norm))
