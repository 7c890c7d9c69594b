"""A decoder layer in few kernels while one token is generated: what is in between goes into the products.

On CUDA the host bounds decoding: every kernel costs it about 9 us, and a layer of Qwen3 takes 16, one operation at a
time. Fused it takes: norm and the product of q, k and v; heads; two writes to the cache; attention; the product of o
and the sum; norm, the product of gate and up, and SwiGLU; the product of down and the sum. Where only the feed-forward
half is of this form (a hybrid's layers), that alone is fused: two kernels from the sum before it to the sum after it.
On Metal a layer takes 12 instead of 20, and the half four: each product has the rotation before it as a kernel of its
own, which takes the norm along.

Names do not tell which layers are of this form. A layer must have exactly the modules that the fused step knows, and it
must pass a trial: when it first gets a token, the layer as mlx-lm has it and the fused step compute the same random
hidden states. One that scales a sum, norms in another order or has another activation differs, and stays as it is. (A
limit that random states do not reach, such as a clip, would not be seen.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.models.rope_utils import Llama3RoPE

from hlwq_mlx import kernels, ops
from hlwq_mlx.layers import HLWQLinear
from hlwq_mlx.siblings import unchanged

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FEED_FORWARD, ATTENTION = (*GATE_UP, "down_proj"), (*QKV, "o_proj")
NORMS, HEAD_NORMS = ("input_layernorm", "post_attention_layernorm"), ("q_norm", "k_norm")
MIXERS = ("self_attn", "linear_attn")

FAR = 20000  # beyond the positions where some architectures begin to scale (4096, 8192)
# of the hidden states of a trial: norms make a layer's terms independent of it, so at one of them the terms of every
# sum are of like size
SCALES = (1.0, 2.0**-3, 2.0**-6)
# times what the layer itself answers to a rounding of its input. Layer and step differ in about 12 roundings, and what
# the trial does to the input is about two: sqrt(12 / 2). In plain operations the right step needs .4 to 1.4, in half as
# in bfloat16, and a wrong one at least 8 (tests/fused_cases.py)
ROUNDINGS = 3.0
SPACING = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}  # of numbers from 1 on


class Positions:
    """The place of a token in the text as an array, made once for all layers."""

    def __init__(self) -> None:
        self._held = (0, mx.array(0, mx.int32))

    def at(self, offset: int) -> mx.array:
        """int32, no axes."""
        held = self._held  # read and replaced as one, for threads
        if held[0] != offset:
            held = self._held = (offset, mx.array(offset, mx.int32))
        return held[1]


class LayerStep:
    """One token through a layer, compiled but for the cache: x [1, 1, K] -> the next layer's x."""

    def __init__(self, layer: nn.Module, positions: Positions) -> None:
        self._positions, self._scale = positions, layer["self_attn"].scale
        self._before, self._after = mx.compile(_before_attention(layer)), mx.compile(_after_attention(layer))
        self.holders, self.dtype = _holders(self.parents(layer)), layer["input_layernorm"]["weight"].dtype

    @staticmethod
    def parents(layer: nn.Module) -> list[nn.Module]:
        """The modules whose children the step uses."""
        return [layer, layer["self_attn"], layer["mlp"]]

    @staticmethod
    def knows(layer: nn.Module) -> bool:
        """Whether the layer's modules are what the step uses, and the heads what its kernel takes."""
        return _knows_feed_forward(layer) and "self_attn" in layer and _knows_attention(layer)

    @staticmethod
    def takes(mask: object, cache: object) -> bool:
        return mask is None and type(cache) is KVCache

    @staticmethod
    def caches(start: int) -> list[_Shifted]:
        """Three for a trial."""
        return [_Shifted(start) for _ in range(3)]

    def __call__(self, x: mx.array, _mask: None, cache: KVCache) -> mx.array:
        q, k, v = self._before(x, self._positions.at(cache.offset))
        k, v = cache.update_and_fetch(k, v)
        return self._after(mx.fast.scaled_dot_product_attention(q, k, v, scale=self._scale), x)


