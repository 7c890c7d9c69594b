"""Quantized modules: a linear layer, an embedding, a stack of experts.

A module is made with empty tensors of format 1's names, dtypes and shapes, so that any loader fills it; `prepare` then
converts the codes to the device layout in place. The dtype tells the state: uint32 codes are format 1, int32 codes the
device layout. `state_dict` always holds format 1, bit for bit as loaded, and `load_state_dict` takes it in any state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hlwq_cuda import ops
from hlwq_cuda.checkpoint import ModuleSpec
from hlwq_cuda.kernels.layout import to_device_layout, to_format_1
from hlwq_cuda.kernels.tables import make_table


class HLWQWeight(nn.Module):
    """The tensors of one quantized weight [..., N, K], and their two layouts.

    weight_codes: uint32 (format 1) or int32 (device layout) [..., N, Kp * bits / 32]
    weight_norms: float16 [..., N, Kp / B]
    table:        int32, not saved: the checkpoint's codebook in the forms that kernels read

    The norms are a buffer and not a parameter because transformers takes a model's dtype from its first floating
    parameter, and they stay float16 when a model is cast: every other dtype would round them.
    """

    def __init__(
        self,
        shape: Sequence[int],  # [..., N]
        spec: ModuleSpec,
        codebook: Sequence[float],  # ascending, 2**bits
        mode: str | None = None,  # None: ops.default_mode
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if mode is not None:
            ops.check_mode(mode, spec.bits)
        self.spec, self.mode, self.codebook = spec, mode, tuple(codebook)
        codes = torch.empty((*shape, spec.words), dtype=torch.uint32, device=device)
        norms = torch.empty((*shape, spec.blocks), dtype=torch.float16, device=device)
        self.weight_codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_norms", norms)
        self.register_buffer("table", None, persistent=False)
        if self.weight_codes.device.type != "meta":
            self.table = make_table(self.codebook, spec.bits).to(device)

    def prepare(self, device: torch.device | str | None = None) -> HLWQWeight:
        """Move to `device` and convert the codes to the device layout, in place; call it once loading is done.

        A tied module sees the conversion through the shared parameter, and preparing it again changes nothing.
        """
        device = torch.device(device) if device is not None else self.weight_codes.device
        for tensor in (*self.parameters(recurse=False), self.weight_norms):
            tensor.data = tensor.data.to(device)
        self.weight_codes.data = self.device_codes().data
        self.make_table(device)
        return self

    def make_table(self, device: torch.device | str) -> None:
        """The codebook on `device`; only an offloaded module, which cannot be prepared, needs it called."""
        self.table = make_table(self.codebook, self.spec.bits).to(device)

    def device_codes(self) -> torch.Tensor:
        """The codes in the device layout; converted here when the module was loaded but not prepared."""
        codes = self.weight_codes
        return to_device_layout(codes, self.spec.bits) if codes.dtype == torch.uint32 else codes

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that the codes stand for, [..., N, K]."""
        return torch.ops.hlwq.dequantize(*self._tensors(), *self._geometry(), dtype)

    def effective_mode(self) -> str:
        """The mode that a product uses here."""
        return self.mode or ops.default_mode(self.spec.bits, self.weight_codes.device.type)

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.device_codes(), self.weight_norms, self.table

    def _geometry(self) -> tuple[int, int, int]:
        return self.spec.bits, self.spec.block_size, self.spec.in_features

    def _apply(self, function, recurse: bool = True) -> HLWQWeight:
        norms = self.weight_norms
        super()._apply(function, recurse)
        if self.weight_norms.dtype != norms.dtype:
            self.weight_norms = norms.to(self.weight_norms.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        codes = self.weight_codes.data
        if codes.dtype == torch.int32:
            destination[f"{prefix}weight_codes"] = to_format_1(codes, self.spec.bits).view(torch.uint32)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        name = f"{prefix}weight_codes"
        if name in state_dict and self.weight_codes.dtype == torch.int32:
            state_dict[name] = to_device_layout(state_dict[name], self.spec.bits)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """For print(model)."""
        bits, block_size, in_features = self._geometry()
        rows = "x".join(map(str, self.weight_norms.shape[:-1]))
        return f"{in_features} -> {rows}, bits={bits}, block_size={block_size}, mode={self.effective_mode()}"


class HLWQLinear(HLWQWeight):
    """y = x W^T + bias: [..., K] -> [..., N] in the activation's dtype."""

    def __init__(
        self,
        out_features: int,
        spec: ModuleSpec,
        codebook: Sequence[float],
        bias_dtype: torch.dtype | None = None,  # None: no bias
        mode: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__((out_features,), spec, codebook, mode, device)
        self.in_features, self.out_features = spec.in_features, out_features
        bias = None if bias_dtype is None else torch.empty(out_features, dtype=bias_dtype, device=device)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("decoded", None, persistent=False)

    def prepare(self, device: torch.device | str | None = None) -> HLWQLinear:
        """As for every weight; on the CPU also decode once, to float32: decoding costs 30 products of one row there."""
        super().prepare(device)
        self.decoded = None
        if self.weight_codes.device.type == "cpu" and self.effective_mode() == "exact":
            weight = torch.ops.hlwq.dequantize(*self._tensors(), *self._geometry(), torch.float32)
            self.register_buffer("decoded", weight, persistent=False)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One custom op; with a decoded weight, a plain product."""
        if self.decoded is not None and self.effective_mode() == "exact":
            bias = None if self.bias is None else self.bias.float()
            return nn.functional.linear(x.float(), self.decoded, bias).to(x.dtype)
        return torch.ops.hlwq.linear(x, *self._tensors(), self.bias, *self._geometry(), self.effective_mode())


class HLWQEmbedding(HLWQWeight):
    """Rows of W by id: [...] -> [..., K] of `dtype`."""

    def __init__(
        self,
        num_embeddings: int,
        spec: ModuleSpec,
        codebook: Sequence[float],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__((num_embeddings,), spec, codebook, None, device)
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, spec.in_features, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """One custom op."""
        return torch.ops.hlwq.embedding(ids, *self._tensors(), *self._geometry(), self.dtype)

    def as_linear(self, mode: str | None = None) -> HLWQLinear:
        """The output head of a model with tied embeddings; it shares this module's parameters."""
        head = HLWQLinear(self.num_embeddings, self.spec, self.codebook, mode=mode, device="meta")
        head.weight_codes, head.weight_norms, head.table = self.weight_codes, self.weight_norms, self.table
        return head


class HLWQExperts(HLWQWeight):
    """The stacked weight [E, N, K] of a mixture of experts, one of the tensors of a transformers experts module."""

    def __init__(
        self,
        num_experts: int,
        out_features: int,
        spec: ModuleSpec,
        codebook: Sequence[float],
        dtype: torch.dtype,
        mode: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__((num_experts, out_features), spec, codebook, mode, device)
        self.num_experts, self.out_features, self.dtype = num_experts, out_features, dtype

    def __getitem__(self, expert: int | torch.Tensor) -> torch.Tensor:
        """The decoded weight of one expert, [N, K] of `dtype`: stands where a module indexes a dense stack."""
        codes, norms, table = self._tensors()
        return torch.ops.hlwq.dequantize(codes[expert], norms[expert], table, *self._geometry(), self.dtype)

    def forward(self, x: torch.Tensor, expert: int | torch.Tensor) -> torch.Tensor:
        """x W_e^T for one expert: [..., K] -> [..., N]."""
        codes, norms, table = self._tensors()
        mode = self.effective_mode()
        return torch.ops.hlwq.linear(x, codes[expert], norms[expert], table, None, *self._geometry(), mode)
