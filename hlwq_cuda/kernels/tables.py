"""A checkpoint's codebook in the forms that kernels read: one small int32 tensor a layer (plain torch).

With E entries (all 2**bits centroids at 2 and 3 bits; the 2**(bits-1) positive ones from 4 bits on, ascending):

    words                content
    E / 2                the entries as fp16, two a word
    E / 4                their low bytes, four a word (operands of prmt)
    E / 4                their high bytes
    E / 4                the entries as int8, for int8 activations            (up to 5 bits)
    1                    the int8 step: the value of one unit, as float32     (up to 5 bits)

At 2 and 3 bits an int8 entry is v and stands for v * step. From 4 bits on it is a magnitude m and stands for
(m + 1/2) * step: flipping all bits of m gives -m - 1, which stands for -(m + 1/2) * step, so that a sign costs one xor.
What a dot product then lacks, step / 2 * sum(x), depends on the activations alone and is added from their sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hlwq_cuda.kernels.layout import SIGNED_BITS

INT8_MAX_BITS = 5  # rounding the centroids to int8 adds 7 % to the squared error at 6 bits
_SCALES = 2048  # candidate steps; the error varies smoothly, so a fine scan is enough


def entries(bits: int) -> int:
    """E, the number of table entries."""
    return 1 << (bits if bits < SIGNED_BITS else bits - 1)


def make_table(codebook: Sequence[float], bits: int) -> torch.Tensor:
    """The ascending `codebook` of 2**bits centroids -> int32 [see above]. ValueError when it is not symmetric."""
    values = [float(value) for value in codebook]
    if len(values) != 1 << bits or any(low != -high for low, high in zip(values, reversed(values), strict=True)):
        raise ValueError(f"the {bits}-bit codebook is not {1 << bits} values symmetric about zero; convert again")
    table = torch.tensor(values if bits < SIGNED_BITS else values[len(values) // 2 :], dtype=torch.float64)
    half = table.to(torch.float16)
    low_high = half.view(torch.uint8).view(-1, 2)
    parts = [half, low_high[:, 0], low_high[:, 1]]
    if bits <= INT8_MAX_BITS:
        units, step = int8_entries(values, bits)
        parts += [units, torch.tensor([step], dtype=torch.float32)]
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts]).view(torch.int32)


def float_entries(table: torch.Tensor, bits: int, mode: str) -> torch.Tensor:
    """All 2**bits centroids as kernels see them, float32 ascending: rounded to fp16, or int8 units times the step."""
    count = entries(bits)
    if mode == "exact":
        positive = table[: count // 2].view(torch.float16).float()
    else:
        units = table[count : count + count // 4].view(torch.int8).float()
        step = table[count + count // 4 :].view(torch.float32)
        positive = (units if bits < SIGNED_BITS else units + 0.5) * step
    return positive if bits < SIGNED_BITS else torch.cat([-positive.flip(0), positive])


def int8_entries(codebook: Sequence[float], bits: int) -> tuple[torch.Tensor, float]:
    """The int8 entries and the step that add least squared error, each centroid weighted by the mass of its cell."""
    centroids = torch.tensor(codebook, dtype=torch.float64)
    edges = (centroids[1:] + centroids[:-1]) / 2
    cdf = torch.cat([torch.zeros(1), torch.special.ndtr(edges), torch.ones(1)]).double()
    offset = 0.0 if bits < SIGNED_BITS else 0.5
    first = 0 if bits < SIGNED_BITS else len(codebook) // 2
    table, mass = centroids[first:], cdf.diff()[first:]
    largest = 127.0 + offset
    steps = float(table[-1]) / torch.linspace(largest / 2, largest, _SCALES, dtype=torch.float64)
    units = torch.round(table / steps[:, None] - offset)
    errors = (((units + offset) * steps[:, None] - table) ** 2 * mass).sum(-1)
    best = int(errors.argmin())
    return units[best].to(torch.int8), float(steps[best])
