"""Codes to values as PTX: the instruction sequences that the matrix kernels wrap (strings only; no import of triton).

A sequence decodes one unit of a row, the codes a lane takes by one load of the first plane: 32 codes, or 16 at 8 bits.
Its registers, all .b32:

    q0 q1 ...   words of the first plane; r0 r1: words of the second (kernels/layout.py)
    t0 t1 ...   the table: what `table_words` names; or lane0 lane1, see below
    v0 v1 ...   int8 results, four to a word: v[m] holds codes k = 4 m .. 4 m + 3
    p0 p1 ...   fp16 results, two to a word:  p[m] holds codes k = 2 m, 2 m + 1

Up to 4 bits (and 5 in int8) a table fits the eight bytes that `prmt` selects from, and one instruction looks four codes
up. Three properties of prmt carry the design: only the low 16 bits of a selector count; bit 3 of a selector nibble
replicates the selected byte's sign over the byte; selectors 0xba98 therefore turn four bytes into masks of their signs.
    int8, 4 bits:   9 instructions for 8 codes and 2 dp4a; the sign is an xor (kernels/tables.py)
    fp16, 4 bits:  13 instructions for 8 codes and 4 fma.f16x2; low and high bytes are looked up apart
At 5, 6 and 8 bits fp16 entries come from a table spread over the lanes of the warp, by `shfl`: one or two a code. So a
kernel may use these only where whole warps run, which holds for every Triton program.
"""

from __future__ import annotations

from hlwq_cuda.kernels.layout import PLANES
from hlwq_cuda.kernels.tables import entries

SIGN_MASKS = "0xba98"  # prmt selector: byte j becomes 0xff where bit 7 of byte j is set, else 0
XOR_AND = "0x78"  # lop3: a ^ (b & c)
OR_AND = "0xf8"  # lop3: a | (b & c)
OR_XOR = "0x56"  # lop3: (a | b) ^ c

TEMPORARIES = "n t u y z a b c d lo hi"


def unit_codes(bits: int) -> int:
    """Codes of a unit."""
    return 16 if bits == 8 else 32


def unit_words(bits: int) -> tuple[int, int]:
    """Words of a unit in the first and the second plane."""
    first, second = (*PLANES[bits], 0)[:2]
    return first * unit_codes(bits) // 32, second


def uses_lanes(bits: int, mode: str) -> bool:
    """Whether the sequence looks entries up by shfl, in `lane0` (and `lane1`), instead of in t0, t1, ..."""
    return mode == "exact" and bits >= 5


