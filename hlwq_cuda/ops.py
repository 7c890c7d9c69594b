"""The operations of HLWQ as torch custom ops, `torch.ops.hlwq.*`: schemas, fake bodies, gradients, choice of kernel.

Shared arguments, for a weight of N outputs and K inputs, Kp = K padded to whole blocks of B:

    codes       int32 [N, Kp * bits / 32], device layout (kernels/layout.py)
    norms       float16 [N, Kp / B]
    table       int32, the codebook in the forms that kernels read (kernels/tables.py)
    mode        "exact": fp16 centroids and activations; "int8": both rounded to int8, activations with one scale a
                block, and from 65 rows on, up to 4 bits, with one scale a row (kernels/prefill_int8.py)

The gradient is with respect to the activation (and bias), never the weight: enough for LoRA. It treats the rounding
of activations as the identity.
"""

from __future__ import annotations

import torch

from hlwq_cuda.kernels import plain
from hlwq_cuda.kernels.tables import INT8_MAX_BITS

MODES = ("exact", "int8")
GEMV_MAX_ROWS = 1
GEMM_MAX_ROWS = {"exact": 32, "int8": 64}  # above, a dequantized weight and cuBLAS are faster (H200, measurements.md)
PREFILL_INT8_MAX_BITS = 4  # with one int8 step a row, weights of 5 bits would lose a twentieth of their accuracy


def pick(rows: int, mode: str, bits: int) -> str:
    """The kernel for a product with that many rows of activations."""
    if rows <= GEMV_MAX_ROWS:
        return "gemv"
    if rows <= GEMM_MAX_ROWS[mode]:
        return "gemm"
    return "prefill_int8" if mode == "int8" and bits <= PREFILL_INT8_MAX_BITS else "dequantize"


def default_mode(bits: int, device_type: str) -> str:
    """int8 where it pays: on a GPU, for the widths whose error is far above that of rounding to int8."""
    return "int8" if bits <= INT8_MAX_BITS and device_type == "cuda" else "exact"


@torch.library.custom_op("hlwq::linear", mutates_args=())
def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    norms: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    block_size: int,
    in_features: int,
    mode: str,
) -> torch.Tensor:
    """y = x W^T + bias: [..., K] of float16, bfloat16 or float32 -> [..., N] of the same dtype."""
    check_mode(mode, bits)
    if x.shape[-1] != in_features:
        raise ValueError(f"the activation has {x.shape[-1]} columns, the weight takes {in_features}")
    kernel = pick(x.numel() // in_features, mode, bits)
    return body(x).linear(x, codes, norms, table, bias, bits, block_size, in_features, mode, kernel)


@linear.register_fake
def _(x, codes, norms, table, bias, bits, block_size, in_features, mode):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _save_for_linear(ctx, inputs, output) -> None:
    _, codes, norms, table, bias, bits, block_size, in_features, _ = inputs
    ctx.save_for_backward(codes, norms, table)
    ctx.weight = (bits, block_size, in_features)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_gradient(ctx, gradient):
    codes, norms, table = ctx.saved_tensors
    weight = torch.ops.hlwq.dequantize(codes, norms, table, *ctx.weight, gradient.dtype)
    for_bias = None if ctx.bias_dtype is None else gradient.flatten(0, -2).sum(0).to(ctx.bias_dtype)
    return gradient @ weight, None, None, None, for_bias, None, None, None, None


linear.register_autograd(_linear_gradient, setup_context=_save_for_linear)


@torch.library.custom_op("hlwq::embedding", mutates_args=())
def embedding(
    ids: torch.Tensor,
    codes: torch.Tensor,
    norms: torch.Tensor,
    table: torch.Tensor,
    bits: int,
    block_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of the weight, rotated back: integer ids [...] -> [..., K] of `dtype`."""
    return body(codes).embedding(ids, codes, norms, table, bits, block_size, in_features, dtype)


@embedding.register_fake
def _(ids, codes, norms, table, bits, block_size, in_features, dtype):
    return norms.new_empty((*ids.shape, in_features), dtype=dtype)


@torch.library.custom_op("hlwq::dequantize", mutates_args=())
def dequantize(
    codes: torch.Tensor,
    norms: torch.Tensor,
    table: torch.Tensor,
    bits: int,
    block_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight [N, K] of `dtype`."""
    return body(codes).dequantize(codes, norms, table, bits, block_size, in_features, dtype)


@dequantize.register_fake
def _(codes, norms, table, bits, block_size, in_features, dtype):
    return norms.new_empty((*codes.shape[:-1], in_features), dtype=dtype)


@torch.library.custom_op("hlwq::rotate", mutates_args=())
def rotate(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Every block of B times H_B (its own inverse): [..., K] -> [..., Kp], same dtype, zeros appended."""
    return body(x).rotate(x, block_size)


@rotate.register_fake
def _(x, block_size):
    return x.new_empty((*x.shape[:-1], -(-x.shape[-1] // block_size) * block_size))


def _save_for_rotate(ctx, inputs, output) -> None:
    ctx.width, ctx.block_size = inputs[0].shape[-1], inputs[1]


def _rotate_gradient(ctx, gradient):
    return torch.ops.hlwq.rotate(gradient, ctx.block_size)[..., : ctx.width], None


rotate.register_autograd(_rotate_gradient, setup_context=_save_for_rotate)


def check_mode(mode: str, bits: int) -> None:
    """ValueError for an unknown mode, or int8 at a width whose table has no int8 form."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; the modes are {', '.join(MODES)}")
    if mode == "int8" and bits > INT8_MAX_BITS:
        raise ValueError(f"mode int8 serves 2 to {INT8_MAX_BITS} bits; use mode exact for {bits}-bit layers")


def body(tensor: torch.Tensor):
    """The module whose functions compute the ops where `tensor` is: gpu.py or kernels/plain.py."""
    if not tensor.is_cuda:
        return plain
    try:
        from hlwq_cuda import gpu
    except ImportError as error:
        raise ImportError(f"hlwq_cuda on a GPU needs Triton 3.5 or later ({error}): pip install triton") from error
    return gpu
