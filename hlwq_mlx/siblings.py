"""Layers that read the same input, as one product: q/k/v, gate/up. Blocks are per row, so rows concatenate exactly."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from hlwq_mlx.layers import HLWQLinear, HLWQSwitchLinear

# Attributes of one module that mlx-lm's architectures call with the same array.
SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("in_proj_qkvz", "in_proj_ba"),
)


class Siblings:
    """Several layers of one class and spec under one parent. The first one called computes for all.

    Results wait for the calls of the other layers with the same inputs, which are held until then: while an object
    lives no other can be mistaken for it. A call in any other order computes again.
    """

    def __init__(self, layers: list[HLWQLinear] | list[HLWQSwitchLinear]) -> None:
        self.layers = layers
        self._sources: list[tuple[nn.Module, str, mx.array]] = []
        self._codes: mx.array | None = None
        self._norms: mx.array | None = None
        self._edges: tuple[int, ...] = ()
        self._inputs: tuple = ()
        self._waiting: dict[int, mx.array] = {}

    def take(self, index: int, *inputs) -> mx.array | None:
        """The product of layer `index` with these inputs, if another layer's call has computed it."""
        if not self._waiting:
            return None
        for held, given in zip(self._inputs, inputs, strict=True):
            if held is not given:
                return None
        result = self._waiting.pop(index, None)
        if not self._waiting:
            self._inputs = ()
        return result

    def compute(self, index: int, x: mx.array, *indices) -> mx.array | None:
        """The product of layer `index`; those of the others wait. `indices`: which experts, for a stack.

        None when the layers cannot be combined now.
        """
        if not self.combine():
            return None
        first = self.layers[0]
        if indices:
            results = first._kernels.gather_product(x, self._codes, self._norms, *indices, edges=self._edges)
        else:
            results = first._kernels.product(x, self._codes, self._norms, self._edges)
        self._inputs, self._waiting = (x, *indices), dict(enumerate(results))
        return self._waiting.pop(index)

    def normed_product(self, x: mx.array, scale: mx.array, eps: float, **more) -> list[mx.array]:
        """The products of all, uncut, with rms_norm(x) * scale; more: see hlwq_mlx.cuda. After `combine`."""
        return self.layers[0]._kernels.normed_product(x, scale, eps, self._codes, self._norms, **more)

    def combine(self) -> bool:
        """Concatenate the rows once; the layers keep views of the result, so no weight is stored twice.

        False while mx.compile traces a function that has the parameters as inputs: they are placeholders then.
        """
        if self._sources and unchanged(self._sources):
            return True
        codes = mx.concatenate([layer.weight_codes for layer in self.layers], axis=-2)
        norms = mx.concatenate([layer.weight_norms for layer in self.layers], axis=-2)
        try:
            mx.eval(codes, norms)
        except ValueError:
            return False
        self._codes, self._norms = codes, norms
        # where the outputs of one layer end and those of the next begin
        self._edges = tuple(accumulate(layer.weight_codes.shape[-2] for layer in self.layers[:-1]))
        parts = zip(mx.split(codes, self._edges, -2), mx.split(norms, self._edges, -2), strict=True)
        self._sources = []
        for layer, (layer.weight_codes, layer.weight_norms) in zip(self.layers, parts, strict=True):
            self._sources += [(layer, name, layer[name]) for name in ("weight_codes", "weight_norms")]
        mx.eval([array for *_, array in self._sources])
        return True


def unchanged(sources: list[tuple[nn.Module, str, object]]) -> bool:
    """Whether every module still holds the objects of `sources` under these names."""
    for module, name, value in sources:  # a loop: all() of a generator takes twice the time, and a token asks 144 times
        if module[name] is not value:
            return False
    return True


def link(modules: Iterable[nn.Module]) -> None:
    """Make siblings of the quantized layers that share their parent's input."""
    for parent in modules:
        for names in SHARED_INPUT:
            layers = [parent[name] for name in names if isinstance(parent.get(name), (HLWQLinear, HLWQSwitchLinear))]
            for cls, spec in {(type(layer), layer.spec) for layer in layers}:
                alike = [layer for layer in layers if type(layer) is cls and layer.spec == spec]
                if len(alike) < 2:
                    continue
                siblings = Siblings(alike)
                for index, layer in enumerate(alike):
                    layer.join(siblings, index)
