"""Run a transformers model one decoder layer at a time and see the inputs of its matrices (torch).

The inputs are seen where they are used: every call of torch's `linear` inside the layer is looked at, and its weight
recognized by its address. That covers nn.Linear as well as experts stacked in one parameter.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from convert.errors import ConvertError

if TYPE_CHECKING:
    import torch
    from torch import nn

ADDED_TOLERANCE = 1e-2  # of what a matrix adds: float32 keeps it beside hidden states a hundred thousand times as large
_EXPERT = re.compile(r"(?<=\.)experts\.\d+\.|\[\d+\]$")


Name = TypeVar("Name")  # of a matrix; whatever tells it from the others


class _Stop(Exception):
    """Everything wanted was seen; the rest of the layer need not run."""


def watch(
    names: Mapping[int, Name],
    see: Callable[[Name, torch.Tensor], None] = lambda name, inputs: None,
    *,
    silent: Collection[Name] = (),
    see_output: Callable[[Name, torch.Tensor], None] = lambda name, output: None,
) -> AbstractContextManager:
    """Calls `see(name, input)` before and `see_output(name, output)` after every `linear` with a known weight.

    names: address of a weight -> its name. Matrices that are `silent` give zeros, or their bias.
    """
    from torch.nn.functional import linear
    from torch.overrides import TorchFunctionMode

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is linear:
                inputs, weight, *bias = (*args, *(kwargs or {}).values())
                name = names.get(weight.data_ptr())
                if name is not None:
                    see(name, inputs)
                    if name in silent:
                        output = inputs.new_zeros(*inputs.shape[:-1], len(weight))
                        output = output if bias in ([], [None]) else output + bias[0]
                    else:
                        output = func(inputs, weight, *bias)
                    see_output(name, output)
                    return output
            return func(*args, **(kwargs or {}))

    return Watch()


@dataclass(frozen=True)
class Call:
    """How the model calls a layer, apart from the hidden states."""

    args: tuple
    kwargs: Mapping[str, Any]

    def to(self, device: str) -> Call:
        """With all tensors on `device`."""
        return Call(_move(self.args, device), _move(self.kwargs, device))


def decoder_layers(model: Any) -> nn.ModuleList:
    """The list of decoder layers: the longest ModuleList of the text model."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    from torch.nn import ModuleList

    lists = [module for module in decoder.modules() if isinstance(module, ModuleList) and len(module)]
    if not lists:
        raise ConvertError(f"{type(model).__name__} has no list of layers to calibrate; use --encoder search")
    return max(lists, key=len)


def show_experts(model: Any) -> None:
    """Make every expert a `linear` of its own, where transformers has a choice."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


def enter(model: nn.Module, layers: nn.ModuleList, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The hidden states that reach the first layer, for every batch of tokens [windows, length]."""
    states: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).float())
        raise _Stop

    handle = layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    for batch in batches:
        try:
            model(input_ids=batch, use_cache=False)
        except _Stop:
            pass
    handle.remove()
    return states


