"""Executes the few PTX instructions that hlwq_cuda/kernels/decode.py and mma.py use, one warp at a time, in numpy.

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

    def value(name: str):
        if name.startswith("{"):
            return [value(part) for part in _names(name)]
        if name.startswith("0f"):
            return np.full(shape, int(name[2:], 16), U32)
        return np.full(shape, int(name, 0), U32) if name[0].isdigit() else state[name]

    for statement in " ".join(statements).split(";"):
        opcode, _, operands = statement.strip().partition(" ")
        if not opcode or opcode.startswith("."):
            continue
        destination, *sources = re.findall(r"\{[^}]*\}|[^,\s]+", operands)
        if destination.startswith("{") and opcode == "mov.b32":  # splits a register in two halves
            opcode = "split"
        result = _EXECUTE[opcode](*map(value, sources))
        if destination.startswith("{"):
            state.update(zip(_names(destination), result, strict=True))
        else:
            state[destination] = result
    return state


def _names(group: str) -> list[str]:
    return [part.strip() for part in group.strip("{}").split(",")]


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


def float32(function):
    """Lift a function of float64 arrays to registers that hold float32, rounded once."""

    def execute(*words):
        return function(*(w.view(np.float32).astype(np.float64) for w in words)).astype(np.float32).view(U32)

    return execute


def mma(element, result):
    """mma.m16n8kK of the elements of a register, K = 8 a register (PTX ISA, "Matrix fragments for mma").

    Lane 4 g + t holds, in registers of A: rows g, g + 8, g, g + 8, the latter two half of K further on; of B: column g;
    of C and D: row g + 8 (k // 2), column 2 t + k % 2. Sums are exact for int8, and far better than a GPU's for fp16.
    """
    width = 4 // np.dtype(element).itemsize
    g, t = np.divmod(np.arange(32), 4)

    def execute(a, b, c):
        samples = len(a[0])
        left, right = np.zeros((samples, 16, 8 * width)), np.zeros((samples, 8 * width, 8))
        elements = [np.ascontiguousarray(w).view(element).reshape(samples, 32, width) for w in (*a, *b)]
        for e in range(width):
            for register in range(4):
                left[:, g + 8 * (register % 2), register // 2 * 4 * width + t * width + e] = elements[register][..., e]
            for register in range(2):
                right[:, register * 4 * width + t * width + e, g] = elements[4 + register][..., e]
        product = left @ right
        sums = [product[:, g + 8 * (k // 2), 2 * t + k % 2] + c[k].view(result) for k in range(4)]
        return [total.astype(result).view(U32) for total in sums]

    return execute


_EXECUTE = {
    "split": lambda a: [a & U32(0xFFFF), a >> U32(16)],
    "cvt.f32.f16": lambda a: a.astype(np.uint16).view(np.float16).astype(np.float32).view(U32),
    "cvt.rn.f32.s32": lambda a: a.view(np.int32).astype(np.float32).view(U32),
    "add.f32": float32(lambda a, b: a + b),
    "mul.f32": float32(lambda a, b: a * b),
    "fma.rn.f32": float32(lambda a, b, c: a * b + c),  # the product is exact in float64
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": mma(np.float16, np.float32),
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32": mma(np.int8, np.int32),
    "mov.b32": lambda a: a.copy(),
    "mov.f32": lambda a: a.copy(),
    "add.s32": lambda a, b: a + b,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "shf.l.wrap.b32": lambda low, high, n: (high << (n & U32(31))) | (low >> (U32(32) - (n & U32(31)))),
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "mad.lo.s32": lambda a, b, c: a * b + c,  # the low word does not know signs
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "shfl.sync.idx.b32": shfl_idx,
    "dp4a.s32.s32": dp4a,
    "mul.rn.f16x2": half2(lambda a, b: a * b),
    "fma.rn.f16x2": half2(_fma),
    "add.rn.f16x2": half2(lambda a, b: a + b),
}
