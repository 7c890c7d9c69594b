"""Codes to a matrix in the rotated basis, for products with many rows: the tensor-core library does the rest.

    w[n, k] = norm * entry / sqrt(B), rounded once from float32;  or units[n, k] * step[n], int8 with one step a row

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

from hlwq_cuda.kernels import decode, integers
from hlwq_cuda.kernels.device import round_to_int8
from hlwq_cuda.kernels.tables import entries
from hlwq_cuda.kernels.unpack import load_entries

_UNITS = 128  # a program, of four warps
_PACK = {torch.float16: "cvt.rn.f16x2.f32", torch.bfloat16: "cvt.rn.bf16x2.f32"}


class Sequence(NamedTuple):
    """One unit to words of results, as a text for `inline_asm_elementwise` with pack=1, and what it needs.

    Operands: words of the first plane, of the second; the factor of every entry; table words, or the table's address.
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
    """The Sequence for results of `dtype`: torch.float16, bfloat16 or int8."""
    codes, (first, second) = decode.unit_codes(bits), decode.unit_words(bits)
    results = codes * dtype.itemsize // 4
    names = [f"q{i}" for i in range(first)] + [f"r{i}" for i in range(second)]
    constraints = ["=&r"] * results + ["r"] * len(names)
    text = [decode.declarations(bits, "exact")]
    text += [f"mov.b32 {name}, ${results + i};" for i, name in enumerate(names)]
    factor = f"${len(constraints)}"
    constraints.append("f")
    words = decode.table_words(bits, "exact")
    if words:
        text += [f"mov.b32 t{i}, ${len(constraints) + i};" for i in range(len(words))]
        constraints += ["r"] * len(words)
    else:
        text += decode.load_lanes(bits, f"${len(constraints)}")
        constraints.append("l")
    text += decode.decode(bits, "exact")
    text += _int8_words(results, factor) if dtype == torch.int8 else _half_words(results, factor, _PACK[dtype])
    asm = "\n".join(["{", *text, "}"])
    return Sequence(asm, ",".join(constraints), codes, first, second, results, words.start, len(words))


def _half_words(results: int, factor: str, convert: str) -> list[str]:
    """The pairs p0, p1, ... times the factor, two to a word."""
    out = [".reg .b16 left, right; .reg .f32 fl, fr;"]
    for i in range(results):
        out.append(f"mov.b32 {{left, right}}, p{i}; cvt.f32.f16 fl, left; cvt.f32.f16 fr, right;")
        out.append(f"mul.f32 fl, fl, {factor}; mul.f32 fr, fr, {factor}; {convert} ${i}, fr, fl;")
    return out


