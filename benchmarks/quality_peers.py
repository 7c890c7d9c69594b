"""Quantizers that HLWQ is compared with, as functions of a weight: float32 torch [N, K] -> decoded [N, K], bits.

Emulations in torch of what each project's encoder does at its default; `affine` is checked against mlx in the tests.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from convert import feedback, search_torch
from convert.codebook import codebook
from convert.format import ModuleSpec, default_block_size

Decoded = tuple[torch.Tensor, float]  # weight [N, K], bits a weight
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def group_of(weight: torch.Tensor, wanted: int) -> int:
    """The wanted group size, or the block that HLWQ would use if it does not divide K."""
    return wanted if weight.shape[1] % wanted == 0 else default_block_size(weight.shape[1])


def absmax(weight: torch.Tensor, bits: int, group: int = 128) -> Decoded:
    """Symmetric integers, float16 scale from the largest magnitude."""
    group = group_of(weight, group)
    blocks = weight.reshape(-1, group)
    top = 2 ** (bits - 1) - 1
    scale = (blocks.abs().amax(1, keepdim=True) / top).half().float().clamp_min(1e-12)
    return ((blocks / scale).round().clamp(-top - 1, top) * scale).reshape(weight.shape), bits + 16 / group


def absmax_hadamard(weight: torch.Tensor, bits: int) -> Decoded:
    """absmax in the rotated basis: the first half of HLWQ."""
    size = default_block_size(weight.shape[1])
    decoded, width = absmax(feedback.rotate_rows(weight, size), bits, size)
    return feedback.rotate_rows(decoded, size), width


def lloyd_max_only(weight: torch.Tensor, bits: int) -> Decoded:
    """Norms and Lloyd-Max centroids without the rotation: the second half of HLWQ."""
    size = default_block_size(weight.shape[1])
    table = torch.tensor(codebook(bits)).to(weight)
    blocks = weight.reshape(-1, size)
    scale = (blocks.norm(dim=1, keepdim=True).half().float() / size**0.5).clamp_min(1e-12)
    decoded = table[torch.bucketize(blocks / scale, (table[1:] + table[:-1]) / 2)] * scale
    return decoded.reshape(weight.shape), bits + 16 / size


def affine_parameters(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and bias of every group as mlx.core.quantize takes them: float32 [N * K / group, 1] each."""
    blocks = weight.reshape(-1, group)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    side = low.abs() > high.abs()
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-7)
    scale = torch.where(side, scale, -scale)
    edge = torch.where(side, low, high)
    zero = (edge / scale).round()
    scale = torch.where(zero != 0, edge / zero, scale)
    return scale, torch.where(zero != 0, edge, torch.zeros_like(edge))


def affine(weight: torch.Tensor, bits: int = 4, group: int = 64) -> Decoded:
    """MLX's affine mode: scale and bias of 16 bits for a group."""
    group = group_of(weight, group)
    scale, bias = affine_parameters(weight, bits, group)
    codes = ((weight.reshape(-1, group) - bias) / scale).round().clamp(0, 2**bits - 1)
    return (codes * scale + bias).reshape(weight.shape), bits + 32 / group


def tinygemm_int4(weight: torch.Tensor, group: int = 128) -> Decoded:
    """torchao's int4 weight-only layout: unsigned codes, bfloat16 scale and midpoint from minimum and maximum."""
    group = group_of(weight, group)
    blocks = weight.reshape(-1, group)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-6).bfloat16().float()
    middle = (low + scale * 8).bfloat16().float()
    codes = ((blocks - low) / scale).round().clamp(0, 15)
    return ((codes - 8) * scale + middle).reshape(weight.shape), 4 + 32 / group


def nf4(weight: torch.Tensor, group: int = 64) -> Decoded:
    """bitsandbytes' NF4 with float32 absmax."""
    table = torch.tensor(NF4).to(weight)
    blocks = weight.reshape(-1, group)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)
    codes = torch.bucketize(blocks / scale, (table[1:] + table[:-1]) / 2)
    return (table[codes] * scale).reshape(weight.shape), 4 + 32 / group


