"""PTX of one 128-weight piece of a product on tensor cores: decode straight into mma.sync fragments.

A warp holds 16 rows of the weight. Lane 4 g + t takes chunk t (32 codes) of rows g and g + 8, and chunk t of activation
row g. An mma adds products over K in any order as long as both operands agree, so what a lane decodes is simply what it
contributes to the next step: no shuffle, no shared memory, no reordered weights. A step takes from each lane

    exact  m16n8k16: two half2 of both rows, and two of activations;   eight steps a chunk
    int8   m16n8k32: eight int8 of both rows, and eight of activations; four steps a chunk

(PTX ISA, "Matrix fragments for mma.m16n8k16" and "for mma.m16n8k32".) The sums of a block are scaled and added in
float32: acc += norm * scale * sums. Int8 entries m that stand for m + 1/2 (tables.py) lack half the sum of activations;
a product with a matrix of ones gives that sum where it is needed, cheaper than loading it.
Blocks of 64 or 32 lie in two or one of the four chunks: their sums are separate products, in which the activations of
the other chunks are masked to zero. Tensor cores are idle enough at a few rows to make that the cheapest way.

The texts are for `inline_asm_elementwise` with pack=4: an operand tensor gives a lane four 32-bit registers (two when
its elements are fp16). A lane loads a *group* of four pieces, 512 weights of K, at a time, four words by one load; the
piece that a text serves, and which words of those loads are its own, is baked in.
"""

from __future__ import annotations

from typing import NamedTuple

from hlwq_cuda.kernels import decode
from hlwq_cuda.kernels.layout import PLANES, SIGNED_BITS

MAX_TILES = 4  # registers: 64 hold the activations of a piece
PIECE = 128  # weights of K that one text multiplies: four lanes' chunks
GROUP = 4  # pieces


class Piece(NamedTuple):
    """What a text depends on."""

    bits: int
    int8: bool
    tiles: int  # of eight rows of activations
    sub_blocks: int  # blocks in a piece: 128 / B
    index: int  # of the piece in its group


