"""Few rows of activations on tensor cores, the weight decoded straight into mma.sync fragments (Gluon; sm_80 and on).

    y[m, n] = step * sum over blocks of norm[n] * scale[m] * dot(entries, values[m]) + bias[n]

A thread block holds R tiles of 16 weight rows and 8 TILES rows of activations; its warps split K, four pieces of 128 at
a time, and add their sums at the end through shared memory. Weights go from memory to registers to the tensor core, for
every width and block size as mma.py says, and are the first to leave the cache next to the processor: the activations,
which every warp reads again, stay. Splitting K over the warps keeps a small layer (two tiles of rows a multiprocessor)
in flight as a whole; activations are loaded ahead of their use for the same reason. The first weights are loaded before
the wait of programmatic dependent launch: they depend on no kernel.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def gemm_mma_kernel(
    codes,  # int32 [N, CHUNKS * BITS], device layout
    norms,  # fp16 [N, BLOCKS]
    table,  # int32, tables.py
    values,  # fp16 or int8 [M, 32 CHUNKS], seen as int32
    scales,  # f32 [M, BLOCKS]
    bias,  # [N], if BIAS
    y,  # [M, N]
    M,
    N,
    CHUNKS: gl.constexpr,  # Kp / 32
    BITS: gl.constexpr,
    PLANE_0: gl.constexpr,  # words of a chunk in the first plane, and in the second
    PLANE_1: gl.constexpr,
    SUB_BLOCKS: gl.constexpr,  # 128 / B
    INT8: gl.constexpr,
    BIAS: gl.constexpr,
    TABLE_AT: gl.constexpr,  # where the entries of this mode begin in the table, and how many words they are;
    TABLE_WORDS: gl.constexpr,  # no words: every lane holds its share of the entries
    STEP_AT: gl.constexpr,  # where the int8 step lies in the table
    TEXTS: gl.constexpr,  # mma.multiply of the four pieces of a group
    CONSTRAINTS: gl.constexpr,
    R: gl.constexpr,
    TILES: gl.constexpr,
    AHEAD: gl.constexpr,  # pieces of activations in flight
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    flat: gl.constexpr = gl.BlockedLayout([4], [32], [num_warps], [0])
    BLOCKS: gl.constexpr = CHUNKS * SUB_BLOCKS // 4
    LOADS: gl.constexpr = 2 if INT8 else 4  # of 16 bytes, to read a chunk of activations
    STEPS: gl.constexpr = (CHUNKS + 16 * num_warps - 1) // (16 * num_warps)
    EVEN: gl.constexpr = CHUNKS % (16 * num_warps) == 0
    index = gl.arange(0, num_warps * 128, layout=flat)
    j = index % 4
    t = index // 4 % 4
    g = index // 16 % 8
    warp = index // 128
    column_tile = gl.program_id(1) * TILES
    if PDL:
        _gdc("griddepcontrol.launch_dependents; // $0")

    entries = ()
    if SUB_BLOCKS > 1:
        for s in gl.static_range(SUB_BLOCKS):
            entries = entries + (gl.where(t * SUB_BLOCKS // 4 == s, -1, 0),)
    if TABLE_WORDS > 0:
        for i in gl.static_range(TABLE_WORDS):
            entries = entries + (gl.load(table + TABLE_AT + i) + gl.zeros_like(index),)
    else:
        entries = entries + _lane_entries(table, 4 * g + t, BITS)

    code_row = ()
    norm_row = ()
    for r in gl.static_range(2 * R):
        row = gl.minimum(gl.program_id(0) * (16 * R) + 8 * r + g, N - 1).to(gl.int64)
        code_row = code_row + (codes + row * (CHUNKS * BITS),)
        norm_row = norm_row + (norms + row * BLOCKS,)
    value_row = ()
    scale_row = ()
    for n in gl.static_range(TILES):
        row = gl.minimum(8 * (column_tile + n) + g, M - 1)
        value_row = value_row + (values + row * (CHUNKS * LOADS * 4),)
        for p in gl.static_range(2):
            row = gl.minimum(8 * (column_tile + n) + 2 * t + p, M - 1)
            scale_row = scale_row + (scales + row * BLOCKS,)

    acc = ()
    for _ in gl.static_range(R * TILES):
        acc = acc + (gl.zeros([num_warps * 128], gl.float32, layout=flat),)

    for step in gl.static_range(STEPS):
        chunk = (step * num_warps + warp) * 16  # first of the group
        words = ()
        norm = ()
        for r in gl.static_range(2 * R):
            planes = (_load_plane(code_row[r], chunk, t, index, PLANE_0, 0, CHUNKS, BITS, EVEN),)
            if PLANE_1 > 0:
                planes = planes + (_load_plane(code_row[r], chunk, t, index, PLANE_1, PLANE_0, CHUNKS, BITS, EVEN),)
            words = words + (planes,)
            norm = norm + (_load_blocks(norm_row[r], chunk, j, SUB_BLOCKS, BLOCKS, EVEN),)
        if PDL and step == 0:
            _gdc("griddepcontrol.wait; // $0")
        scale = ()
        for n in gl.static_range(2 * TILES):
            scale = scale + (_load_blocks(scale_row[n], chunk, j, SUB_BLOCKS, BLOCKS, EVEN),)
        x = ()
        for piece in gl.static_range(AHEAD):
            x = x + (_load_activations(value_row, chunk + 4 * piece + t, j, LOADS, TILES, CHUNKS, EVEN),)
        for piece in gl.static_range(4):
            if piece + AHEAD < 4:
                x = x + (_load_activations(value_row, chunk + 4 * (piece + AHEAD) + t, j, LOADS, TILES, CHUNKS, EVEN),)
            columns = ()
            for n in gl.static_range(2 * TILES):
                columns = columns + (scale[n][piece * SUB_BLOCKS // 4],)
            total = ()
            for r in gl.static_range(R):
                rows = ()
                for row in gl.static_range(2):
                    rows = rows + _words_of(words[2 * r + row][0], piece, PLANE_0)
                if PLANE_1 > 0:
                    for row in gl.static_range(2):
                        rows = rows + _words_of(words[2 * r + row][1], piece, PLANE_1)
                pair = (norm[2 * r][piece * SUB_BLOCKS // 4], norm[2 * r + 1][piece * SUB_BLOCKS // 4])
                arguments = rows + x[piece] + pair + columns + entries + acc[r * TILES : (r + 1) * TILES]
                total = total + gl.inline_asm_elementwise(
                    TEXTS[piece], CONSTRAINTS, arguments, dtype=(gl.float32,) * TILES, is_pure=True, pack=4
                )
            acc = total

    for r in gl.static_range(R):
        for n in gl.static_range(TILES):
            sums = gl.sum(gl.reshape(acc[r * TILES + n], [num_warps, 128]), 0)
            o = gl.arange(0, 128, layout=sums.type.layout)
            row = gl.program_id(0) * (16 * R) + 16 * r + o // 16 + 8 * (o % 4 // 2)
            column = 8 * (column_tile + n) + o // 4 % 4 * 2 + o % 2
            if INT8:
                sums *= gl.load(table + STEP_AT).to(gl.float32, bitcast=True)
            if BIAS:
                sums += gl.load(bias + row, mask=row < N, other=0.0).to(gl.float32)
            gl.store(y + column.to(gl.int64) * N + row, sums.to(y.dtype.element_ty), mask=(row < N) & (column < M))


@gluon.jit
def _gdc(TEXT: gl.constexpr):
    gl.inline_asm_elementwise(TEXT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load(pointer, inside, EVEN: gl.constexpr):
    """Beyond the row: zero. Norms and activations there are zero, so whatever codes stand for adds nothing."""
    return gl.load(pointer) if EVEN else gl.load(pointer, mask=inside, other=0)


@gluon.jit
def _load_plane(
    row,
    chunk,
    t,
    index,
    WIDTH: gl.constexpr,  # words of a chunk in this plane
    BEFORE: gl.constexpr,  # and in the planes before it
    CHUNKS: gl.constexpr,
    BITS: gl.constexpr,
    EVEN: gl.constexpr,
):
    """One plane of a group: WIDTH tensors; of the lane's 4 WIDTH words, element j of tensor u is number 4 u + j."""
    out = ()
    for u in gl.static_range(WIDTH):
        if WIDTH < 4:
            piece = 4 * u // WIDTH + index % 4 // WIDTH
            word = index % WIDTH
        else:  # the same, written so that the compiler sees four neighbors: one access
            piece = 4 * u // WIDTH
            word = 4 * u % WIDTH + index % 4
        c = chunk + 4 * piece + t
        at = row + (BEFORE * CHUNKS + c * WIDTH + word)
        if EVEN:
            out = out + (gl.load(at, eviction_policy="evict_first"),)
        else:
            out = out + (gl.load(at, mask=c < CHUNKS, other=0, eviction_policy="evict_first"),)
    return out