def table_words(bits: int, mode: str) -> range:
    """The words of the table tensor that become t0, t1, ...: low then high bytes of fp16, or the int8 entries."""
    count = entries(bits)
    if uses_lanes(bits, mode):
        return range(0)
    return range(count // 2, count) if mode == "exact" else range(count, count + count // 4)


def load_lanes(bits: int, pointer: str) -> list[str]:
    """Lane l's share of the fp16 entries, from the table tensor at the 64-bit register `pointer`.

    5 bits: entry l % 16.  6 bits: entry l.  8 bits: entries l, l + 32 in lane0 and l + 64, l + 96 in lane1.
    """
    out = [".reg .b64 at; .reg .b16 e0, e1, e2, e3; mov.u32 n, %laneid;"]
    if bits == 5:
        out.append("and.b32 n, n, 15;")
    out.append(f"mul.wide.u32 at, n, 2; add.s64 at, at, {pointer};")
    if bits < 8:
        return [*out, "ld.global.nc.b16 e0, [at]; mov.b32 lane0, {e0, e0};"]
    out += [f"ld.global.nc.b16 e{i}, [at+{64 * i}];" for i in range(4)]
    return [*out, "mov.b32 lane0, {e0, e1}; mov.b32 lane1, {e2, e3};"]


def decode(bits: int, mode: str) -> list[str]:
    """The sequence for one unit, one instruction or a few a line."""
    return _INT8[bits]() if mode == "int8" else _FP16[bits]()


def declarations(bits: int, mode: str) -> str:
    """Declares every register that `decode` names."""
    first, second = unit_words(bits)
    names = TEMPORARIES.split() + [f"q{i}" for i in range(first)] + [f"r{i}" for i in range(second)]
    names += [f"t{i}" for i in range(len(table_words(bits, mode)))] + ["lane0", "lane1"]
    names += [f"v{i}" for i in range(unit_codes(bits) // 4)] if mode == "int8" else []
    names += [f"p{i}" for i in range(unit_codes(bits) // 2)] if mode == "exact" else []
    return f".reg .b32 {', '.join(names)};"


def _groups(i: int) -> tuple[int, int]:
    """Word i decodes to two groups of four codes, k = 4 i and k = 16 + 4 i: their indices in v."""
    return i, 4 + i


def _pairs(group: int, low: str, high: str) -> list[str]:
    """Four low and four high bytes -> the half2 pairs of a group."""
    return [f"prmt.b32 p{2 * group}, {low}, {high}, 0x5140; prmt.b32 p{2 * group + 1}, {low}, {high}, 0x7362;"]


def _selectors_2_3(bits: int, i: int) -> str:
    """n, t: nibbles that hold the codes of word i's two groups (layout: two-bit plane, and one-bit plane at 3 bits)."""
    source = f"q{i // 2}"
    out = ""
    if i % 2:
        out += f"shr.u32 n, {source}, 2; "
        source = "n"
    out += f"and.b32 n, {source}, 0x33333333; "
    if bits == 3:
        high = ("shl.b32 u, r0, 2; ", "shl.b32 u, r0, 1; ", "", "shr.u32 u, r0, 1; ")[i]
        out += f"{high}lop3.b32 n, n, {'u' if high else 'r0'}, 0x44444444, {OR_AND}; "
    return out + "shr.u32 t, n, 16;"


def _int8_2_3(bits: int) -> list[str]:
    table = "t0, t0" if bits == 2 else "t0, t1"
    out = []
    for i in range(4):
        first, second = _groups(i)
        out += [_selectors_2_3(bits, i), f"prmt.b32 v{first}, {table}, n; prmt.b32 v{second}, {table}, t;"]
    return out


def _fp16_2_3(bits: int) -> list[str]:
    low, high = ("t0, t0", "t1, t1") if bits == 2 else ("t0, t1", "t2, t3")
    out = []
    for i in range(4):
        out.append(_selectors_2_3(bits, i))
        for group, selector in zip(_groups(i), "nt", strict=True):
            out.append(f"prmt.b32 lo, {low}, {selector}; prmt.b32 hi, {high}, {selector};")
            out += _pairs(group, "lo", "hi")
    return out


def _int8_4() -> list[str]:
    out = []
    for i in range(4):
        first, second = _groups(i)
        out += [
            f"and.b32 n, q{i}, 0x77777777; shr.u32 t, n, 16; shl.b32 u, q{i}, 4;",
            "prmt.b32 a, t0, t1, n; prmt.b32 b, t0, t1, t;",
            f"prmt.b32 c, q{i}, q{i}, {SIGN_MASKS}; prmt.b32 d, u, u, {SIGN_MASKS};",
            f"xor.b32 v{first}, a, c; xor.b32 v{second}, b, d;",
        ]
    return out


def _fp16_4() -> list[str]:
    out = []
    for i in range(4):
        out.append(f"and.b32 n, q{i}, 0x77777777; shr.u32 t, n, 16; shl.b32 u, q{i}, 4;")
        for group, selector, signs in zip(_groups(i), "nt", (f"q{i}", "u"), strict=True):
            out.append(f"prmt.b32 lo, t0, t1, {selector}; prmt.b32 hi, t2, t3, {selector};")
            out.append(f"lop3.b32 hi, hi, {signs}, 0x80808080, {XOR_AND};")
            out += _pairs(group, "lo", "hi")
    return out


def _int8_5() -> list[str]:
    """A nibble selects from entries 0 to 7 (bit 3 clear) or 8 to 15; entries are below 128, so the other one is 0."""
    out = []
    for i in range(4):
        out.append(f"xor.b32 y, q{i}, 0x88888888; shr.u32 t, q{i}, 16; shr.u32 z, y, 16;")
        for h, (group, inner, outer) in enumerate(zip(_groups(i), (f"q{i}", "t"), "yz", strict=True)):
            out += [
                f"prmt.b32 a, t0, t1, {inner}; prmt.b32 b, t2, t3, {outer}; shl.b32 u, r0, {2 * i + h};",
                f"prmt.b32 c, u, u, {SIGN_MASKS}; lop3.b32 v{group}, a, b, c, {OR_XOR};",
            ]
    return out


def _look_up(word: str, shift: int, out: str, lane: str = "lane0") -> str:
    """`out` = the low half of `lane` in the lane that bits shift .. shift + 4 of `word` name."""
    moved = f"shr.u32 u, {word}, {shift}; " if shift else ""
    return f"{moved}shfl.sync.idx.b32 {out}, {lane}, {'u' if shift else word}, 0x1f, 0xffffffff;"


def _fp16_5() -> list[str]:
    out = []
    for i in range(4):
        for h, group in enumerate(_groups(i)):
            out.append(f"shl.b32 n, r0, {2 * i + h};")
            for pair, signs in ((0, "0x1000"), (1, "0x3020")):
                j = 4 * h + 2 * pair
                out += [_look_up(f"q{i}", 4 * j, "a"), _look_up(f"q{i}", 4 * j + 4, "b")]
                out.append(f"prmt.b32 c, a, b, 0x5410; prmt.b32 d, n, n, {signs};")
                out.append(f"lop3.b32 p{2 * group + pair}, c, d, 0x80008000, {XOR_AND};")
    return out


def _fp16_6() -> list[str]:
    words = ["q0", "q1", "q2", "q3", "r0"]
    out = [f"shr.u32 y, {words[4]}, 30;"]  # y: the ten spare bits, codes 30 and 31
    out += [f"shf.l.wrap.b32 y, {word}, y, 2;" for word in reversed(words[:4])]
    for pair in range(16):
        for k, register in ((2 * pair, "a"), (2 * pair + 1, "b")):
            out.append(
                _look_up(words[k // 6], 5 * (k % 6), register) if k < 30 else _look_up("y", 5 * (k - 30), register)
            )
        shifted = f"shl.b32 d, r1, {pair}; " if pair else ""
        signs = "d" if pair else "r1"
        out.append(f"prmt.b32 c, a, b, 0x5410; {shifted}lop3.b32 p{pair}, c, {signs}, 0x80008000, {XOR_AND};")
    return out


def _fp16_8() -> list[str]:
    """Bits 0 to 4 of a magnitude name the lane, bits 5 and 6 which of its four entries: bytes 2 e and 2 e + 1 of eight.

    Every byte of n is the pair of selector nibbles of one code, 0x22 e + 0x10; an even code looks at the low half of
    the selector and an odd one at the high half, so that their results meet in one word.
    """
    out = []
    for i in range(4):
        word = f"q{i}"
        out.append(f"shr.u32 n, {word}, 5; and.b32 n, n, 0x03030303; mad.lo.u32 n, n, 0x22, 0x10101010;")
        for pair, selector in enumerate("nt"):
            if pair:
                out.append("shr.u32 t, n, 16;")
            for byte, register in ((2 * pair, "a"), (2 * pair + 1, "b")):
                out += [_look_up(word, 8 * byte, "y"), _look_up(word, 8 * byte, "z", "lane1")]
                out.append(f"prmt.b32 {register}, y, z, {selector};")
            out.append(f"prmt.b32 c, a, b, 0x7610; prmt.b32 d, {word}, {word}, {('0x1000', '0x3020')[pair]};")
            out.append(f"lop3.b32 p{2 * i + pair}, c, d, 0x80008000, {XOR_AND};")
    return out


_INT8 = {2: lambda: _int8_2_3(2), 3: lambda: _int8_2_3(3), 4: _int8_4, 5: _int8_5}
_FP16 = {2: lambda: _fp16_2_3(2), 3: lambda: _fp16_2_3(3), 4: _fp16_4, 5: _fp16_5, 6: _fp16_6, 8: _fp16_8}