def hlwq(
    weight: torch.Tensor, bits: int, power: float | None, block: int | None = None, unit_gain: bool = False
) -> Decoded:
    """HLWQ with the search encoder, or with the plain one for `power` None.

    unit_gain scales each norm up by what rounding took from the row.
    """
    spec = ModuleSpec(bits, block or default_block_size(weight.shape[1]), weight.shape[1])
    rotated = feedback.rotate_rows(weight, spec.block_size)
    blocks = rotated.reshape(len(weight), spec.blocks, -1)
    if power is None:
        norms = blocks.norm(dim=2)
        table = torch.tensor(codebook(bits)).to(weight)
        normal = blocks * (spec.block_size**0.5 / norms.clamp_min(1e-30))[..., None]
        codes = torch.bucketize(normal, (table[1:] + table[:-1]) / 2).reshape(rotated.shape)
    else:
        codes, norms = search_torch.encode(weight, spec, power)
    state = feedback.Rounding(codes.long(), norms.half().float(), spec)
    if unit_gain:
        rounded = state.values().reshape(blocks.shape)
        gain = (blocks * blocks).sum(2) / (blocks * rounded).sum(2)
        state.norms = (state.norms * torch.where(gain.isfinite() & (gain > 0), gain, 1.0)).half().float()
    decoded = feedback.rotate_rows(state.values(), spec.block_size)[:, : weight.shape[1]]
    return decoded, spec.bits_per_weight


def gptq_affine(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int) -> Decoded:
    """GPTQ with act-order and static groups: MLX's affine grid, error feedback in the original basis."""
    group = group_of(weight, group)
    scale, bias = (
        each.reshape(len(weight), -1).repeat_interleave(group, 1) for each in affine_parameters(weight, bits, group)
    )
    hessian = feedback.damped(hessian)
    order = torch.argsort(torch.diagonal(hessian), descending=True)
    factor = feedback.feedback_factor(hessian[order][:, order])
    free, scale, bias = weight[:, order].clone(), scale[:, order], bias[:, order]
    decoded = torch.empty_like(free)
    for start in range(0, free.shape[1], 128):
        part = slice(start, start + 128)
        errors = torch.empty_like(free[:, part])
        for j in range(start, min(start + 128, free.shape[1])):
            code = ((free[:, j] - bias[:, j]) / scale[:, j]).round().clamp(0, 2**bits - 1)
            decoded[:, j] = code * scale[:, j] + bias[:, j]
            error = (free[:, j] - decoded[:, j]) / factor[j, j]
            errors[:, j - start] = error
            free[:, j + 1 : start + 128] -= error[:, None] * factor[j, j + 1 : start + 128]
        free[:, start + 128 :] -= errors @ factor[part, start + 128 :]
    result = torch.empty_like(decoded)
    result[:, order] = decoded
    return result, bits + 32 / group


Quantizer = Callable[[torch.Tensor, float], Decoded]  # weight, and how its columns count (convert/plan.py)
PEERS: dict[str, Quantizer] = {
    "MLX affine 4-bit g64": lambda w, _: affine(w, 4, 64),
    "MLX affine 4-bit g128": lambda w, _: affine(w, 4, 128),
    "NF4 b64, float32 absmax": lambda w, _: nf4(w),
    "absmax INT4 g128": lambda w, _: absmax(w, 4),
    "torchao's INT4 g128 (rounding only)": lambda w, _: tinygemm_int4(w),
}
ABLATION: dict[str, Quantizer] = {
    f"{name}, {bits} bits": quantizer
    for bits in (4, 5)
    for name, quantizer in (
        ("absmax", lambda w, _, b=bits: absmax(w, b)),
        ("Hadamard + absmax", lambda w, _, b=bits: absmax_hadamard(w, b)),
        ("Lloyd-Max", lambda w, _, b=bits: lloyd_max_only(w, b)),
        ("Hadamard + Lloyd-Max (HLWQ plain)", lambda w, _, b=bits: hlwq(w, b, None)),
    )
}
HLWQ: dict[str, Quantizer] = {
    f"HLWQ Q{bits} {name}": quantizer
    for bits in (2, 3, 4, 5, 6)
    for name, quantizer in (
        ("plain", lambda w, _, b=bits: hlwq(w, b, None)),
        ("search, columns alike", lambda w, _, b=bits: hlwq(w, b, 0.0)),
        ("search", lambda w, power, b=bits: hlwq(w, b, power)),
    )
} | {f"HLWQ Q4 search, block {block}": lambda w, power, k=block: hlwq(w, 4, power, k) for block in (64, 32)}
UNIT_GAIN: dict[str, Quantizer] = {
    f"HLWQ Q{bits} search, unit gain": (lambda w, power, b=bits: hlwq(w, b, power, unit_gain=True))
    for bits in (2, 3, 4)
}
DETOUR: dict[str, Quantizer] = {
    "HLWQ Q5 plain, dequantized, then absmax INT4 g128": lambda w, _: absmax(hlwq(w, 5, None)[0], 4),
    "HLWQ Q5 plain, dequantized, then torchao's INT4 g128": lambda w, _: tinygemm_int4(hlwq(w, 5, None)[0]),
}
