"""Linear layers of a decode step that read the same row: q, k and v, or gate and up, as one product.

Rows of a weight are quantized independently, so stacking the rows of several weights is exact. `Projection` stacks them
when it is made and points the modules' parameters at their rows, so that no second copy of a weight stays in memory.
A layer that was left unquantized is a product by cuBLAS, which is also how an unquantized model takes the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import nn

from hlwq_cuda import ops
from hlwq_cuda.kernels import plain
from hlwq_cuda.kernels.layout import CHUNK
from hlwq_cuda.kernels.plain import Activation
from hlwq_cuda.layers import HLWQLinear

PLAIN_BLOCK = 128  # elements a program writes where nothing is rotated


class Projection:
    """y = concat(W_i x + b_i) for one row x, which another kernel writes to `input` in the format it asks for.

    Neighbors with the same number of bits are one launch. Raises ValueError as `input_layout` does.
    """

    def __init__(self, modules: Sequence[nn.Module], buffers: Buffers, eps: float | None = None) -> None:
        """eps: of the RMSNorm that writes the row; None when it comes from elsewhere."""
        self.layout = input_layout(modules)
        self.input = buffers.input(self.layout, eps)  # what to write before `run`
        self.output = buffers.output(sum(module.out_features for module in modules), self.layout)  # [N]
        self._products = []
        first = 0
        for _, group in groupby(modules, key=lambda module: getattr(module, "spec", None)):
            product = _Product(list(group), self.layout)
            self._products.append((product, self.output[first : first + product.rows]))
            first += product.rows

    def run(self, launch: dict) -> None:
        """Launch the products; capturable."""
        for product, output in self._products:
            product.run(self.input, output, launch)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """The same for many rows that nothing has rotated or scaled: [M, K] -> [M, N] of the same dtype."""
        parts = [product.multiply(x) for product, _ in self._products]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class InputLayout(NamedTuple):
    """How a projection reads its row: equal layouts can share a buffer."""

    format: str  # "exact", "int8": rotated and scaled, see plain.Activation; "plain": the row as it is
    block_size: int  # of the rotation
    size: int  # K
    dtype: torch.dtype  # of the row when it is plain


def input_layout(modules: Sequence[nn.Module]) -> InputLayout:
    """What the common input of `modules` must look like.

    Raises ValueError, saying what stands in the way, when they cannot read the same row.
    """
    first = modules[0]
    for module in modules:
        if not isinstance(module, (nn.Linear, HLWQLinear)):
            raise ValueError(f"the fused step has no layer of type {type(module).__module__}.{type(module).__name__}")
    if all(isinstance(module, nn.Linear) for module in modules):
        return InputLayout("plain", PLAIN_BLOCK, first.in_features, first.weight.dtype)
    if any(isinstance(module, nn.Linear) for module in modules):
        raise ValueError("a quantized and an unquantized layer read the same input")
    if len({module.spec.block_size for module in modules}) > 1:
        raise ValueError("layers that read the same input have different block sizes")
    modes = {module.effective_mode() for module in modules}
    format = modes.pop() if len(modes) == 1 else "exact"
    return InputLayout(format, first.spec.block_size, first.in_features, torch.float16)


class Buffers:
    """Rows that pass between the kernels of a step. Kernels run in order, so equal layouts share one buffer."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inputs: dict[tuple, Activation] = {}
        self._outputs: dict[tuple, torch.Tensor] = {}

    def input(self, layout: InputLayout, eps: float | None) -> Activation:
        """One row in `layout`, with the parts of a norm's factor when `eps` is given."""
        if (layout, eps) not in self._inputs:
            blocks = -(-layout.size // layout.block_size)
            padded = layout.size if layout.format == "plain" else blocks * layout.block_size
            dtype = {"plain": layout.dtype, "exact": torch.float16, "int8": torch.int8}[layout.format]
            self._inputs[layout, eps] = Activation(
                torch.empty(padded, dtype=dtype, device=self._device),
                self._float32(blocks),
                self._float32(-(-padded // CHUNK)),
                None if eps is None or layout.format == "plain" else self._float32(blocks),
                eps or 0.0,
            )
        return self._inputs[layout, eps]

    def _float32(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float32, device=self._device)

    def row(self, size: int) -> torch.Tensor:
        """`size` float32 numbers between two kernels that are not products."""
        return self.output(size, InputLayout("exact", PLAIN_BLOCK, size, torch.float32))

    def output(self, size: int, layout: InputLayout) -> torch.Tensor:
        """A product of `size` numbers: float32, or the weight's dtype behind a plain layout."""
        key = (size, layout.dtype if layout.format == "plain" else torch.float32)
        if key not in self._outputs:
            self._outputs[key] = torch.empty(size, dtype=key[1], device=self._device)
        return self._outputs[key]


class _Product:
    """One launch: the stacked rows of weights of equal bits."""

    def __init__(self, modules: Sequence[nn.Module], layout: InputLayout) -> None:
        self._layout, first = layout, modules[0]
        self.rows = sum(module.out_features for module in modules)
        self._bias = _merge_bias(modules)
        if layout.format == "plain":
            self._weight = merge_rows([module.weight for module in modules])
        else:
            self._codes = merge_rows([module.weight_codes for module in modules])
            self._norms = merge_rows([module.weight_norms for module in modules])
            self._table, self._bits = first.table, first.spec.bits

    def run(self, input: Activation, output: torch.Tensor, launch: dict) -> None:
        if self._layout.format == "plain":
            torch.mv(self._weight, input.values, out=output)
            if self._bias is not None:
                output += self._bias
            return
        shape = (self._bits, self._layout.block_size, self._layout.format)
        if output.is_cuda:
            ops.body(output).gemv(input, self._codes, self._norms, self._table, self._bias, output, *shape, launch)
        else:
            row = Activation(*(None if part is None else part[None] for part in input[:4]), input.eps)
            product = plain.multiply(row, self._codes, self._norms, self._table, *shape)[0]
            output.copy_(product if self._bias is None else product + self._bias)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """[M, K] -> [M, N]."""
        if self._layout.format == "plain":
            bias = None if self._bias is None else self._bias.to(x.dtype)
            return nn.functional.linear(x, self._weight, bias)
        mode = self._layout.format
        kernel = ops.pick(len(x), mode, self._bits)
        shape = (self._bits, self._layout.block_size, self._layout.size)
        weight = (self._codes, self._norms, self._table, self._bias)
        return ops.body(x).linear(x, *weight, *shape, mode, kernel)


def merge_rows(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The parameters [N_i, W] as one tensor [sum N_i, W], of which they become views."""
    first = parameters[0].data
    if len(parameters) == 1:
        return first
    sizes = [len(parameter) for parameter in parameters]
    merged = _joined_already([parameter.data for parameter in parameters], sum(sizes))
    if merged is None:
        merged = torch.cat([parameter.data for parameter in parameters])
        for parameter, rows in zip(parameters, merged.split(sizes), strict=True):
            parameter.data = rows
    return merged


def _joined_already(parts: list[torch.Tensor], rows: int) -> torch.Tensor | None:
    """The tensor that `parts` are consecutive rows of, when an earlier call made them so."""
    first, offset = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != offset or not part.is_contiguous():
            return None
        offset += part.numel()
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def _merge_bias(modules: Sequence[nn.Module]) -> torch.Tensor | None:
    """The biases in a row, float32 [sum N_i], zeros where a module has none; None when none has."""
    given = [module.bias.data.float() for module in modules if module.bias is not None]
    if not given:
        return None
    zeros = given[0].new_zeros
    return torch.cat([zeros(module.out_features) if module.bias is None else module.bias.float() for module in modules])
