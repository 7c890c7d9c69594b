"""The custom ops on a GPU: allocate outputs, choose kernels, launch. Signatures as in kernels/plain.py.

Nothing here reads a value from the device or keeps state, so every op can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import cache

import torch
import triton

from hlwq_cuda.kernels import dequantize as dequantize_kernels
from hlwq_cuda.kernels import embedding as embedding_kernels
from hlwq_cuda.kernels import gemm as gemm_kernels
from hlwq_cuda.kernels import gemv as gemv_kernels
from hlwq_cuda.kernels import prefill, prefill_int8
from hlwq_cuda.kernels import rotate as rotate_kernels
from hlwq_cuda.kernels.layout import CHUNK

GLUON_SINCE = (3, 6)  # Gluon is experimental and changes between releases of Triton


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of the GPU; (0, 0) for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def launch_options(device: torch.device) -> dict:
    """Keyword arguments of every launch: programmatic dependent launch where the GPU has it."""
    if capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def has_gluon(version: str) -> bool:
    """Whether this release of Triton has the Gluon that gemv_gluon.py is written in."""
    return tuple(int(part) for part in version.split(".")[:2]) >= GLUON_SINCE


def linear(x, codes, norms, table, bias, bits, block_size, in_features, mode, kernel) -> torch.Tensor:
    """`kernel`: what ops.pick returned."""
    rows = x.reshape(-1, in_features)
    launch = launch_options(x.device)
    out = x.new_empty((len(rows), codes.shape[0]))
    weight = (codes, norms, table, bias)
    if not len(rows):
        return out.view(*x.shape[:-1], codes.shape[0])
    if kernel == "dequantize" or (kernel == "gemm" and not has_gluon(triton.__version__)):
        rotated = rotate_kernels.rotate(rows, block_size, launch)
        prefill.multiply(rotated, *weight, out, bits, block_size)
    elif kernel == "prefill_int8":
        tile = prefill_int8.pick(*out.shape, multiprocessors(x.device), capability(x.device))
        prefill_int8.multiply(rows, *weight, out, bits, block_size, tile, launch)
    else:
        activation = rotate_kernels.quantize_activation(rows, block_size, mode, launch)
        if kernel == "gemv":
            gemv(activation, *weight, out, bits, block_size, mode, launch)
        else:
            gemm(activation, *weight, out, bits, block_size, mode, launch)
    return out.view(*x.shape[:-1], codes.shape[0])


def gemm(activation, codes, norms, table, bias, out, bits, block_size, mode, launch) -> None:
    """A few rotated rows times the weight, into out [M, N]."""
    chunks = norms.shape[-1] * block_size // CHUNK
    config = gemm_kernels.pick(*out.shape, chunks, mode == "int8", multiprocessors(out.device))
    gemm_kernels.gemm(activation, codes, norms, table, bias, out, bits, block_size, mode, config, launch)


def gemv(activation, codes, norms, table, bias, out, bits, block_size, mode, launch) -> None:
    """One rotated row times the weight, into out [N]; the fused decode step calls this."""
    units = norms.shape[-1] * block_size // (CHUNK if bits < 8 else CHUNK // 2)
    config = gemv_kernels.pick(len(codes), units, has_gluon(triton.__version__), multiprocessors(out.device))
    gemv_kernels.gemv(activation, codes, norms, table, bias, out, bits, block_size, mode, config, launch)


def embedding(ids, codes, norms, table, bits, block_size, in_features, dtype) -> torch.Tensor:
    return embedding_kernels.embedding(
        ids, codes, norms, table, bits, block_size, in_features, dtype, launch_options(codes.device)
    )


def rotate(x, block_size) -> torch.Tensor:
    return rotate_kernels.rotate(x, block_size, launch_options(x.device))


def dequantize(codes, norms, table, bits, block_size, in_features, dtype) -> torch.Tensor:
    """The rotation back works on float32: a weight is rounded to `dtype` once."""
    out = norms.new_empty((*codes.shape[:-1], norms.shape[-1] * block_size), dtype=torch.float32)
    flat = (codes.flatten(0, -2), norms.flatten(0, -2), table, out.flatten(0, -2))
    dequantize_kernels.dequantize(*flat, bits, block_size)
    return rotate(out, block_size)[..., :in_features].to(dtype)