def plane_tensors(words: int, index: int) -> range:
    """Of the `words` tensors that hold a plane of a group (`words` a chunk), those with words of piece `index`."""
    return range(index * words // GROUP, ((index + 1) * words - 1) // GROUP + 1)


def is_offset(bits: int, int8: bool) -> bool:
    """Whether entries m stand for m + 1/2."""
    return int8 and bits >= SIGNED_BITS


def table_tensors(bits: int, int8: bool) -> int:
    """Tensors of table words: each broadcast from one word, or the lanes' shares of the entries."""
    mode = "int8" if int8 else "exact"
    return (1 + (bits == 8)) if decode.uses_lanes(bits, mode) else len(decode.table_words(bits, mode))


def multiply(piece: Piece) -> tuple[str, str]:
    """(PTX, constraints) of one piece. Operands, each a tensor:

    out: acc f32 [tiles]; element k of a lane is weight row g + 8 (k // 2), activation row 2 t + k % 2.
    in: the words of rows g, g + 8 [planes][2][plane_tensors]; activations [tiles][4, or 2 if int8]; norms fp16 of rows
    g, g + 8 [2]; scales f32 of activation rows 2 t, 2 t + 1 [tiles][2]; masks of the sub-blocks' lanes [sub_blocks], if
    more than one; table [table_tensors]; acc [tiles].
    """
    bits, int8, tiles, sub_blocks, index = piece
    mode = "int8" if int8 else "exact"
    ops = _Operands()
    out = [ops.take("=&f") for _ in range(tiles)]
    words = [[], []]  # of rows g and g + 8
    for size in PLANES[bits]:
        tensors = plane_tensors(size, index)
        for row in words:
            registers = [register for _ in tensors for register in ops.take("r")]
            first = index * size - tensors.start * GROUP
            row.append(registers[first : first + size])
    x = [[register for _ in range(2 if int8 else 4) for register in ops.take("r")] for _ in range(tiles)]
    norms = [ops.take("r", 2) for _ in range(2)]
    scales = [[ops.take("f") for _ in range(2)] for _ in range(tiles)]
    masks = [ops.take("r")[0] for _ in range(sub_blocks)] if sub_blocks > 1 else [None]
    table = [ops.take("r")[0] for _ in range(table_tensors(bits, int8))]
    acc = [ops.take("f") for _ in range(tiles)]

    results = 8 if int8 else 16  # registers that a chunk decodes to
    text = [decode.declarations(bits, mode), _declarations(piece, results)]
    names = ["lane0", "lane1"] if decode.uses_lanes(bits, mode) else [f"t{i}" for i in range(len(table))]
    text += [f"mov.b32 {name}, {word};" for name, word in zip(names, table, strict=False)]
    for row, planes in enumerate(words):
        text += _decode_chunk(bits, mode, planes, [f"w{row}_{i}" for i in range(results)])
    at = index * sub_blocks % GROUP  # first element of the norms and scales of this piece
    for s, mask in enumerate(masks):
        for tile in range(tiles):
            text += _steps(piece, tile, x[tile], mask, results)
            scale = [row[at + s] for row in scales[tile]]
            source = acc[tile] if s == 0 else out[tile]
            text += _scale_and_add(piece, tile, at + s, norms, scale, source, out[tile])
    return "\n".join(["{", *text, "}"]), ",".join(ops.constraints)


class _Operands:
    """Numbers the operands in the order of their constraints: outputs, then inputs."""

    def __init__(self) -> None:
        self.constraints: list[str] = []

    def take(self, constraint: str, count: int = 4) -> list[str]:
        first = len(self.constraints)
        self.constraints += [constraint] * count
        return [f"${number}" for number in range(first, first + count)]


def _declarations(piece: Piece, results: int) -> str:
    words = [f"w{row}_{i}" for row in range(2) for i in range(results)] + ["x0", "x1", "one", "s0", "s1", "s2", "s3"]
    sums = [f"d{tile}_{k}" for tile in range(piece.tiles) for k in range(4)]
    floats = ["norm0", "norm1", "e", "f"]
    if piece.int8:
        words += sums
    else:
        floats += sums
    declared = f".reg .b32 {', '.join(words)}; .reg .f32 {', '.join(floats)}; .reg .b16 low, high;"
    return declared + " mov.b32 one, 0x01010101;"


def _decode_chunk(bits: int, mode: str, planes: list[list[str]], out: list[str]) -> list[str]:
    """The 32 codes of a chunk: one unit, or two at 8 bits."""
    units = 32 // decode.unit_codes(bits)
    text = []
    for unit in range(units):
        for letter, plane in zip("qr", planes, strict=False):
            count = len(plane) // units
            text += [f"mov.b32 {letter}{i}, {plane[unit * count + i]};" for i in range(count)]
        text += decode.decode(bits, mode)
        count = len(out) // units
        result = "v" if mode == "int8" else "p"
        text += [f"mov.b32 {out[unit * count + i]}, {result}{i};" for i in range(count)]
    return text


def _steps(piece: Piece, tile: int, x: list[str], mask: str | None, results: int) -> list[str]:
    """d = weights times activations; s = ones times activations, where the entries need it."""
    d = [f"d{tile}_{k}" for k in range(4)]
    text = []
    for first in range(0, results, 2):
        b = x[first : first + 2]
        if mask:
            text.append(f"and.b32 x0, {b[0]}, {mask}; and.b32 x1, {b[1]}, {mask};")
            b = ["x0", "x1"]
        a = [f"w0_{first}", f"w1_{first}", f"w0_{first + 1}", f"w1_{first + 1}"]
        text.append(_mma(piece.int8, d, a, b, first == 0))
        if is_offset(piece.bits, piece.int8):
            text.append(_mma(True, ["s0", "s1", "s2", "s3"], ["one"] * 4, b, first == 0))
    return text


def _mma(int8: bool, d: list[str], a: list[str], b: list[str], first: bool) -> str:
    shape = "m16n8k32.row.col.s32.s8.s8.s32" if int8 else "m16n8k16.row.col.f32.f16.f16.f32"
    c = ["0" if int8 else "0f00000000"] * 4 if first else d
    operands = ", ".join(f"{{{', '.join(registers)}}}" for registers in (d, a, b, c))
    return f"mma.sync.aligned.{shape} {operands};"


def _scale_and_add(piece: Piece, tile: int, element: int, norms, scale, source, out) -> list[str]:
    """out = source + norm * scale * sums for the four elements of a fragment."""
    text = []
    offset = is_offset(piece.bits, piece.int8)
    for row in range(2):
        part = ("low", "high")[element % 2]
        text.append(f"mov.b32 {{low, high}}, {norms[row][element // 2]}; cvt.f32.f16 norm{row}, {part};")
        if offset:
            text.append(f"mul.f32 norm{row}, norm{row}, 0f3F000000;")  # the sums below are doubled
    for k in range(4):
        sums = f"d{tile}_{k}"
        if offset:
            text.append(f"mad.lo.s32 {sums}, {sums}, 2, s{k};")
        if piece.int8:
            text.append(f"cvt.rn.f32.s32 e, {sums};")
            sums = "e"
        text.append(f"mul.f32 f, norm{k // 2}, {scale[k % 2]}; fma.rn.f32 {out[k]}, {sums}, f, {source[k]};")
    return text
