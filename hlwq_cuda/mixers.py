"""The two token mixers of the fused step, each with the memory of one layer: attention, and gated DeltaNet.

A mixer names the projection that reads the normalized row, the launches between it and the output projection, and the
output projection; and takes over what a prefill by the model left in a transformers cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from hlwq_cuda.families import Attention, DeltaNet
from hlwq_cuda.kernels import delta as delta_kernels
from hlwq_cuda.kernels import gated
from hlwq_cuda.kernels.attention import Partials, attention, combine
from hlwq_cuda.kernels.plain import Activation
from hlwq_cuda.projection import PLAIN_BLOCK, Buffers, Projection


@dataclass
class Surroundings:
    """What the mixers of one step share."""

    buffers: Buffers
    position: torch.Tensor  # int64 [1]
    eps: float
    gain: Callable[[nn.Module], torch.Tensor]  # of a norm
    rotary: tuple[torch.Tensor, torch.Tensor]  # cos, sin: float32 [T, R], the first R elements of a head
    partials: Partials
    head_dim: int


class AttentionMixer:
    """Rotary attention over cached keys and values, gated or not."""

    def __init__(self, parts: Attention, around: Surroundings, cache: torch.Tensor) -> None:
        """cache: [keys and values, kv_heads, T, D] of this layer."""
        self.projection = Projection(parts.inputs, around.buffers, around.eps)
        self.output = Projection([parts.output], around.buffers)
        self.cache, self._order = cache, None
        norms = () if parts.query_norm is None else (parts.query_norm, parts.key_norm)
        self.gains = gains = tuple(around.gain(norm) for norm in norms) or None
        target = (self.output.input, self.output.layout.block_size, self.output.layout.format)
        if not parts.gated:
            self.launches = self._attend(self.projection.output, gains, around.rotary, around, *target)
            return
        heads, kv_heads, head_dim = len(around.partials.out), len(cache[0]), around.head_dim
        device = cache.device
        order = gated.rotary_order(head_dim, around.rotary[0].shape[-1])
        self._order = torch.tensor(order, dtype=torch.int32, device=device)
        gains = tuple(gain[self._order] for gain in gains)
        arranged = around.buffers.row((heads + 2 * kv_heads) * head_dim)
        mixed = around.buffers.row(heads * head_dim)
        whole = Activation(mixed, mixed, mixed)  # a plain row has no scales
        rotary = full_tables(*around.rotary, order)
        row = self.projection.output
        self.launches = [
            partial(gated.arrange, row, self._order, arranged, heads),
            *self._attend(arranged, gains, rotary, around, whole, PLAIN_BLOCK, "plain"),
            partial(gated.gate, mixed, row, head_dim, *target),
        ]

    def _attend(self, row, gains, rotary, around: Surroundings, *target) -> list[Callable]:
        scale = around.head_dim**-0.5
        tensors = (row, gains, rotary, *self.cache, around.position, around.partials)
        return [partial(attention, *tensors, around.eps, scale), partial(combine, around.partials, *target)]

    def load(self, cached, length: int) -> None:
        """Copy the keys and values of a layer of a transformers cache."""
        keys = cached.keys[0, :, :length]
        self.cache[0, :, :length] = keys if self._order is None else keys[..., self._order]
        self.cache[1, :, :length] = cached.values[0, :, :length]


class DeltaMixer:
    """Gated DeltaNet: a matrix for every head, and the last inputs of the convolution, both float32."""

    def __init__(self, parts: DeltaNet, around: Surroundings) -> None:
        module, buffers = parts.module, around.buffers
        shape = delta_shape(module)
        self.projection = Projection(parts.inputs, buffers, around.eps)
        self.output = Projection([parts.output], buffers)
        device = around.position.device
        size = (shape.value_heads, shape.key_dim, shape.value_dim)
        self._state = torch.zeros(size, device=device)
        self._ring = torch.zeros((shape.taps, shape.channels), device=device)
        row, values = self.projection.output, shape.value_heads * shape.value_dim
        mixed = buffers.row(values)
        weight = module.conv1d.weight.data.squeeze(1)
        parameters = (weight, module.A_log.data, module.dt_bias.data)
        memory = (around.position, self._ring, self._state)
        gate = row[shape.channels : shape.channels + values]
        norm = (module.norm.weight.data, around.eps)
        target = (self.output.input, self.output.layout.block_size, self.output.layout.format)
        self.launches = [
            partial(delta_kernels.delta, row, *parameters, *memory, mixed, shape),
            partial(delta_kernels.gated_norm, mixed, gate, *norm, *target),
        ]

    def load(self, cached, length: int) -> None:
        """Copy the states of a layer of a transformers cache; the ring has an input at its position modulo its size."""
        inputs = cached.conv_states[0][0].T.float()  # [taps, channels], the newest last
        self._ring.copy_(inputs.roll(length % len(self._ring), 0))
        self._state.copy_(cached.recurrent_states[0][0])


def delta_shape(module: nn.Module) -> delta_kernels.Shape:
    """Of a gated DeltaNet module of transformers."""
    heads = (module.num_k_heads, module.num_v_heads)
    return delta_kernels.Shape(*heads, module.head_k_dim, module.head_v_dim, module.conv_kernel_size)


def refuse(parts: Attention | DeltaNet, rotary_dim: int, head_dim: int) -> str | None:
    """Why the fused step cannot run this mixer, or None."""
    if isinstance(parts, Attention):
        if rotary_dim == head_dim or (parts.gated and rotary_dim < head_dim):
            return None
        return f"the fused step has no rotary embedding of {rotary_dim} in a head of {head_dim}"
    shape = delta_shape(parts.module)
    if any(width & (width - 1) for width in (shape.key_dim, shape.value_dim)):
        return "the fused step has DeltaNet heads of widths that are powers of two only"
    if parts.module.conv1d.bias is not None or parts.module.activation not in ("silu", "swish"):
        return "the fused step's convolution has SiLU and no bias"
    return None


def full_tables(cos: torch.Tensor, sin: torch.Tensor, order: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables [T, R] of the first R elements of a head -> [T, D], in `order`; angle zero for the others."""
    passed = (0, len(order) - cos.shape[-1])
    cos = nn.functional.pad(cos, passed, value=1.0)
    sin = nn.functional.pad(sin, passed)
    return cos[:, order].contiguous(), sin[:, order].contiguous()
