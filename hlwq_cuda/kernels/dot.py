"""One unit of codes against its activations, as texts for `inline_asm_elementwise` (strings only; no triton).

Two texts, so that a kernel can decode before it has activations: `decoder` makes entries of codes, `product` multiplies
them. Operand tensors have the shape [rows, units, W], W the words of a unit in the first plane, and `pack` is W: a text
serves the W elements that a lane holds of every operand. Word m of what has more than W words is element m % W of
tensor m // W: the entries, and the activations that they meet (four int8 or two fp16 a word).

    decoder   first plane, one int32 tensor; second plane, a tensor for each of its words, equal along the last axis;
              table: the scalars that decode.table_words names, or the table's address where decode.uses_lanes
              -> entries, int32
    product   entries, activations -> the dot product in element 0, float32

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

    decoder: tuple[str, str]  # (PTX, constraints)
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
    texts = decoder(bits, mode), product(activations, width, mode)
    return Dot(*texts, decode.unit_codes(bits), width, second, activations, words.start, len(words), words.stop)


def decoder(bits: int, mode: str) -> tuple[str, str]:
    """(text, constraints) of codes -> entries."""
    width, second = decode.unit_words(bits)
    letter, count = ("v", decode.unit_codes(bits) // 4) if mode == "int8" else ("p", decode.unit_codes(bits) // 2)
    constraints = ["=&r"] * count
    moves = []

    def take(name: str, used: int = 1) -> None:
        """The next operand tensor: its first `used` elements go to registers."""
        for element in range(used):
            moves.append(f"mov.b32 {name.format(element)}, ${len(constraints) + element};")
        constraints.extend(["r"] * width)

    take("q{}", used=width)
    for word in range(second):
        take(f"r{word}")
    if decode.uses_lanes(bits, mode):
        moves += decode.load_lanes(bits, f"${len(constraints)}")
        constraints.extend(["l"] * width)
    for word in range(len(decode.table_words(bits, mode))):
        take(f"t{word}")
    results = [f"mov.b32 ${word}, {letter}{word};" for word in range(count)]
    lines = ["{", decode.declarations(bits, mode), *moves, *decode.decode(bits, mode), *results, "}"]
    return "\n".join(lines), ",".join(constraints)


def product(words: int, width: int, mode: str) -> tuple[str, str]:
    """(text, constraints) of entries times activations, `words` words of each."""
    entries = [f"${width + word}" for word in range(words)]
    activations = [f"${width + words + word}" for word in range(words)]
    body = (_int8_sum if mode == "int8" else _fp16_sum)(entries, activations)
    rest = [f"mov.f32 ${element}, 0f00000000;" for element in range(1, width)]
    constraints = ["=&f"] * width + ["r"] * (2 * words)
    return "\n".join(["{ .reg .b32 a, b;", *body, *rest, "}"]), ",".join(constraints)


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
