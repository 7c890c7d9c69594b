"""Device functions shared by the kernels: the block rotation, scaling of a block to fp16 or int8, and the two halves of
programmatic dependent launch.

The rotation is the fast Walsh-Hadamard transform as log2(B) rounds of one step: pair the neighbours, put all sums
before all differences. A round moves index bit 0 to the top, so after log2(B) rounds every bit has been transformed
and stands in its place again. Triton compiles the 128-point transform of one warp (four values a lane) to about 100
instructions with one trip through shared memory, on sm_80 to sm_120; no inline assembly is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hadamard_sums(x, B: tl.constexpr):
    """x: float32 [R, B] -> x @ H_B * sqrt(B), every row one block (format.md, step 2): sums and differences only."""
    rows: tl.constexpr = x.shape[0]
    for _ in tl.static_range(B.bit_length() - 1):
        even, odd = tl.split(tl.reshape(x, [rows, B // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), [rows, B])
    return x


@triton.jit
def hadamard_matrix(B: tl.constexpr, dtype: tl.constexpr):
    """H_B * sqrt(B), entries of +1 and -1: [B, B] of `dtype`.

    A tensor core's product with it is exact for fp16 and bf16, and for many blocks much cheaper than the sums above.
    """
    common = tl.arange(0, B)[:, None] & tl.arange(0, B)[None, :]
    folded = (common ^ (common >> 4)) & 15  # B <= 128: seven bits
    odd = (0x6996 >> folded) & 1  # bit n of the constant: the parity of n
    return tl.where(odd == 1, -1.0, 1.0).to(dtype)


@triton.jit
def round_to_int8(x, scale):
    """x / scale to the nearest integer, ties to even, as float32; |x| <= 127 * scale."""
    # adding 1.5 * 2**23 leaves no bit for a fraction; every backend of Triton rounds it the same way
    return (x / scale + 12582912.0) - 12582912.0


@triton.jit
def power_of_two_above(x):
    """The least power of two above each x >= 0, and its inverse: float32, exact (2**-126 for zero and subnormals)."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) & 255
    power = ((exponent + 1) << 23).to(tl.float32, bitcast=True)
    return power, ((253 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_activation(
    x,  # float32 [R, B], zero beyond K
    factor,  # float32, of the whole row: it may come later than x, since only the scales need it
    block,  # int32 [R], index of each block
    values,  # FORMAT plain: [K]; exact: float16 [Kp]; int8: int8 [Kp]
    scales,  # float32 [Kp / B]
    half_sums,  # float32 [Kp / 32]
    K: tl.constexpr,
    B: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Write blocks of a linear layer's input, x * factor, as its kernel reads it (plain.Activation, or x itself)."""
    offset = block[:, None] * B + tl.arange(0, B)[None, :]
    if FORMAT == "plain":
        tl.store(values + offset, (x * factor).to(values.dtype.element_ty), mask=offset < K)
    else:
        x = hadamard_sums(x, B)
        largest = tl.max(tl.abs(x), 1)
        if FORMAT == "int8":
            scale = tl.maximum(largest, 1e-20) / 127.0
            x = round_to_int8(x, scale[:, None])
            chunk = block[:, None] * (B // 32) + tl.arange(0, B // 32)[None, :]
            sums = tl.sum(tl.reshape(x, [x.shape[0], B // 32, 32]), 2)
            tl.store(half_sums + chunk, sums * 0.5)
        else:
            scale, inverse = power_of_two_above(largest)
            x = x * inverse[:, None]
        tl.store(values + offset, x.to(values.dtype.element_ty))
        tl.store(scales + block, scale * (factor / B))


@triton.jit
def allow_next_kernel(PDL: tl.constexpr):
    """Programmatic dependent launch: let the next kernel of the stream start now, up to its own wait."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Programmatic dependent launch: wait until everything that earlier kernels wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()