class HalfStep:
    """One token through a layer whose mixer (attention, a recurrence) is called as it is: x [1, 1, K] -> the next x."""

    def __init__(self, layer: nn.Module, _positions: Positions) -> None:
        self._norm, self._mixer = layer["input_layernorm"], _mixer(layer)
        self._after = mx.compile(_feed_forward(layer))
        self.holders, self.dtype = _holders(self.parents(layer)), layer["post_attention_layernorm"]["weight"].dtype

    @staticmethod
    def parents(layer: nn.Module) -> list[nn.Module]:
        """The modules whose children the step uses."""
        return [layer, layer["mlp"]]

    @staticmethod
    def knows(layer: nn.Module) -> bool:
        """Whether the modules of the feed-forward half are what the step uses, and how the mixer is called."""
        return _knows_feed_forward(layer)

    @staticmethod
    def takes(_mask: object, _cache: object) -> bool:
        return True

    @staticmethod
    def caches(_start: int) -> list[None]:
        """None for a trial: what a mixer keeps differs, and only the half after it is tried."""
        return [None] * 3

    def __call__(self, x: mx.array, mask: object, cache: object) -> mx.array:
        return self._after(self._mixer(self._norm(x), mask, cache), x)


def _before_attention(layer: nn.Module) -> Callable[[mx.array, mx.array], list[mx.array]]:
    """x [1, 1, K] and its position -> q [1, H, 1, D], k and v [1, HK, 1, D]."""
    norm, attention = layer["input_layernorm"], layer["self_attn"]
    qkv, inv_freq = _siblings(attention, QKV), _inverse_frequencies(attention["rope"])
    counts, scales, eps = (attention.n_heads, attention.n_kv_heads), None, 0.0
    if "q_norm" in attention:
        scales, eps = (attention["q_norm"]["weight"], attention["k_norm"]["weight"]), attention["q_norm"].eps
    has_bias = "bias" in attention["q_proj"]
    bias = mx.concatenate([attention[name]["bias"] for name in QKV]) if has_bias else None

    def before(x: mx.array, position: mx.array) -> list[mx.array]:
        (y,) = qkv.normed_product(x, norm["weight"], norm.eps)
        return kernels.backend().heads(y if bias is None else y + bias, position, inv_freq, counts, scales, eps)

    return before


def _after_attention(layer: nn.Module) -> Callable[[mx.array, mx.array], mx.array]:
    """What attention gives, [1, H, 1, D], and the layer's x [1, 1, K] -> the next layer's."""
    out, norm = layer["self_attn"]["o_proj"], layer["post_attention_layernorm"]
    gate_up, down = _siblings(layer["mlp"], GATE_UP), layer["mlp"]["down_proj"]

    def after(heads: mx.array, x: mx.array) -> mx.array:
        x = out.product_plus(heads.reshape(1, 1, -1), x)
        (activation,) = gate_up.normed_product(x, norm["weight"], norm.eps, swiglu=True)
        return down.product_plus(activation, x)

    return after


def _feed_forward(layer: nn.Module) -> Callable[[mx.array, mx.array], mx.array]:
    """What the mixer gives and the layer's x, both [1, 1, K] -> the next layer's."""
    norm = layer["post_attention_layernorm"]
    gate_up, down = _siblings(layer["mlp"], GATE_UP), layer["mlp"]["down_proj"]

    def feed_forward(mixed: mx.array, x: mx.array) -> mx.array:
        activation, x = gate_up.normed_product(x, norm["weight"], norm.eps, add=mixed, swiglu=True)
        return down.product_plus(activation, x)

    return feed_forward


def _siblings(parent: nn.Module, names: tuple[str, ...]):
    """The common product of these layers. Combined now: it replaces their arrays."""
    siblings = parent[names[0]]._siblings
    siblings.combine()
    return siblings


