"""The model families that the fused decode step knows.

A family is a module with `MODEL_TYPES`, the `model_type`s of config.json that it covers, `layer(block) -> Layer`, which
names the parts of one transformer block, and `gain(norm)`, the factors of its RMSNorm. To add one, write such a module
(qwen3.py is the example) and list it below. What a family may differ in is what `Layer` can express: pre-norm blocks;
rotary attention with grouped queries, biases, norms of q and k, gates; gated DeltaNet; SiLU(gate) * up. Anything else
runs as its transformers module in the general loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torch import nn


@dataclass(frozen=True)
class Attention:
    """Rotary attention, by its modules."""

    query: nn.Module  # gated: every head's q is followed by its gate
    key: nn.Module
    value: nn.Module
    output: nn.Module
    query_norm: nn.Module | None = None
    key_norm: nn.Module | None = None
    gated: bool = False  # the output is multiplied by sigmoid(gate)

    @property
    def inputs(self) -> tuple[nn.Module, ...]:
        """What reads the normalized row."""
        return (self.query, self.key, self.value)


@dataclass(frozen=True)
class DeltaNet:
    """Gated DeltaNet with a short convolution: transformers' module, whose parts have these names."""

    module: nn.Module

    @property
    def inputs(self) -> tuple[nn.Module, ...]:
        """What reads the normalized row."""
        return (self.module.in_proj_qkv, self.module.in_proj_z, self.module.in_proj_b, self.module.in_proj_a)

    @property
    def output(self) -> nn.Module:
        """What reads the mixer's row."""
        return self.module.out_proj


@dataclass(frozen=True)
class Layer:
    """The parts of one block, as modules of the model."""

    mixer_norm: nn.Module
    mixer: Attention | DeltaNet
    mlp_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module


def find_family(model_type: str) -> ModuleType | None:
    """The family module that covers `model_type`, or None."""
    from hlwq_cuda.families import llama, qwen3, qwen3_5

    return next((family for family in (llama, qwen3, qwen3_5) if model_type in family.MODEL_TYPES), None)
