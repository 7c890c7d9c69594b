"""The model families that the fused decode step knows.

A family is a module with `MODEL_TYPES`, the `model_type`s of config.json that it covers, and `layer(block) -> Layer`,
which names the parts of one transformer block. To add one, write such a module (qwen3.py is the example) and list it
below. What a family may differ in is what `Layer` can express: pre-norm blocks, rotary attention with grouped
queries, biases, norms of q and k, SiLU(gate) * up. Anything else runs as its transformers module in the general loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torch import nn


@dataclass(frozen=True)
class Layer:
    """The parts of one block, as modules of the model."""

    attention_norm: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    output: nn.Module
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None


def find_family(model_type: str) -> ModuleType | None:
    """The family module that covers `model_type`, or None."""
    from hlwq_cuda.families import llama, qwen3

    return next((family for family in (llama, qwen3) if model_type in family.MODEL_TYPES), None)