def head_inputs(model: nn.Module, head: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """What the output head multiplies, float32 [tokens, K], for tokens [windows, length]."""
    seen: list[torch.Tensor] = []

    def stop(module: nn.Module, args: tuple) -> None:
        seen.append(args[0].float())
        raise _Stop

    handle = head.register_forward_pre_hook(stop)
    try:
        model(input_ids=batch, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def record_calls(model: nn.Module, layers: nn.ModuleList, batch: torch.Tensor) -> list[Call]:
    """The arguments of every layer (masks and positions may differ between them); no layer is computed for it."""
    calls: list[Call] = []
    forwards = [layer.forward for layer in layers]

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        named = {key: value for key, value in kwargs.items() if key not in ("hidden_states", "past_key_values")}
        calls.append(Call(args[1:], named))
        return hidden

    for layer in layers:
        layer.forward = record
    try:
        model(input_ids=batch, use_cache=False)
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = forward
    return calls


class LayerRun:
    """One layer, in float32 on the device, beside an untouched copy."""

    def __init__(self, layer: nn.Module, call: Call, device: str) -> None:
        import torch

        self._layer = copy.deepcopy(layer).to(device=device, dtype=torch.float32)
        self._exact = copy.deepcopy(self._layer)
        self._call = call.to(device)

    def weights(self) -> dict[str, torch.Tensor]:
        """Every matrix that `linear` may be called with: parameters of two axes, and each expert of three."""
        return matrices(self._layer)

    def restore(self) -> None:
        """Put every original matrix back."""
        for weight, original in zip(self.weights().values(), matrices(self._exact).values(), strict=True):
            weight.copy_(original)

    def run(self, hidden: torch.Tensor, *, exact: bool = False, silent: Collection[str] = ()) -> torch.Tensor:
        """The output of the layer as it is now, or of the untouched copy; matrices that are `silent` add nothing."""
        layer = self._exact if exact else self._layer
        with watch(_addresses(layer), silent=silent) if silent else nullcontext():
            output = layer(hidden, *self._call.args, **self._call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def writes(self, name: str, later: Sequence[str], hidden: torch.Tensor) -> bool:
        """True if what the matrix gives is added to the hidden states as it is; `later` are all that are used after it.

        With those silent, the layer's output is then the stream of hidden states right after the matrix.
        """
        import torch

        added = torch.nn.functional.linear(self.inputs(hidden, [name])[name], self.weights()[name])
        change = self.run(hidden, silent=later) - self.run(hidden, silent=[name, *later])
        change = change.reshape(-1, change.shape[-1])
        return change.shape == added.shape and bool((change - added).norm() < ADDED_TOLERANCE * added.norm())

    def inputs(self, hidden: torch.Tensor, wanted: Sequence[str], *, exact: bool = False) -> dict[str, torch.Tensor]:
        """What the matrices `wanted` multiply, [tokens, K] each; a matrix that is not reached is absent."""
        seen: dict[str, torch.Tensor] = {}

        def see(name: str, inputs: torch.Tensor) -> None:
            seen[name] = inputs.reshape(-1, inputs.shape[-1])
            if len(seen) == len(wanted):
                raise _Stop

        weights = matrices(self._exact if exact else self._layer)
        try:
            with watch({weights[name].data_ptr(): name for name in wanted}, see):
                self.run(hidden, exact=exact)
        except _Stop:
            pass
        return seen

    def stages(self, hidden: torch.Tensor) -> list[list[list[str]]]:
        """Matrices in the order of use: stages of groups of names; a group shares its input.

        All experts of one kind form one stage, also those that these hidden states do not reach.
        """
        order: list[tuple[str, int]] = []
        alive: list[torch.Tensor] = []  # an input that is freed could lend its address to the next

        def see(name: str, inputs: torch.Tensor) -> None:
            alive.append(inputs)
            order.append((name, inputs.data_ptr()))

        names = self.weights()
        with watch(_addresses(self._layer), see):
            self.run(hidden)
        kinds: dict[str, list[str]] = {}
        for name in names:
            kinds.setdefault(_EXPERT.sub("*", name), []).append(name)
        stages: dict[object, list[list[str]]] = {}
        placed: dict[str, object] = {}
        for name, address in order:
            kind = _EXPERT.sub("*", name)
            if kind in placed:
                continue
            if len(kinds[kind]) > 1:  # experts: each has its own tokens
                placed[kind] = kind
                stages[kind] = [[each] for each in kinds[kind]]
            else:
                placed[kind] = address
                stages.setdefault(address, [[]])[0].append(name)
        return list(stages.values())


def matrices(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Every matrix that `linear` may be called with: parameters of two axes, and each expert of three."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 2:
            found[name] = parameter.data
        elif parameter.ndim == 3:
            found.update({f"{name}[{index}]": expert for index, expert in enumerate(parameter.data)})
    return found


def _addresses(layer: nn.Module) -> dict[int, str]:
    return {weight.data_ptr(): name for name, weight in matrices(layer).items()}


def _move(value: Any, device: str) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_move(each, device) for each in value)
    if isinstance(value, Mapping):
        return {key: _move(each, device) for key, each in value.items()}
    return value