def _int8_words(results: int, factor: str) -> list[str]:
    """The same rounded to int8, four to a word. Adding 1.5 * 2**23 leaves the integer in the low byte of a float."""
    out = [".reg .b16 left, right; .reg .f32 fl, fr; .reg .b32 il, ir;"]
    for i in range(results):
        for pair, name in ((2 * i, "lo"), (2 * i + 1, "hi")):
            out.append(f"mov.b32 {{left, right}}, p{pair}; cvt.f32.f16 fl, left; cvt.f32.f16 fr, right;")
            out += [f"fma.rn.f32 {half}, {half}, {factor}, 0f4B400000;" for half in ("fl", "fr")]
            out.append(f"mov.b32 il, fl; mov.b32 ir, fr; prmt.b32 {name}, il, ir, 0x0040;")
        out.append(f"prmt.b32 ${i}, lo, hi, 0x5410;")
    return out


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
        columns = min(1024, integers.next_power_of_2(out.shape[1]))
        grid = (len(out), integers.cdiv(out.shape[1], columns))
        dequantize_plain_kernel[grid](codes, norms, table, out, out.shape[1], block_size, bits, columns)
        return
    text = sequence(bits, out.dtype)
    total = out.numel() // text.codes
    dequantize_kernel[(integers.cdiv(total, _UNITS),)](
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


def dequantize_int8(
    codes: torch.Tensor,  # int32 [N, Kp * bits / 32]
    norms: torch.Tensor,  # float16 [N, Kp / B]
    table: torch.Tensor,
    units: torch.Tensor,  # int8 [N, Kp]
    steps: torch.Tensor,  # float32 [N]
    bits: int,
    block_size: int,
    ptx: bool = True,
) -> None:
    """units * steps = norm * entry / sqrt(B) to the nearest unit: the largest norm and entry of a row give 127."""
    rows, width = units.shape
    text = sequence(bits, torch.int8)
    per_row = width // text.codes
    program = min(_UNITS, integers.next_power_of_2(per_row))
    shape = {"KP": width, "B": block_size, "BITS": bits, "LARGEST": entries(bits) - 1, "UNITS": program, "PTX": ptx}
    shape |= {name.upper(): getattr(text, name) for name in Sequence._fields}
    grid = (rows, integers.cdiv(per_row, program))
    dequantize_int8_kernel[grid](
        codes, norms, table, units.view(torch.int32) if ptx else units, steps, **shape, num_warps=max(1, program // 32)
    )


@triton.jit
def _decode(
    row,  # the first word of the unit's row
    place,  # [UNITS], of the unit in its row
    inside,
    factor,  # float32 [UNITS]
    table,
    UNITS_PER_ROW: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    RESULTS: tl.constexpr,
    TABLE_START: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
):
    """The results of every unit, one after the other: int32 [UNITS * RESULTS]."""
    operands = ()
    for i in tl.static_range(FIRST):
        operands = operands + (tl.load(row + place * FIRST + i, mask=inside, other=0),)
    for i in tl.static_range(SECOND):
        operands = operands + (tl.load(row + UNITS_PER_ROW * FIRST + place * SECOND + i, mask=inside, other=0),)
    operands = operands + (factor,)
    for i in tl.static_range(TABLE_WORDS):
        operands = operands + (tl.load(table + TABLE_START + i),)
    if TABLE_WORDS == 0:
        operands = operands + (table.to(tl.int64),)
    words = tl.inline_asm_elementwise(ASM, CONSTRAINTS, operands, dtype=(tl.int32,) * RESULTS, is_pure=True, pack=1)
    return tl.reshape(_join(words, RESULTS), (place.shape[0] * RESULTS,))


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
    norm = tl.load(norms + unit * CODES // B, mask=inside, other=0.0)
    place = (row, unit % UNITS_PER_ROW, inside, norm.to(tl.float32) * SCALE, table)
    joined = _decode(*place, UNITS_PER_ROW, FIRST, SECOND, RESULTS, TABLE_START, TABLE_WORDS, ASM, CONSTRAINTS)
    at = tl.program_id(0).to(tl.int64) * (UNITS * RESULTS) + tl.arange(0, UNITS * RESULTS)
    tl.store(out + at, joined, mask=at < total * RESULTS)


@triton.jit
def dequantize_int8_kernel(
    codes,  # int32 [N, KP * BITS / 32]
    norms,  # fp16 [N, KP / B]
    table,
    out,  # int8 [N, KP], seen as int32 if PTX
    steps,  # float32 [N]
    KP: tl.constexpr,
    B: tl.constexpr,
    BITS: tl.constexpr,
    LARGEST: tl.constexpr,  # the last entry of the table
    UNITS: tl.constexpr,
    PTX: tl.constexpr,
    ASM: tl.constexpr,  # and the rest of a Sequence
    CONSTRAINTS: tl.constexpr,
    CODES: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    RESULTS: tl.constexpr,
    TABLE_START: tl.constexpr,
    TABLE_WORDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = KP // B
    every = tl.arange(0, triton.next_power_of_2(blocks))
    norms += row * blocks
    largest = tl.max(tl.load(norms + every, mask=every < blocks, other=0.0).to(tl.float32), 0)
    largest *= tl.load(table.to(tl.pointer_type(tl.float16)) + LARGEST).to(tl.float32)
    if tl.program_id(1) == 0:
        tl.store(steps + row, largest * (B**-0.5 / 127))
    factor = tl.where(largest > 0, 127 / largest, 0.0)

    per_row: tl.constexpr = KP // CODES
    place = tl.program_id(1) * UNITS + tl.arange(0, UNITS)
    inside = place < per_row
    factor *= tl.load(norms + place * CODES // B, mask=inside, other=0.0).to(tl.float32)
    if PTX:
        where = (codes + row * (per_row * (FIRST + SECOND)), place, inside, factor, table)
        joined = _decode(*where, per_row, FIRST, SECOND, RESULTS, TABLE_START, TABLE_WORDS, ASM, CONSTRAINTS)
        at = tl.program_id(1) * (UNITS * RESULTS) + tl.arange(0, UNITS * RESULTS)
        tl.store(out + row * (per_row * RESULTS) + at, joined, mask=at < per_row * RESULTS)
    else:
        k = place[:, None] * CODES + tl.arange(0, CODES)[None, :]
        w = load_entries(codes, table, row, k, inside[:, None] & (k >= 0), KP * BITS // 32, BITS, False)
        rounded = round_to_int8(w * factor[:, None], 1.0)
        tl.store(out + row * KP + k, rounded.to(tl.int8), mask=inside[:, None] & (k >= 0))


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