def _inverse_frequencies(rope: nn.Module) -> mx.array:
    """float32 [dims / 2]: by how much a position turns each pair of values."""
    if isinstance(rope, Llama3RoPE):
        return 1 / rope._freqs.astype(mx.float32)
    return mx.array([rope.scale * rope.base ** (-2 * i / rope.dims) for i in range(rope.dims // 2)], mx.float32)


def fuse_layers(modules: Iterable[nn.Module]) -> None:
    """Let every decoder layer with a known feed-forward half try the fused steps at its first token."""
    positions = Positions()
    for module in modules:
        if HalfStep.knows(module):
            module.__dict__["_positions"] = positions
            module.__class__ = _with_step(type(module))


@cache
def _with_step(cls: type[nn.Module]) -> type[nn.Module]:
    def __call__(self, x: mx.array, mask=None, cache=None):
        if x.size == x.shape[-1] and not self.training:
            step = self.__dict__.get("_fused")
            if step is None or not unchanged(step.holders):
                step = _try(self, cls, x.dtype)
            if step is not None and step.takes(mask, cache) and step.dtype == x.dtype:
                return step(x, mask, cache)
        return cls.__call__(self, x, mask, cache)

    return type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})


def _try(layer: nn.Module, cls: type[nn.Module], dtype: mx.Dtype) -> LayerStep | HalfStep | None:
    """The largest step that passes its trial. A layer without one gets its class `cls` back for good."""
    down = layer["mlp"].get("down_proj")
    if isinstance(down, HLWQLinear) and down._path(dtype) is not ops.Path.KERNELS:
        return None  # on a CPU every token asks
    try:
        mx.eval(layer.parameters())
    except ValueError:
        # mx.compile is tracing a function that has the parameters as inputs: no constants can be made of them
        return None
    for kind in (LayerStep, HalfStep) if HalfStep.knows(layer) else ():
        if kind.knows(layer) and _fits(kind.parents(layer), dtype):
            step = kind(layer, layer.__dict__["_positions"])
            if _passes(layer, cls.__call__, step):
                layer.__dict__["_fused"] = step
                return step
    layer.__dict__.pop("_fused", None)
    layer.__class__ = cls
    return None


def _leaves(parents: list[nn.Module]) -> list[nn.Module]:
    return [child for parent in parents for child in parent.values() if isinstance(child, (HLWQLinear, nn.RMSNorm))]


def _holders(parents: list[nn.Module]) -> list[tuple[nn.Module, str, object]]:
    """What must stay for a step to stay right: modules (an adapter replaces them) and their parameters."""
    holders = [(parent, name, child) for parent in parents for name, child in parent.items()]
    return holders + [(leaf, name, leaf[name]) for leaf in _leaves(parents) for name in leaf if name[0] != "_"]


def _fits(parents: list[nn.Module], dtype: mx.Dtype) -> bool:
    """Whether the kernels of these modules fuse and compute in `dtype`, as everything beside codes and norms must."""
    leaves = _leaves(parents)
    plain = [leaf[name] for leaf in leaves for name in ("weight", "bias") if name in leaf]
    fuse = [leaf._kernels.fuses(dtype) for leaf in leaves if isinstance(leaf, HLWQLinear)]
    return all(fuse) and all(array.dtype == dtype for array in plain)


def _mixer(layer: nn.Module) -> nn.Module | None:
    return next((layer[name] for name in MIXERS if name in layer), None)


def _knows_feed_forward(layer: nn.Module) -> bool:
    """Whether the layer has a mixer, norms and products as known, both called as mlx-lm does it, and nothing else."""
    mixer = _mixer(layer)
    if mixer is None or len(layer) != 4 or not {"mlp", *NORMS} < set(layer) or set(layer["mlp"]) != set(FEED_FORWARD):
        return False
    return (
        type(layer["post_attention_layernorm"]) is nn.RMSNorm
        and _are_products(layer["mlp"], FEED_FORWARD)
        and _are_siblings(layer["mlp"], GATE_UP)
        and not any("bias" in product for product in layer["mlp"].values())
        and _parameters(layer) == ["self", "x", "mask", "cache"]
        and _parameters(mixer)[2:] == ["mask", "cache"]
    )


def _knows_attention(layer: nn.Module) -> bool:
    """Whether attention is of norms, products and a rotary embedding as known, with heads that the kernel takes."""
    attention = layer["self_attn"]
    norms = [layer["input_layernorm"], *(attention[name] for name in HEAD_NORMS if name in attention)]
    if set(attention) - set(HEAD_NORMS) != {*ATTENTION, "rope"} or len(norms) == 2:
        return False
    if not (
        all(type(norm) is nn.RMSNorm for norm in norms)
        and len({norm.eps for norm in norms[1:]}) <= 1
        and type(attention["rope"]) in (nn.RoPE, Llama3RoPE)
        and _are_products(attention, ATTENTION)
        and _are_siblings(attention, QKV)
        and [name for name in ATTENTION if "bias" in attention[name]] in ([], list(QKV))
        and {"n_heads", "n_kv_heads", "scale"} <= vars(attention).keys()
    ):
        return False
    heads, kv_heads, dims = attention.n_heads, attention.n_kv_heads, attention["rope"].dims
    rows = [attention[name]["weight_codes"].shape[0] for name in QKV]
    head_dim = rows[0] // heads
    return (
        rows == [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        and head_dim % 32 == 0
        and dims % 64 == 0
        and dims <= head_dim
    )


def _are_products(parent: nn.Module, names: tuple[str, ...]) -> bool:
    return all(type(parent[name]) is HLWQLinear for name in names)


def _are_siblings(parent: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether these layers and no others compute as one product."""
    siblings = parent[names[0]]._siblings
    return siblings is not None and [id(layer) for layer in siblings.layers] == [id(parent[name]) for name in names]


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).__call__).parameters)


class _Shifted(KVCache):
    """A cache whose first token stands at `start`."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start = self.offset = start

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.offset -= self.start
        fetched = super().update_and_fetch(keys, values)
        self.offset += self.start
        return fetched


def _passes(layer: nn.Module, plain: Callable[..., mx.array], step: LayerStep | HalfStep) -> bool:
    """Whether the kernels of `step` compile and run here, which nothing tells before, and compute what `plain` does."""
    try:
        return _agree(layer, plain, step)
    except RuntimeError as error:
        kernels._warn_once(f"the kernels of fused layers do not run on this machine, others are used (slower): {error}")
        return False


def _agree(layer: nn.Module, plain: Callable[..., mx.array], step: LayerStep | HalfStep) -> bool:
    """Whether `step` computes what the layer does by `plain`, its own __call__, at the start of a text and far into it.

    Three random hidden states one after the other, through a cache of their own. What one product rounds, attention may
    amplify, by how much depends on the weights; so the layer's own answer to a rounding of its input is the measure.
    """
    shape, dtype = (1, 1, layer["post_attention_layernorm"]["weight"].size), step.dtype
    keys, agree = iter(mx.random.split(mx.random.key(0), 4 * len(SCALES))), []
    for start, scales in ((0, SCALES), (FAR, SCALES[::-1])):
        caches = step.caches(start)
        for scale in scales:
            x = (scale * mx.random.normal(shape, key=next(keys))).astype(dtype)
            rounding = mx.random.uniform(1 - SPACING[dtype], 1 + SPACING[dtype], shape, key=next(keys))
            rounded = (x * rounding).astype(dtype)
            expected, moved = plain(layer, x, None, caches[0]), plain(layer, rounded, None, caches[1])
            agree.append(_close(step(x, None, caches[2]), expected, moved))
        for name in ("keys", "values") if caches[0] else ():
            expected, moved, found = (getattr(held, name)[..., : len(scales), :] for held in caches)
            agree.append(_close(found, expected, moved))
    return all(mx.stack(agree).tolist())


def _close(found: mx.array, expected: mx.array, moved: mx.array) -> mx.array:
    """Whether `found` is as near to `expected` as rounding allows; `moved`: `expected` of an input that was rounded.

    Differences are taken relative to each value, or a few large ones (hidden states have them) would hide the others.
    """
    found, expected, moved = (array.astype(mx.float32) for array in (found, expected, moved))
    size = mx.abs(expected)
    size += mx.median(size)
    return mx.linalg.norm((found - expected) / size) <= ROUNDINGS * mx.linalg.norm((moved - expected) / size)
