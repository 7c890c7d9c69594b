"""Codes to a matrix in the rotated basis, for products with many rows: the tensor-core library does the rest.

    w[n, k] = norm * entry / sqrt(B), rounded once from float32

A program decodes UNITS units (decode.py), wherever rows begin: a row is a whole number of units and of blocks, so that
units, norms and results are flat arrays; only the planes of the codes need the row. The results of a unit are spread
over registers of one lane and would be written 4 bytes at a time, 64 bytes apart; joined to one tensor they are
exchanged through shared memory and written 16 bytes at a time, which was twice as fast on an H200.

Two bodies: PTX sequences, and a readable twin that fetches the word of every code anew (interpreter, float32 results).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hlwq_cuda.kernels import decode
from hlwq_cuda.kernels.unpack import load_entries

_UNITS = 128  # a program, of four warps
_PACK = {torch.float16: "cvt.rn.f16x2.f32", torch.bfloat16: "cvt.rn.bf16x2.f32"}


class Sequence(NamedTuple):
    """One unit to words of results, as a text for `inline_asm_elementwise` with pack=1, and what it needs.

    Operands: words of the first plane, of the second; the norm; table words, or the table's address.
    """

    asm: str
    constraints: str
    codes: int  # of a unit
    first: int  # words of a unit in the first plane
    second: int  # and in the second
    results: int  # words
    table_start: int
    table_words: int  # 0: the operand is the address


@cache
def sequence(bits: int, dtype: torch.dtype) -> Sequence:
    """The Sequence for results of `dtype`: torch.float16 or bfloat16."""
    codes, (first, second) = decode.unit_codes(bits), decode.unit_words(bits)
    results = codes // 2
    names = [f"q{i}" for i in range(first)] + [f"r{i}" for i in range(second)]
    constraints = ["=&r"] * results + ["r"] * len(names)
    text = [decode.declarations(bits, "exact")]
    text += [f"mov.b32 {name}, ${results + i};" for i, name in enumerate(names)]
    norm = f"${len(constraints)}"
    constraints.append("f")
    text.append(".reg .b16 left, right; .reg .f32 fl, fr;")
    words = decode.table_words(bits, "exact")
    if words:
        text += [f"mov.b32 t{i}, ${len(constraints) + i};" for i in range(len(words))]
        constraints += ["r"] * len(words)
    else:
        text += decode.load_lanes(bits, f"${len(constraints)}")
        constraints.append("l")
    text += decode.decode(bits, "exact")
    for i in range(results):
        text.append(f"mov.b32 {{left, right}}, p{i}; cvt.f32.f16 fl, left; cvt.f32.f16 fr, right;")
        text.append(f"mul.f32 fl, fl, {norm}; mul.f32 fr, fr, {norm}; {_PACK[dtype]} ${i}, fr, fl;")
    asm = "\n".join(["{", *text, "}"])
    return Sequence(asm, ",".join(constraints), codes, first, second, results, words.start, len(words))


def dequantize(
    codes: torch.Tensor,  # int32 [N, Kp * bits / 32]
    norms: torch.Tensor,  # float16 [N, Kp / B]
    table: torch.Tensor,
    out: torch.Tensor,  # [N, Kp]: float16, bfloat16 or float32
    bits: int,
    block_size: int,
    ptx: bool = True,
) -> None:
    """out = norm * entry / sqrt(B), in the rotated basis."""
    if not ptx or out.dtype == torch.float32:
        columns = min(1024, triton.next_power_of_2(out.shape[1]))
        grid = (len(out), triton.cdiv(out.shape[1], columns))
        dequantize_plain_kernel[grid](codes, norms, table, out, out.shape[1], block_size, bits, columns)
        return
    text = sequence(bits, out.dtype)
    total = out.numel() // text.codes
    dequantize_kernel[(triton.cdiv(total, _UNITS),)](
        codes,
        norms,
        table,
        out.view(torch.int32),
        total,
        UNITS_PER_ROW=out.shape[1] // text.codes,
        CODES=text.codes,
        FIRST=text.first,
        SECOND=text.second,
        RESULTS=text.results,
        TABLE_START=text.table_start,
        TABLE_WORDS=text.table_words,
        ASM=text.asm,
        CONSTRAINTS=text.constraints,
        B=block_size,
        SCALE=block_size**-0.5,
        UNITS=_UNITS,
    )


@triton.jit
def dequantize_kernel(
    codes,  # int32 [N, UNITS_PER_ROW * (FIRST + SECOND)]
    norms,  # fp16 [N, Kp / B]
    table,
    out,  # [N, Kp], seen as int32
    total,  # units of the whole matrix
    UNITS_PER_ROW: tl.constexpr,
    CODES: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    RESULTS: tl.constexpr,
    TABLE_START: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    B: tl.constexpr,
    SCALE: tl.constexpr,
    UNITS: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    inside = unit < total
    row = codes + unit // UNITS_PER_ROW * (UNITS_PER_ROW * (FIRST + SECOND))
    place = unit % UNITS_PER_ROW
    operands = ()
    for i in tl.static_range(FIRST):
        operands = operands + (tl.load(row + place * FIRST + i, mask=inside, other=0),)
    for i in tl.static_range(SECOND):
        operands = operands + (tl.load(row + UNITS_PER_ROW * FIRST + place * SECOND + i, mask=inside, other=0),)
    norm = tl.load(norms + unit * CODES // B, mask=inside, other=0.0)
    operands = operands + (norm.to(tl.float32) * SCALE,)
    for i in tl.static_range(TABLE_WORDS):
        operands = operands + (tl.load(table + TABLE_START + i),)
    if TABLE_WORDS == 0:
        operands = operands + (table.to(tl.int64),)
    words = tl.inline_asm_elementwise(ASM, CONSTRAINTS, operands, dtype=(tl.int32,) * RESULTS, is_pure=True, pack=1)
    joined = tl.reshape(_join(words, RESULTS), (UNITS * RESULTS,))
    at = tl.program_id(0).to(tl.int64) * (UNITS * RESULTS) + tl.arange(0, UNITS * RESULTS)
    tl.store(out + at, joined, mask=at < total * RESULTS)


@triton.jit
def _join(words, COUNT: tl.constexpr):
    """COUNT tensors [UNITS], a power of two of them -> [UNITS, COUNT]."""
    if COUNT == 1:
        joined = tl.expand_dims(words[0], 1)
    else:
        even = ()
        odd = ()
        for i in tl.static_range(COUNT // 2):
            even = even + (words[2 * i],)
            odd = odd + (words[2 * i + 1],)
        pairs = tl.join(_join(even, COUNT // 2), _join(odd, COUNT // 2))
        joined = tl.reshape(pairs, (pairs.shape[0], COUNT))
    return joined


@triton.jit
def dequantize_plain_kernel(
    codes,
    norms,
    table,
    out,  # [N, KP]
    KP: tl.constexpr,
    B: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    w = load_entries(codes, table, row, k, k < KP, KP * BITS // 32, BITS, False)
    w *= tl.load(norms + row * (KP // B) + k // B, mask=k < KP, other=0.0).to(tl.float32) * B**-0.5
    tl.store(out + row * KP + k, w.to(out.dtype.element_ty), mask=k < KP)
