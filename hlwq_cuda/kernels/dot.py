"""One unit of codes against its activations, as texts for `inline_asm_elementwise` (strings only; no triton).

Operand tensors have the shape [rows, units, W], W the words of a unit in the first plane, and `pack` is W: a text
serves the W elements that a lane holds of every operand. Word m of what has more than W words is element m % W of
tensor m // W: the entries, and the activations that they meet (four int8 or two fp16 a word).

    whole     first plane, one int32 tensor; second plane, a tensor for each of its words, equal along the last axis;
              activations; table: the scalars that decode.table_words names, or its address where decode.uses_lanes
              -> the dot product in element 0, float32
    decoder   first plane, second plane, table -> entries, int32
    product   entries, activations -> the dot product in element 0, float32

Decoding apart lets a kernel decode before it has activations. A lane must hold the same elements in both texts, which
Gluon's fixed layouts guarantee; plain Triton chooses layouts itself, and gets the whole.
An fp16 sum has eight terms below 2 * largest centroid (plain.quantize_activation scales activations below 1), then
sums go on in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from hlwq_cuda.kernels import decode
from hlwq_cuda.kernels.layout import PLANES
from hlwq_cuda.kernels.tables import INT8_MAX_BITS

KINDS = [(bits, mode) for bits in PLANES for mode in ("exact", "int8") if mode == "exact" or bits <= INT8_MAX_BITS]


@dataclass(frozen=True)
class Dot:
    """The texts and what a kernel must load for them."""

    whole: tuple[str, str]  # (PTX, constraints)
    decoder: tuple[str, str]
    product: tuple[str, str]
    codes: int  # of a unit
    width: int  # W: words of a unit in the first plane
    second: int  # words of a unit in the second plane
    activations: int  # words of a unit's activations, and of its entries
    table_start: int  # the table words that are operands: from here,
    table_words: int  # so many; 0: the operand is the table's address
    step_word: int  # where the table holds the int8 step


def describe(bits: int, mode: str) -> Dot:
    """The Dot of a width and mode."""
    words = decode.table_words(bits, mode)
    activations = decode.unit_codes(bits) // (4 if mode == "int8" else 2)
    width, second = decode.unit_words(bits)
    texts = whole(bits, mode), decoder(bits, mode), product(activations, width, mode)
    return Dot(*texts, decode.unit_codes(bits), width, second, activations, words.start, len(words), words.stop)


def whole(bits: int, mode: str) -> tuple[str, str]:
    """(text, constraints) of codes times activations."""
    width, _ = decode.unit_words(bits)
    operands = _Operands(["=&f"] * width, width)
    operands.take_codes(bits)
    entries = _entries(bits, mode)
    activations = [operands.take() for _ in range(len(entries) // width)]
    operands.take_table(bits, mode)
    lines = [decode.declarations(bits, mode), *operands.moves, *decode.decode(bits, mode)]
    lines += _sum(entries, [register for tensor in activations for register in tensor], width, mode)
    return "\n".join(["{", *lines, "}"]), ",".join(operands.constraints)


def decoder(bits: int, mode: str) -> tuple[str, str]:
    """(text, constraints) of codes -> entries."""
    width, _ = decode.unit_words(bits)
    entries = _entries(bits, mode)
    operands = _Operands(["=&r"] * len(entries), width)
    operands.take_codes(bits)
    operands.take_table(bits, mode)
    results = [f"mov.b32 ${word}, {entry};" for word, entry in enumerate(entries)]
    lines = ["{", decode.declarations(bits, mode), *operands.moves, *decode.decode(bits, mode), *results, "}"]
    return "\n".join(lines), ",".join(operands.constraints)


def product(words: int, width: int, mode: str) -> tuple[str, str]:
    """(text, constraints) of entries times activations, `words` words of each."""
    operands = _Operands(["=&f"] * width, width)
    entries, activations = ([register for _ in range(words // width) for register in operands.take()] for _ in range(2))
    lines = ["{", ".reg .b32 a, b;", *_sum(entries, activations, width, mode), "}"]
    return "\n".join(lines), ",".join(operands.constraints)


class _Operands:
    """Numbers the operands, `width` registers each, and moves codes and table to the registers that decode names."""

    def __init__(self, outputs: list[str], width: int) -> None:
        self.constraints, self.width = outputs, width
        self.moves: list[str] = []

    def take(self, constraint: str = "r") -> list[str]:
        first = len(self.constraints)
        self.constraints += [constraint] * self.width
        return [f"${first + element}" for element in range(self.width)]

    def take_codes(self, bits: int) -> None:
        self.moves += [f"mov.b32 q{word}, {register};" for word, register in enumerate(self.take())]
        _, second = decode.unit_words(bits)
        self.moves += [f"mov.b32 r{word}, {self.take()[0]};" for word in range(second)]

    def take_table(self, bits: int, mode: str) -> None:
        if decode.uses_lanes(bits, mode):
            self.moves += decode.load_lanes(bits, self.take("l")[0])
        self.moves += [f"mov.b32 t{i}, {self.take()[0]};" for i in range(len(decode.table_words(bits, mode)))]


def _entries(bits: int, mode: str) -> list[str]:
    """The registers that decode.decode fills."""
    codes = decode.unit_codes(bits)
    return [f"v{word}" for word in range(codes // 4)] if mode == "int8" else [f"p{word}" for word in range(codes // 2)]


def _sum(entries: list[str], activations: list[str], width: int, mode: str) -> list[str]:
    """The dot product in $0; nothing in the other elements."""
    body = (_int8_sum if mode == "int8" else _fp16_sum)(entries, activations)
    return [*body, *(f"mov.f32 ${element}, 0f00000000;" for element in range(1, width))]


def _int8_sum(entries: list[str], activations: list[str]) -> list[str]:
    """Two chains of dp4a: half the latency of one."""
    half = len(entries) // 2
    out = []
    for chain, first in (("a", 0), ("b", half)):
        for m in range(first, first + half):
            out.append(f"dp4a.s32.s32 {chain}, {entries[m]}, {activations[m]}, {chain if m > first else 0};")
    return [*out, "add.s32 a, a, b; cvt.rn.f32.s32 $0, a;"]


def _fp16_sum(entries: list[str], activations: list[str]) -> list[str]:
    """Two chains of packed fp16 products, eight terms in each half, then float32."""
    out = [f"mul.rn.f16x2 {chain}, {entries[m]}, {activations[m]};" for m, chain in enumerate("ab")]
    for m in range(2, len(entries)):
        chain = "ab"[m % 2]
        out.append(f"fma.rn.f16x2 {chain}, {entries[m]}, {activations[m]}, {chain};")
    out.append("add.rn.f16x2 a, a, b; .reg .b16 h0, h1; .reg .f32 f0, f1; mov.b32 {h0, h1}, a;")
    return [*out, "cvt.f32.f16 f0, h0; cvt.f32.f16 f1, h1; add.f32 $0, f0, f1;"]
