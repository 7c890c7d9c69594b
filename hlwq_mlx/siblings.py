"""Layers that read the same input, as one product: q/k/v, gate/up. Blocks are per row, so rows concatenate exactly."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from hlwq_mlx import kernels

if TYPE_CHECKING:
    from hlwq_mlx.layers import HLWQLinear

# Attributes of one module that mlx-lm's architectures call with the same array.
SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
)


class Siblings:
    """Several HLWQLinear of the same spec under one parent. The first one called computes for all.

    Results wait for the calls of the other layers with the same array, which is held until then: while an object lives
    no other can be mistaken for it. A call in any other order computes again.
    """

    def __init__(self, layers: list[HLWQLinear]) -> None:
        self.layers = layers
        self._sources: list[mx.array] = []
        self._codes: mx.array | None = None
        self._norms: mx.array | None = None
        self._x: mx.array | None = None
        self._waiting: dict[int, mx.array] = {}

    def multiply(self, index: int, x: mx.array) -> mx.array:
        """y = x W^T of layer `index`."""
        if self._x is not x or index not in self._waiting:
            self._combine()
            first = self.layers[0]
            compute = kernels.split_product(first.codebook, first.spec, self._edges(), first.training)
            self._x, self._waiting = x, dict(enumerate(compute(x, self._codes, self._norms)))
        result = self._waiting.pop(index)
        if not self._waiting:
            self._x = None
        return result

    def _edges(self) -> tuple[int, ...]:
        """Where the outputs of one layer end and those of the next begin."""
        return tuple(accumulate(layer.weight_codes.shape[0] for layer in self.layers[:-1]))

    def _combine(self) -> None:
        """Concatenate the rows once; the layers keep views of the result, so no weight is stored twice."""
        current = [array for layer in self.layers for array in (layer.weight_codes, layer.weight_norms)]
        if len(current) == len(self._sources) and all(a is b for a, b in zip(current, self._sources, strict=True)):
            return
        self._codes = mx.concatenate([layer.weight_codes for layer in self.layers])
        self._norms = mx.concatenate([layer.weight_norms for layer in self.layers])
        start = 0
        for layer in self.layers:
            end = start + layer.weight_codes.shape[0]
            layer.weight_codes, layer.weight_norms = self._codes[start:end], self._norms[start:end]
            start = end
        self._sources = [array for layer in self.layers for array in (layer.weight_codes, layer.weight_norms)]
        mx.eval(self._codes, self._norms, self._sources)


def link(modules: Iterable[nn.Module]) -> None:
    """Make siblings of the quantized layers that share their parent's input."""
    from hlwq_mlx.layers import HLWQLinear

    for parent in modules:
        for names in SHARED_INPUT:
            layers = [parent[name] for name in names if isinstance(parent.get(name), HLWQLinear)]
            for spec in {layer.spec for layer in layers}:
                alike = [layer for layer in layers if layer.spec == spec]
                if len(alike) < 2:
                    continue
                siblings = Siblings(alike)
                for index, layer in enumerate(alike):
                    layer.join(siblings, index)
