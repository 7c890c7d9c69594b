"""gemv.py's product with explicit register layouts, in Gluon: the fast body on NVIDIA GPUs.

What it does otherwise; together the plain body takes 1.4 to 2.7 times as long alone on an H200 (docs/measurements.md):
- a lane keeps the sums of its own units, and loads norms and scales in that layout: nothing passes through shared
  memory before the last reduction;
- the first weights are loaded and decoded before the wait of programmatic dependent launch, on which they do not
  depend, and those of a later step before the arithmetic of this one: a thread has 4 to 8 loads of 16 bytes in flight,
  and what follows the wait are the activations, their products and the sum.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hlwq_cuda.kernels.gemv import dot_of, min_of, next_power_of_2


@gluon.jit
def _wait_for_previous_kernel(PDL: gl.constexpr):
    if PDL:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _allow_next_kernel(PDL: gl.constexpr):
    if PDL:
        asm: gl.constexpr = "griddepcontrol.launch_dependents; // $0"
        gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _need_here(entries, at, never):
    """Keep the computation of `entries`, a tuple of int32 [ROWS, UNITS, W], before this place.

    The assembler would move it to where the results are used, behind the wait. A branch that is never taken needs every
    element: it stores them, at pointers int32* [ROWS, UNITS]. never: int32, not negative.
    """
    if never < 0:
        cube: gl.constexpr = entries[0].type.layout
        width: gl.constexpr = entries[0].shape[2]
        e = gl.arange(0, width, layout=gl.SliceLayout(0, gl.SliceLayout(1, cube)))
        pointers = gl.expand_dims(at, 2) + gl.expand_dims(gl.expand_dims(e, 0), 1)
        for tensor in gl.static_range(len(entries)):
            gl.store(pointers + tensor * width, entries[tensor])


@gluon.jit
def _lane_zero():
    """0, in a way that the assembler takes for a value of each lane: lanemask & (lanemask - 1).

    What it knows to be one value for the warp it keeps in a uniform register, from which every prmt then needs a copy.
    """
    asm: gl.constexpr = "{ .reg .b32 a; mov.u32 a, %lanemask_eq; sub.u32 $0, a, 1; and.b32 $0, $0, a; }"
    return gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _load_weights(codes, norms, row, u, KP: gl.constexpr, B: gl.constexpr, BITS: gl.constexpr, MODE: gl.constexpr):
    """Of every unit u [1, UNITS] of rows [ROWS, 1]: norm, words of the first plane, words of the second."""
    dot: gl.constexpr = dot_of(BITS, MODE)
    second_words: gl.constexpr = dot.second
    per_row: gl.constexpr = KP // dot.codes
    pair: gl.constexpr = u.type.layout
    cube: gl.constexpr = pair.parent
    e = gl.arange(0, dot.width, layout=gl.SliceLayout(0, gl.SliceLayout(1, cube)))
    e = gl.expand_dims(gl.expand_dims(e, 0), 1)
    base = codes + row * (KP * BITS // 32)
    first = gl.expand_dims(base, 2) + (gl.expand_dims(u * dot.width, 2) + e)
    norm = norms + row * (KP // B) + u * dot.codes // B
    if per_row % u.shape[1] == 0:
        loaded = (gl.load(norm), gl.load(first, eviction_policy="evict_first"))
        for word in gl.static_range(second_words):
            second = base + (per_row * dot.width + u * second_words + word)
            loaded = loaded + (gl.load(second, eviction_policy="evict_first"),)
    else:
        inside = (u < per_row) & (row >= 0)
        loaded = (gl.load(norm, mask=inside, other=0.0),)
        loaded = loaded + (gl.load(first, mask=gl.expand_dims(inside, 2) & (e >= 0), other=0),)
        for word in gl.static_range(second_words):
            second = base + (per_row * dot.width + u * second_words + word)
            loaded = loaded + (gl.load(second, mask=inside, other=0),)
    return loaded


@gluon.jit
def _decode(weights, table, BITS: gl.constexpr, MODE: gl.constexpr):
    """Loaded weights as entries (dot.py): a tuple of int32 [ROWS, UNITS, W]. table: its words, each as a tensor."""
    dot: gl.constexpr = dot_of(BITS, MODE)
    decoder: gl.constexpr = dot.decoder
    count: gl.constexpr = dot.activations // dot.width
    second_words: gl.constexpr = dot.second
    operands = (weights[1],)
    for word in gl.static_range(second_words):
        operands = operands + (gl.expand_dims(weights[2 + word], 2),)
    return gl.inline_asm_elementwise(
        decoder[0], decoder[1], operands + table, dtype=(gl.int32,) * count, is_pure=True, pack=dot.width
    )


@gluon.jit
def _multiply(entries, values, u, KP: gl.constexpr, BITS: gl.constexpr, MODE: gl.constexpr):
    """Entries of every unit against its activations: [ROWS, UNITS]."""
    dot: gl.constexpr = dot_of(BITS, MODE)
    product: gl.constexpr = dot.product
    width: gl.constexpr = dot.width
    tensors: gl.constexpr = dot.activations // dot.width
    per_row: gl.constexpr = KP // dot.codes
    pair: gl.constexpr = u.type.layout
    cube: gl.constexpr = pair.parent
    e = gl.arange(0, width, layout=gl.SliceLayout(0, gl.SliceLayout(1, cube)))
    e = gl.expand_dims(gl.expand_dims(e, 0), 1)
    activations = ()
    for tensor in gl.static_range(tensors):
        pointer = values + (gl.expand_dims(u * dot.activations + tensor * width, 2) + e)
        if per_row % u.shape[1] == 0:
            activations = activations + (gl.load(pointer),)
        else:
            activations = activations + (gl.load(pointer, mask=gl.expand_dims(u < per_row, 2) & (e >= 0), other=0),)
    sums = gl.inline_asm_elementwise(
        product[0], product[1], entries + activations, dtype=gl.float32, is_pure=True, pack=width
    )
    rows: gl.constexpr = sums.shape[0]
    if width == 4:
        sums, _ = gl.split(gl.reshape(sums, [rows, u.shape[1], 2, 2]))
    sums, _ = gl.split(sums)
    return gl.convert_layout(sums, pair, assert_trivial=True)


@gluon.jit
def gemv_gluon_kernel(
    values,  # int32: fp16 or int8 activations [Kp], in words
    scales,  # float32 [Kp / B]
    half_sums,  # float32 [Kp / 32]
    mean_squares,  # float32 [Kp / B], or unused
    codes,  # int32 [N, Kp * BITS / 32]
    norms,  # float16 [N, Kp / B]
    table,  # int32
    bias,  # [N], or unused
    out,  # [N]
    N,
    eps,
    KP: gl.constexpr,
    B: gl.constexpr,
    BITS: gl.constexpr,
    MODE: gl.constexpr,
    ROWS: gl.constexpr,
    UNITS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    NORMED: gl.constexpr,
    PDL: gl.constexpr,
    AHEAD: gl.constexpr,
    num_warps: gl.constexpr,
):
    _allow_next_kernel(PDL)
    dot: gl.constexpr = dot_of(BITS, MODE)
    per_row: gl.constexpr = KP // dot.codes
    table_words: gl.constexpr = dot.table_words
    cube: gl.constexpr = gl.BlockedLayout([1, 1, dot.width], [1, 32, 1], [1, num_warps, 1], [2, 1, 0])
    pair: gl.constexpr = gl.SliceLayout(2, cube)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, pair))
    row = gl.expand_dims(gl.minimum(row, N - 1).to(gl.int64), 1)
    lane = gl.expand_dims(gl.arange(0, UNITS, layout=gl.SliceLayout(0, pair)), 0)

    steps: gl.constexpr = (per_row + UNITS - 1) // UNITS
    loaded = ()
    for step in gl.static_range(min_of(AHEAD, steps)):
        loaded = loaded + (_load_weights(codes, norms, row, lane + step * UNITS, KP, B, BITS, MODE),)
    words = ()
    for word in gl.static_range(table_words):
        scalar = gl.load(table + (dot.table_start + word + _lane_zero()))
        words = words + (gl.full([ROWS, UNITS, dot.width], scalar, gl.int32, layout=cube),)
    if table_words == 0:
        words = words + (gl.full([ROWS, UNITS, dot.width], table.to(gl.int64), gl.int64, layout=cube),)
    entries = _decode(loaded[0], words, BITS, MODE)
    if PDL:
        anywhere = out.to(gl.pointer_type(gl.int32)) + (row * UNITS + lane) * dot.activations
        _need_here(entries, anywhere, N)
    _wait_for_previous_kernel(PDL)

    if NORMED:
        every = gl.arange(0, next_power_of_2(KP // B), layout=gl.BlockedLayout([1], [32], [num_warps], [0]))
        squares = gl.load(mean_squares + every, mask=every < KP // B, other=0.0)
    acc = gl.zeros([ROWS, UNITS], gl.float32, layout=pair)
    for step in gl.static_range(steps):
        u = step * UNITS + lane
        if step + AHEAD < steps:
            loaded = loaded + (_load_weights(codes, norms, row, u + AHEAD * UNITS, KP, B, BITS, MODE),)
        sums = _multiply(entries, values, u, KP, BITS, MODE)
        inside = u < per_row
        if MODE == "int8" and BITS >= 4:
            sums += gl.load(half_sums + u, mask=inside, other=0.0)
        scale = gl.load(scales + u * dot.codes // B, mask=inside, other=0.0)
        acc += sums * (loaded[step][0].to(gl.float32) * scale)
        if step + 1 < steps:
            entries = _decode(loaded[step + 1], words, BITS, MODE)

    y = gl.sum(acc, 1)
    row = gl.program_id(0) * ROWS + gl.arange(0, ROWS, layout=y.type.layout)
    if MODE == "int8":
        y *= gl.load((table + dot.step_word).to(gl.pointer_type(gl.float32)))
    if NORMED:
        y *= gl.rsqrt(gl.sum(squares, 0) + eps)
    if HAS_BIAS:
        y += gl.load(bias + gl.minimum(row, N - 1)).to(gl.float32)
    gl.store(out + row, y.to(out.dtype.element_ty), mask=row < N)
