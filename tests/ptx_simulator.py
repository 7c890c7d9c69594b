"""Executes the few PTX instructions that hlwq_cuda/kernels/decode.py uses, one warp at a time, in numpy.

A register is an array uint32 [samples, 32 lanes]; the meaning of each instruction is that of the PTX ISA 8.x manual.
Emulation: it shows that the sequences compute what they should, not what a GPU's assembler makes of them.
"""

from __future__ import annotations

import re

import numpy as np

U32 = np.uint32


def run(statements: list[str], registers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run `;`-separated statements on a copy of `registers`; names that start with a digit are integers."""
    state = {name: value.astype(U32) for name, value in registers.items()}
    shape = next(iter(state.values())).shape
    for statement in " ".join(statements).split(";"):
        words = statement.replace(",", " ").split()
        if not words or words[0].startswith("."):
            continue
        opcode, destination, *sources = words
        values = [np.full(shape, int(s, 0), U32) if re.match(r"\d", s) else state[s] for s in sources]
        state[destination] = _EXECUTE[opcode](*values)
    return state


def prmt(a, b, selector):
    """Byte i of the result: byte (s & 7) of b:a, or its sign over the whole byte when bit 3 of s is set."""
    pair = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> U32(4 * i) & U32(15)
        byte = (pair >> (np.uint64(8) * (nibble & U32(7)).astype(np.uint64)) & np.uint64(255)).astype(U32)
        byte = np.where(nibble & U32(8), np.where(byte & U32(128), U32(255), U32(0)), byte)
        result |= byte << U32(8 * i)
    return result


def lop3(a, b, c, table):
    """The truth table's bit number 4 a + 2 b + c, for every bit."""
    result = np.zeros_like(a)
    for index in range(8):
        chosen = np.full_like(a, 0xFFFFFFFF)
        for source, bit in ((a, 4), (b, 2), (c, 1)):
            chosen &= source if index & bit else ~source
        result |= np.where(table >> U32(index) & U32(1), chosen, U32(0))
    return result


def shfl_idx(value, lane, clamp, mask):
    """The whole warp takes part: lane number modulo 32."""
    assert (clamp == 31).all() and (mask == 0xFFFFFFFF).all()
    return np.take_along_axis(value, (lane & U32(31)).astype(np.int64), axis=-1)


def dp4a(a, b, c):
    """Four signed byte products added to c."""
    a, b = (np.ascontiguousarray(x).view(np.int8).reshape(*x.shape, 4).astype(np.int32) for x in (a, b))
    return (c.view(np.int32) + (a * b).sum(-1, dtype=np.int32)).view(U32)


def half2(function):
    """Lift a function of fp16 arrays to words of two."""

    def execute(*words):
        halves = [np.ascontiguousarray(w).view(np.float16).reshape(*w.shape, 2) for w in words]
        return np.ascontiguousarray(function(*halves)).view(U32).reshape(words[0].shape)

    return execute


def _fma(a, b, c):  # a product of two fp16 is exact in float64, and so is its sum with a third (within range)
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float16)


_EXECUTE = {
    "mov.b32": lambda a: a.copy(),
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "shf.l.wrap.b32": lambda low, high, n: (high << (n & U32(31))) | (low >> (U32(32) - (n & U32(31)))),
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "shfl.sync.idx.b32": shfl_idx,
    "dp4a.s32.s32": dp4a,
    "mul.rn.f16x2": half2(lambda a, b: a * b),
    "fma.rn.f16x2": half2(_fma),
    "add.rn.f16x2": half2(lambda a, b: a + b),
}