@gluon.jit
def _words_of(tensors, piece: gl.constexpr, WIDTH: gl.constexpr):
    """mma.plane_tensors: those of a plane's tensors with words of this piece."""
    out = ()
    for u in gl.static_range(piece * WIDTH // 4, ((piece + 1) * WIDTH - 1) // 4 + 1):
        out = out + (tensors[u],)
    return out


@gluon.jit
def _load_blocks(row, chunk, j, SUB_BLOCKS: gl.constexpr, BLOCKS: gl.constexpr, EVEN: gl.constexpr):
    """Norms or scales of a group: SUB_BLOCKS tensors of four blocks."""
    out = ()
    for u in gl.static_range(SUB_BLOCKS):
        block = chunk * SUB_BLOCKS // 4 + 4 * u + j
        out = out + (_load(row + block, block < BLOCKS, EVEN),)
    return out


@gluon.jit
def _load_activations(
    rows, chunk, j, LOADS: gl.constexpr, TILES: gl.constexpr, CHUNKS: gl.constexpr, EVEN: gl.constexpr
):
    """The lane's chunk of each tile's activations, 16 bytes a tensor."""
    out = ()
    for n in gl.static_range(TILES):
        for v in gl.static_range(LOADS):
            at = rows[n] + (chunk * (4 * LOADS) + 4 * v + j)
            out = out + (_load(at, chunk < CHUNKS, EVEN),)
    return out


@gluon.jit
def _lane_entries(table, lane, BITS: gl.constexpr):
    """The fp16 entries that decode.py's shuffles read from a lane: `lane`, and at 8 bits those 32, 64, 96 further."""
    if BITS == 5:
        lane = lane % 16
    entries = (_entry(table, lane),)
    if BITS == 8:
        entries = (entries[0] | _entry(table, lane + 32) << 16,)
        entries = entries + (_entry(table, lane + 64) | _entry(table, lane + 96) << 16,)
    return entries


@gluon.jit
def _entry(table, number):
    return gl.load(table + number // 2) >> (number % 2 * 16) & 0xFFFF
