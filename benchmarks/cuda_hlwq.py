"""Our own layers for the kernel benchmark: a weight encoded on the GPU, its copies, and the calls to time."""

from __future__ import annotations

import torch

from benchmarks.cuda_peers import Entry
from benchmarks.cuda_timing import copies_for
from convert.codebook import codebook
from hlwq_cuda import gpu
from hlwq_cuda.kernels import rotate
from hlwq_cuda.kernels.layout import pack_codes
from hlwq_cuda.kernels.tables import make_table

MANY_ROWS = 65  # from here on a call is the whole op, rotation included; below, the fused step rotates beforehand
_ENCODED_ROWS = 4096  # at a time: bounds the temporary memory
TOLERANCE = {2: 0.45, 3: 0.25, 4: 0.13, 5: 0.07, 6: 0.05, 8: 0.03}  # a third above the error of the codebook


def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """H_B, float32 [B, B]."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5


def encode(weight: torch.Tensor, bits: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain encoder of docs/format.md: [N, K], K whole blocks -> uint8 codes [N, K], fp16 norms [N, K / B]."""
    table = torch.tensor(codebook(bits), device=weight.device)
    edges = (table[1:] + table[:-1]) / 2
    codes, norms = [], []
    for rows in weight.split(_ENCODED_ROWS):
        rotated = rows.float().view(len(rows), -1, block_size) @ hadamard(block_size, rows.device)
        norm = rotated.norm(dim=-1)
        normal = rotated * (block_size**0.5 / norm)[..., None]
        codes.append(torch.bucketize(normal, edges).to(torch.uint8).view(len(rows), -1))
        norms.append(norm.half())
    return torch.cat(codes), torch.cat(norms)


def hlwq(weight: torch.Tensor, x: torch.Tensor, mode: str, bits: int = 4, block_size: int = 128) -> Entry:
    """The kernel that ops.linear chooses for so many rows: from rotated activations, or the whole op for many rows."""
    (n, k), m = weight.shape, len(x)
    codes, norms = encode(weight, bits, block_size)
    table = make_table(codebook(bits), bits).cuda()
    packed = torch.cat([pack_codes(part, bits) for part in codes.split(_ENCODED_ROWS)])
    del codes
    size = packed.nbytes + norms.nbytes
    copies = [(packed.clone(), norms.clone()) for _ in range(copies_for(size))]
    arguments = (table, None, bits, block_size)
    if m >= MANY_ROWS:
        linear = torch.ops.hlwq.linear
        return Entry(size, [lambda c=c: linear(x, *c, *arguments, k, mode) for c in copies], TOLERANCE[bits])
    launch = gpu.launch_options(x.device)
    activation = rotate.quantize_activation(x, block_size, mode, launch)
    out = x.new_empty((m, n))
    kernel = gpu.gemv if m == 1 else gpu.gemm

    def call(packed: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        kernel(activation, packed, norms, table, None, out, bits, block_size, mode, launch)
        return out

    return Entry(size, [lambda c=c: call(*c) for c in copies], TOLERANCE[bits])
