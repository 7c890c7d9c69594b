"""Qwen3: Llama's block with an RMSNorm over each head of q and k before the rotary embedding."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from hlwq_cuda.families import Layer, llama

MODEL_TYPES = ("qwen3",)


def layer(block: nn.Module) -> Layer:
    """The parts of a Qwen3DecoderLayer."""
    attention = block.self_attn
    return replace(llama.layer(block), query_norm=attention.q_norm, key_norm=attention.k_norm)
