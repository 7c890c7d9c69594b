"""A decoder layer as eight kernels while one token is generated: what is in between goes into the products.

On CUDA the host bounds decoding: every kernel costs it about 9 us, and a layer of Qwen3 takes 16, one operation at a
time. Fused it takes: norm and the product of q, k and v; heads; two writes to the cache; attention; the product of o
and the sum; norm, the product of gate and up, and SwiGLU; the product of down and the sum.

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
PRODUCTS = (*QKV, "o_proj", *GATE_UP, "down_proj")
NORMS, HEAD_NORMS = ("input_layernorm", "post_attention_layernorm"), ("q_norm", "k_norm")

FAR = 20000  # beyond the positions where some architectures begin to scale (4096, 8192)
# of the hidden states of a trial: norms make a layer's terms independent of it, so at one of them the terms of every
# sum are of like size
SCALES = (1.0, 2.0**-3, 2.0**-6)
# times what the layer itself answers to a rounding of its input. Layer and step differ in about 12 roundings, and what
# the trial does to the input is about two: sqrt(12 / 2). In plain operations the right step needs .4 to 1.1, in half as
# in bfloat16, and a wrong one at least 7 (tests/fused_cases.py)
ROUNDINGS = 3.0
SPACING = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7, mx.float32: 2.0**-23}  # of numbers from 1 on


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


class Step:
    """One token through a known layer, compiled but for the cache: x [1, 1, K] -> the next layer's x."""

    def __init__(self, layer: nn.Module, positions: Positions) -> None:
        attention, feed_forward = layer["self_attn"], layer["mlp"]
        for siblings in (attention["q_proj"]._siblings, feed_forward["gate_proj"]._siblings):
            siblings.combine()  # now: it replaces arrays
        self._positions, self._scale = positions, attention.scale
        self._before, self._after = mx.compile(_before_attention(layer)), mx.compile(_after_attention(layer))
        parents = (layer, attention, feed_forward)
        self._holders = [(parent, name, child) for parent in parents for name, child in parent.items()]
        leaves = [child for *_, child in self._holders if child is not attention and child is not feed_forward]
        self._holders += [(leaf, name, array) for leaf in leaves for name, array in leaf.items()]

    def current(self) -> bool:
        """Whether nothing was replaced since (adapters, loaded weights)."""
        return unchanged(self._holders)

    def __call__(self, x: mx.array, cache: KVCache) -> mx.array:
        q, k, v = self._before(x, self._positions.at(cache.offset))
        k, v = cache.update_and_fetch(k, v)
        return self._after(mx.fast.scaled_dot_product_attention(q, k, v, scale=self._scale), x)


def _before_attention(layer: nn.Module) -> Callable[[mx.array, mx.array], list[mx.array]]:
    """x [1, 1, K] and its position -> q [1, H, 1, D], k and v [1, HK, 1, D]: two kernels, three with biases."""
    norm, attention = layer["input_layernorm"], layer["self_attn"]
    qkv, inv_freq = attention["q_proj"]._siblings, _inverse_frequencies(attention["rope"])
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
    """What attention gives, [1, H, 1, D], and the layer's x [1, 1, K] -> the next layer's: three kernels."""
    norm, out = layer["post_attention_layernorm"], layer["self_attn"]["o_proj"]
    gate_up, down = layer["mlp"]["gate_proj"]._siblings, layer["mlp"]["down_proj"]

    def after(heads: mx.array, x: mx.array) -> mx.array:
        x = out.product_plus(heads.reshape(1, 1, -1), x)
        (activation,) = gate_up.normed_product(x, norm["weight"], norm.eps, swiglu=True)
        return down.product_plus(activation, x)

    return after


