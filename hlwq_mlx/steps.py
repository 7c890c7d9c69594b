"""The feed-forward part of a layer as one compiled function while tokens are generated.

A token of an 8-billion-parameter model takes 36 of these; from Python, op by op, one costs the host 17 us, compiled 8.
Other parts hold a cache whose length changes at every token, so they cannot be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from hlwq_mlx import ops
from hlwq_mlx.layers import HLWQLinear, HLWQSwitchLinear
from hlwq_mlx.siblings import unchanged

NAMES = ("gate_proj", "up_proj", "down_proj")
MAX_ROWS = 8  # more are a prompt: every length would be compiled


class Step:
    """`module` compiled, its arrays as constants: good as long as it has the layers and arrays of that moment."""

    def __init__(self, module: nn.Module, call: Callable[..., mx.array]) -> None:
        self._holders = [(module, name, module[name]) for name in NAMES]
        self._holders += [(layer, name, array) for _, _, layer in self._holders for name, array in _arrays(layer)]
        self.compiled = mx.compile(lambda *inputs: call(module, *inputs))

    def current(self) -> bool:
        """Whether nothing was replaced since (adapters, loaded weights)."""
        return unchanged(self._holders)


def _step(module: nn.Module, call: Callable[..., mx.array]) -> Step | None:
    """The module's step, made anew where it is not current.

    None while mx.compile traces a function that has the parameters as inputs: no constants can be made of them.
    """
    step = module.__dict__.get("_step")
    if step is not None and step.current():
        return step
    try:
        mx.eval([array for name in NAMES for _, array in _arrays(module[name])])
    except ValueError:
        return None
    for name in NAMES:
        siblings = getattr(module[name], "_siblings", None)
        if siblings:
            siblings.combine()  # now: it replaces arrays
    step = module.__dict__["_step"] = Step(module, call)
    return step


def compile_steps(modules: Iterable[nn.Module]) -> None:
    """Give every feed-forward module that consists of quantized layers a compiled step."""
    for module in modules:
        layers = [module.get(name) for name in NAMES]
        if not all(isinstance(layer, (HLWQLinear, HLWQSwitchLinear)) for layer in layers):
            continue
        if {name.partition(".")[0] for name, _ in tree_flatten(module.parameters())} == set(NAMES):
            module.__class__ = _with_step(type(module))


@cache
def _with_step(cls: type[nn.Module]) -> type[nn.Module]:
    def __call__(self, x: mx.array, *more, **named):
        layer = self["up_proj"]
        few = x.size <= MAX_ROWS * x.shape[-1] and not self.training and not named
        if few and hasattr(layer, "_path") and layer._path(x.dtype) is ops.Path.KERNELS:
            step = _step(self, cls.__call__)
            if step is not None:
                return step.compiled(x, *more)
        return cls.__call__(self, x, *more, **named)

    return type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})


def _arrays(layer: nn.Module) -> list[tuple[str, mx.array]]:
    return [(name, value) for name, value in layer.items() if isinstance(value, mx.array)]
