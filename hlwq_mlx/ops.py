"""The operations of HLWQ on MLX arrays: rotate, unpack, decode, and the three products that layers need.

Everything here is plain `mlx.core`: it runs on the CPU, Metal and CUDA, and it is what the kernels are compared with.
Each function states the step of docs/format.md that it computes. Letters: N outputs, K inputs, B block, b bits,
Kp = K padded to whole blocks. `spec` is a `ModuleSpec`; `table` comes from `centroids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from hlwq_mlx.checkpoint import ModuleSpec

# A temporary of decoded weights costs about 8 bytes a weight (codes, indices, products): 256 MB at this size.
CHUNK_WEIGHTS = 2**25


class Path(Enum):
    """How a product is computed."""

    DECODED = "decoded"  # against the decoded rotated weight, which the layer keeps
    KERNELS = "kernels"  # by hlwq_mlx.kernels, from the packed codes
    PORTABLE = "portable"  # decode a range of rows, multiply, forget


def pick(device: mx.DeviceType, kernels_work: bool) -> Path:
    """The way to multiply on `device`.

    On the CPU a layer keeps its decoded weight: decoding takes a hundred times as long as the product of one token. A
    GPU multiplies from the codes, by kernels, or decodes at each call where they do not work: a decoded copy would undo
    the savings that quantization is for.
    """
    if device == mx.DeviceType.cpu:
        return Path.DECODED
    return Path.KERNELS if kernels_work else Path.PORTABLE


def centroids(codebook: Sequence[float], spec: ModuleSpec) -> mx.array:
    """c / sqrt(B), the table that `decode_rotated` looks codes up in: float32 [2**b]."""
    return mx.array([centroid / spec.block_size**0.5 for centroid in codebook], mx.float32)


def rotate(x: mx.array, spec: ModuleSpec) -> mx.array:
    """Steps 1 and 2: pad to whole blocks, each block times H_B: float [..., K] -> float32 [..., Kp].

    The transform runs on blocks of a power of two only: mx.hadamard_transform (0.32.4) corrupts memory for a length
    like 576 = 12 * 48, which it should refuse.
    """
    padding = spec.padded_in_features - x.shape[-1]
    x = x.astype(mx.float32)
    if padding:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    blocks = mx.unflatten(x, -1, (-1, spec.block_size))
    return mx.flatten(mx.hadamard_transform(blocks), -2)


def unpack(codes: mx.array, spec: ModuleSpec) -> mx.array:
    """The bit stream of step 3: uint32 [..., Kp * b / 32] -> uint8 [..., Kp].

    The stream is the one of MLX's affine quantization, so its dequantizer with scale 1 and bias 0 returns the codes;
    float16 holds them exactly, they are below 256.
    """
    groups = (*codes.shape[:-1], spec.blocks)
    ones, zeros = mx.ones(groups, mx.float16), mx.zeros(groups, mx.float16)
    return mx.dequantize(codes, ones, zeros, group_size=spec.block_size, bits=spec.bits).astype(mx.uint8)


def decode_rotated(
    codes: mx.array,  # uint32 [..., Kp * b / 32]
    norms: mx.array,  # float16 [..., Kp / B]
    table: mx.array,  # float32 [2**b]
    spec: ModuleSpec,
    dtype: mx.Dtype = mx.float32,
) -> mx.array:
    """norm * c[code] / sqrt(B), the weight in the rotated basis: `dtype` [..., Kp], rounded once."""
    values = mx.unflatten(table[unpack(codes, spec)], -1, (-1, spec.block_size))
    return mx.flatten(values * norms[..., None].astype(mx.float32), -2).astype(dtype)


def decode(codes: mx.array, norms: mx.array, table: mx.array, spec: ModuleSpec, dtype: mx.Dtype) -> mx.array:
    """Step 5: the weight itself, `dtype` [..., K]."""
    weight = rotate(decode_rotated(codes, norms, table, spec), spec)
    return weight[..., : spec.in_features].astype(dtype)


def decode_for_cpu(codes: mx.array, norms: mx.array, table: mx.array, spec: ModuleSpec) -> mx.array:
    """The operand that `linear_decoded` and `gather_linear_decoded` take: float32 [..., Kp, N], contiguous.

    Transposed because the reference BLAS of MLX's Linux wheels takes half the time that way (measurements.md,
    2026-11-23), and float32 because it is the fastest dtype there and the only one that mx.gather_mm has on a CPU.
    """
    return mx.contiguous(mx.swapaxes(decode_rotated(codes, norms, table, spec), -1, -2))


def linear_decoded(x: mx.array, decoded: mx.array, spec: ModuleSpec) -> mx.array:
    """y = x W^T from `decode_for_cpu`: float [..., K] -> [..., N] in the dtype of x."""
    return (rotate(x, spec) @ decoded).astype(x.dtype)


def linear(x: mx.array, codes: mx.array, norms: mx.array, table: mx.array, spec: ModuleSpec) -> mx.array:
    """y = x W^T from the codes: float [..., K], uint32 [N, Kp * b / 32], float16 [N, Kp / B] -> [..., N], dtype of x.

    Decodes to the dtype of x a range of rows at a time, so that no temporary exceeds CHUNK_WEIGHTS.
    """
    rotated = rotate(x, spec).astype(x.dtype)
    step = max(CHUNK_WEIGHTS // spec.padded_in_features, 1)
    parts = [
        rotated @ decode_rotated(codes[start : start + step], norms[start : start + step], table, spec, x.dtype).T
        for start in range(0, codes.shape[0], step)
    ]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def gather_linear_decoded(
    x: mx.array, decoded: mx.array, spec: ModuleSpec, indices: mx.array, sorted_indices: bool = False
) -> mx.array:
    """`gather_linear` from `decode_for_cpu`, float32 [experts, Kp, N]."""
    y = mx.gather_mm(rotate(x, spec), decoded, rhs_indices=indices, sorted_indices=sorted_indices)
    return y.astype(x.dtype)


def gather_linear(
    x: mx.array,  # float [..., M, K]; the leading axes broadcast with those of indices
    codes: mx.array,  # uint32 [experts, N, Kp * b / 32]
    norms: mx.array,  # float16 [experts, N, Kp / B]
    table: mx.array,
    spec: ModuleSpec,
    indices: mx.array,  # integer [...]: the expert of each matrix of x
    sorted_indices: bool = False,
) -> mx.array:
    """y = x W[index]^T, the product of mixture-of-experts layers: [..., M, N] in the dtype of x.

    Fewer matrices than experts (a token being generated): only the experts asked for are decoded.
    """
    rotated = rotate(x, spec).astype(x.dtype)
    if indices.size < codes.shape[0]:
        weight = decode_rotated(codes[indices], norms[indices], table, spec, x.dtype)
        return rotated @ mx.swapaxes(weight, -1, -2)
    weight = decode_rotated(codes, norms, table, spec, x.dtype)
    return mx.gather_mm(rotated, mx.swapaxes(weight, -1, -2), rhs_indices=indices, sorted_indices=sorted_indices)


def embedding(
    ids: mx.array, codes: mx.array, norms: mx.array, table: mx.array, spec: ModuleSpec, dtype: mx.Dtype
) -> mx.array:
    """Rows of the weight: integer [...] -> `dtype` [..., K]. Only the rows asked for are decoded."""
    return decode(codes[ids], norms[ids], table, spec, dtype)