def _inverse_frequencies(rope: nn.Module) -> mx.array:
    """float32 [dims / 2]: by how much a position turns each pair of values."""
    if isinstance(rope, Llama3RoPE):
        return 1 / rope._freqs.astype(mx.float32)
    return mx.array([rope.scale * rope.base ** (-2 * i / rope.dims) for i in range(rope.dims // 2)], mx.float32)


def fuse_layers(modules: Iterable[nn.Module]) -> None:
    """Let every decoder layer that has the modules of a known one try the fused step at its first token."""
    positions = Positions()
    for module in modules:
        if _is_known(module):
            module.__dict__["_positions"] = positions
            module.__class__ = _with_step(type(module))


@cache
def _with_step(cls: type[nn.Module]) -> type[nn.Module]:
    def __call__(self, x: mx.array, mask=None, cache=None):
        if mask is None and type(cache) is KVCache and x.size == x.shape[-1] and not self.training:
            step = _step(self, cls, x.dtype)
            if step is not None:
                return step(x, cache)
        return cls.__call__(self, x, mask, cache)

    return type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})


def _step(layer: nn.Module, cls: type[nn.Module], dtype: mx.Dtype) -> Step | None:
    """The layer's step, tried anew where it is not current. A layer that fails gets its class `cls` back for good."""
    step = layer.__dict__.get("_fused")
    if step is not None and step.current():
        return step if layer["input_layernorm"]["weight"].dtype == dtype else None
    known = _is_known(layer)
    if known and layer["mlp"]["down_proj"]._path(dtype) is not ops.Path.KERNELS:
        return None
    try:
        mx.eval(layer.parameters())
    except ValueError:
        # mx.compile is tracing a function that has the parameters as inputs: no constants can be made of them
        return None
    if known and _fits(layer, dtype):
        step = Step(layer, layer.__dict__["_positions"])
        if _agree(layer, cls.__call__, step, dtype):
            layer.__dict__["_fused"] = step
            return step
    layer.__dict__.pop("_fused", None)
    layer.__class__ = cls
    return None


def _is_known(layer: nn.Module) -> bool:
    """Whether a layer has exactly the modules that `Step` uses. What it computes with them is for the trial to say."""
    if set(layer) != {"self_attn", "mlp", *NORMS}:
        return False
    attention, feed_forward, modules = layer["self_attn"], layer["mlp"], _leaves(layer)
    return (
        set(attention) - set(HEAD_NORMS) == {*QKV, "o_proj", "rope"}
        and set(feed_forward) == {*GATE_UP, "down_proj"}
        and all(type(modules[name]) is HLWQLinear for name in PRODUCTS)
        and all(type(modules[name]) is nn.RMSNorm for name in (*NORMS, *HEAD_NORMS) if name in modules)
        and len(set(HEAD_NORMS) & set(attention)) in (0, 2)
        and type(attention["rope"]) in (nn.RoPE, Llama3RoPE)
        and {"n_heads", "n_kv_heads", "scale"} <= vars(attention).keys()
        and _are_siblings([attention[name] for name in QKV])
        and _are_siblings([feed_forward[name] for name in GATE_UP])
        and list(inspect.signature(type(layer).__call__).parameters) == ["self", "x", "mask", "cache"]
    )


def _leaves(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules of a layer, its attention and its feed-forward part by name."""
    modules = {**layer, **layer["self_attn"], **layer["mlp"]}
    return {name: module for name, module in modules.items() if name not in ("self_attn", "mlp")}


def _are_siblings(layers: list[HLWQLinear]) -> bool:
    """Whether these layers and no others compute as one product."""
    siblings = layers[0]._siblings
    return siblings is not None and list(map(id, siblings.layers)) == list(map(id, layers))


def _fits(layer: nn.Module, dtype: mx.Dtype) -> bool:
    """Whether the shapes and dtypes of a known layer are what the kernels take."""
    attention, modules = layer["self_attn"], _leaves(layer)
    heads, kv_heads, dims = attention.n_heads, attention.n_kv_heads, attention["rope"].dims
    rows = [modules[name]["weight_codes"].shape[0] for name in QKV]
    head_dim = rows[0] // heads
    return (
        rows == [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        and head_dim % 32 == 0
        and dims % 64 == 0
        and dims <= head_dim
        and all(modules[name]._kernels.fuses(dtype) for name in PRODUCTS)
        and [name for name in PRODUCTS if "bias" in modules[name]] in ([], list(QKV))
        and len({modules[name].eps for name in HEAD_NORMS if name in modules}) <= 1
        and all(
            module[name].dtype == dtype for module in modules.values() for name in ("weight", "bias") if name in module
        )
    )


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


def _agree(layer: nn.Module, plain: Callable, step: Step, dtype: mx.Dtype) -> bool:
    """Whether `step` computes what the layer does by `plain`, its own __call__, at the start of a text and far into it.

    Three random hidden states one after the other, through a cache of their own. What one product rounds, attention may
    amplify, by how much depends on the weights; so the layer's own answer to a rounding of its input is the measure.
    """
    width, keys = layer["input_layernorm"]["weight"].size, iter(mx.random.split(mx.random.key(0), 4 * len(SCALES)))
    agree = []
    for start, scales in ((0, SCALES), (FAR, SCALES[::-1])):
        caches = [_Shifted(start) for _ in range(3)]
        for scale in scales:
            x = (scale * mx.random.normal((1, 1, width), key=next(keys))).astype(dtype)
            rounding = mx.random.uniform(1 - SPACING[dtype], 1 + SPACING[dtype], x.shape, key=next(keys))
            rounded = (x * rounding).astype(dtype)
            expected, moved = plain(layer, x, None, caches[0]), plain(layer, rounded, None, caches[1])
            agree.append(_close(step(x, caches[2]), expected, moved))
        for name in ("keys", "values"):
            expected, moved, found = (getattr(held, name) for held in caches)
            agree.append(_close(found, expected, moved))
    return all(mx.stack(agree).tolist())


def _close(found: mx.array, expected: mx.array, moved: mx.array) -> mx.array:
    """Whether `found` is as near to `expected` as rounding allows; `moved`: `expected` of an input that was rounded."""
    found, expected, moved = (array.astype(mx.float32) for array in (found, expected, moved))
    return mx.linalg.norm(found - expected) <= ROUNDINGS * mx.linalg.norm(moved - expected)
