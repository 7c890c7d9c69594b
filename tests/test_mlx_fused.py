"""The fused decoder layer: which layers take it, when, and that the results are those of mlx-lm's own layer.

On a GPU with -m gpu; without one the functions of its kernels are plain operations (tests/plain_kernels.py), or the
kernels are emulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import pytest
from fused_cases import NEARLY, NEARLY_ATTENTION, OTHER_ATTENTION, OTHERS, other_rope, quantized, tiny
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from plain_kernels import FusingKernels, PlainKernels, as_on_a_gpu

from hlwq_mlx import cuda, fused, kernels, metal, ops
from hlwq_mlx.fused import fuse_layers
from hlwq_mlx.steps import compile_steps
from tests import metal_cpu
from tests.metal_cpu import require
from tests.mlx_cuda_cases import normal, on_device, on_gpu

TOKENS = mx.array([[7, 50, 3, 9, 9, 12, 19, 0]])


@pytest.fixture(params=["plain operations", pytest.param("gpu", marks=on_gpu)])
def fusing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Inside, kernels fuse."""
    with nullcontext() if request.param == "gpu" else as_on_a_gpu(FusingKernels()):
        yield


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The steps that were taken, trials included, in their order."""
    steps, call = [], fused.LayerStep.__call__

    def counted(self, *inputs):
        steps.append(self)
        return call(self, *inputs)

    monkeypatch.setattr(fused.LayerStep, "__call__", counted)
    return steps


def one_layer(change: Callable[[nn.Module], None] = lambda _: None, **more) -> nn.Module:
    layer = tiny("qwen3", 1).layers[0]
    change(layer)
    return quantized(layer, **more)


def relative_error(found: mx.array, expected: mx.array) -> float:
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    return (mx.linalg.norm(found - expected) / mx.linalg.norm(expected)).item()


def generate(model: nn.Module) -> list[mx.array]:
    """Logits of a prompt of five tokens, then of each token."""
    cache = make_prompt_cache(model)
    steps = [TOKENS[:, :5], *mx.split(TOKENS[:, 5:], 3, axis=1)]
    return [model(step, cache=cache)[0, -1] for step in steps]


def run(layer: nn.Module, count: int = 3) -> tuple[list[mx.array], KVCache]:
    """What a layer makes of `count` tokens, one at a time, after a prompt of two."""
    cache = KVCache()
    layer(normal(1, 2, 128, dtype=mx.bfloat16), "causal", cache)
    return [layer(normal(1, 1, 128, dtype=mx.bfloat16, seed=i), None, cache) for i in range(count)], cache


def fused_parts(layers: list[nn.Module]) -> list[str]:
    """By name: the step of each layer."""
    return [type(vars(layer).get("_fused")).__name__ for layer in layers]


FAMILIES = [(family, ["LayerStep"] * 2) for family in ("qwen3", "llama", "qwen2")] + [("qwen3_5", ["HalfStep"] * 4)]


@pytest.mark.parametrize("family,parts", FAMILIES)
def test_models(family: str, parts: list[str], fusing: None):
    model = quantized(tiny(family), mx.float16)
    plain = generate(model)
    compile_steps(model.modules())
    fuse_layers(model.modules())
    for found, expected in zip(generate(model), plain, strict=True):
        assert relative_error(found, expected) < 1e-2  # half: rounding to 2**-11 about a dozen times a layer
    assert fused_parts(model.layers) == parts


def test_the_cache_holds_what_the_layer_writes(fusing: None):
    layer = one_layer()
    plain, expected = run(layer)
    fuse_layers([layer])
    found, cache = run(layer)
    assert cache.offset == expected.offset == 5 and "_fused" in vars(layer)
    for a, b in zip([*found, cache.keys, cache.values], [*plain, expected.keys, expected.values], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and relative_error(a, b) < 5e-2  # bfloat16


@pytest.mark.parametrize("change", [*NEARLY, *NEARLY_ATTENTION])
def test_a_layer_that_computes_something_else(change: Callable, fusing: None, monkeypatch: pytest.MonkeyPatch):
    layer = one_layer(change)
    cls, (plain, _) = type(layer), run(layer)
    fuse_layers([layer])
    found, _ = run(layer)
    if change in NEARLY:
        assert type(layer) is cls
        assert all(mx.array_equal(a, b) for a, b in zip(found, plain, strict=True))
    else:
        assert fused_parts([layer]) == ["HalfStep"]
        assert all(relative_error(a, b) < 5e-2 for a, b in zip(found, plain, strict=True))  # bfloat16
    # the trial alone tells it
    monkeypatch.setattr(fused, "_agree", lambda *_: True)
    layer.__class__ = cls
    vars(layer).pop("_fused", None)
    fuse_layers([layer])
    run(layer)
    assert fused_parts([layer]) == ["LayerStep"]


@pytest.mark.parametrize("change", OTHERS)
def test_a_layer_of_other_modules_is_left_alone(change: Callable):
    layer = one_layer(change)
    cls = type(layer)
    fuse_layers([layer])
    assert type(layer) is cls


@pytest.mark.parametrize("change", OTHER_ATTENTION)
def test_attention_of_other_modules_is_left_alone(change: Callable, fusing: None):
    layer = one_layer(change)
    fuse_layers([layer])
    run(layer)
    assert fused_parts([layer]) == ["HalfStep"]


@pytest.mark.parametrize("more", [{"dtype": mx.float32}, {"bits": 5}], ids=str)
def test_what_the_kernels_do_not_take(more: dict, fusing: None):
    layer = one_layer(**more)
    cls = type(layer)
    fuse_layers([layer])
    layer(normal(1, 1, 128, dtype=more.get("dtype", mx.bfloat16)), None, KVCache())
    assert type(layer) is cls


def test_kernels_that_do_not_fuse_leave_the_layer_alone():
    """A backend may have none."""
    layer = one_layer()
    cls = type(layer)
    fuse_layers([layer])
    with as_on_a_gpu(PlainKernels()):
        run(layer)
    assert type(layer) is cls


def test_fused_kernels_that_do_not_compile_leave_the_layer_alone(monkeypatch: pytest.MonkeyPatch):
    """As on a Mac, where only the trial can find it out. One warning for all layers."""

    def broken(*_, **__):
        raise RuntimeError("[metal::Device] Unable to build metal library")

    monkeypatch.setattr(FusingKernels, "normed_product", broken)
    kernels._warn_once.cache_clear()
    layers = [one_layer(), one_layer()]
    cls, (plain, _) = type(layers[0]), run(layers[0])
    fuse_layers(layers)
    with as_on_a_gpu(FusingKernels()), pytest.warns(RuntimeWarning, match="fused layers do not run") as caught:
        found, _ = run(layers[0])
        run(layers[1])
    assert len(caught) == 1 and all(type(layer) is cls for layer in layers)
    assert all(relative_error(a, b) < 5e-2 for a, b in zip(found, plain, strict=True))  # bfloat16


def test_other_calls_take_the_layer(fusing: None, taken: list):
    """More than a token or a text, a mask, another cache or none, training, another dtype."""
    layer, half = one_layer(), mx.bfloat16
    fuse_layers([layer])
    token = normal(1, 1, 128, dtype=half)
    layer(token, None, KVCache())
    assert len(taken) == 2 * len(fused.SCALES) + 1  # the trial's
    taken.clear()
    layer(normal(1, 2, 128, dtype=half), None, KVCache())
    layer(normal(2, 1, 128, dtype=half), None, KVCache())
    layer(token, mx.zeros((1, 1), half), KVCache())
    layer(token, None, RotatingKVCache(8))
    layer(token)
    layer(token.astype(mx.float32), None, KVCache())
    assert not taken
    layer(token, cache=KVCache())
    assert len(taken) == 1
    layer.train()
    layer(token, None, KVCache())
    assert len(taken) == 1


def test_replaced_weights_are_tried_anew_and_adapters_take_the_layer(fusing: None, taken: list):
    layer = one_layer()
    cls = type(layer)
    fuse_layers([layer])
    run(layer)
    first = taken[-1]
    down = layer.mlp.down_proj
    down.weight_codes = down.weight_codes[::-1]
    found, _ = run(layer)
    assert taken[-1] is not first and taken[-1] is vars(layer)["_fused"]
    with_step, layer.__class__ = type(layer), cls
    assert relative_error(found[-1], run(layer)[0][-1]) < 5e-2
    layer.__class__ = with_step
    before = run(layer)[0][-1]
    layer.self_attn.o_proj = layer.self_attn.o_proj.to_lora(r=2)
    layer.eval()
    run(layer)
    assert fused_parts([layer]) == ["HalfStep"]
    layer.mlp.down_proj = down.to_lora(r=2)
    layer.mlp.down_proj.lora_b = mx.ones(layer.mlp.down_proj.lora_b.shape)
    layer.eval()
    assert relative_error(run(layer)[0][-1], before) > 0.1  # the adapter counts
    assert type(layer) is cls


def test_traced_with_the_parameters_as_inputs(fusing: None):
    """As mlx_lm.lora compiles its step: no trial is possible, and none is held against the layer."""
    layer, token = one_layer(), normal(1, 1, 128, dtype=mx.bfloat16)
    fuse_layers([layer])
    traced = mx.compile(lambda x: layer(x, None, KVCache()), inputs=layer.state)
    found = traced(token)
    assert "_fused" not in vars(layer)
    assert relative_error(layer(token, None, KVCache()), found) < 5e-2
    assert "_fused" in vars(layer)


def test_a_trial_leaves_the_random_state_as_it_was(fusing: None):
    layer = one_layer()
    fuse_layers([layer])
    mx.random.seed(5)
    expected = mx.random.normal((2,)).tolist()
    mx.random.seed(5)
    run(layer)
    assert mx.random.normal((2,)).tolist() == expected


@require.emulator
@pytest.mark.parametrize(
    "change,part,launches",
    [
        (lambda _: None, "LayerStep", "gemv_mma heads gemv_mma gemv_mma gemv_mma"),
        (other_rope, "HalfStep", "gemv_mma " * 4),
    ],
)
def test_a_layer_by_its_kernels(change: Callable, part: str, launches: str, monkeypatch: pytest.MonkeyPatch):
    """Step and trial as on a GPU, every kernel emulated; then the launches of a token."""
    launched, launch = [], cuda._launch
    monkeypatch.setattr(cuda, "_launch", lambda stem, *more: launched.append(stem) or launch(stem, *more))
    monkeypatch.setattr(kernels, "backend", lambda: cuda)
    monkeypatch.setattr(ops, "pick", lambda *_: ops.Path.KERNELS)
    kernels.kernels_for.cache_clear()
    layer = one_layer(change)
    fuse_layers([layer])
    mx.disable_compile()  # the emulator needs values, mx.compile traces without them
    for _ in on_device("emulated"):
        for _ in range(2):
            launched.clear()
            layer(normal(1, 1, 128, dtype=mx.bfloat16), None, KVCache())
    mx.enable_compile()
    kernels.kernels_for.cache_clear()
    assert fused_parts([layer]) == [part] and launched == launches.split()


METAL_AFTER = "normed_rotate gemv rotate gemv"  # from the sum before the feed-forward half to the sum after it


@require.emulator
@pytest.mark.parametrize(
    "change,more,part,launches",
    [
        (lambda _: None, {}, "LayerStep", f"normed_rotate gemv heads rotate gemv {METAL_AFTER}"),
        (other_rope, {"bits": 3, "dtype": mx.float16}, "HalfStep", f"rotate gemv rotate gemv {METAL_AFTER}"),
    ],
    ids=["layer", "half"],
)
def test_a_layer_by_its_metal_kernels(
    change: Callable, more: dict, part: str, launches: str, monkeypatch: pytest.MonkeyPatch
):
    """As above; with two writes to the cache and attention, which are MLX's, a layer takes 12."""
    launched, kernel = [], metal._kernel
    monkeypatch.setattr(metal, "_kernel", lambda stem, *rest: launched.append(stem) or kernel(stem, *rest))
    monkeypatch.setattr(kernels, "backend", lambda: metal)
    monkeypatch.setattr(ops, "pick", lambda *_: ops.Path.KERNELS)
    kernels.kernels_for.cache_clear()
    kernel.cache_clear()
    layer = one_layer(change, **more)
    fuse_layers([layer])
    mx.disable_compile()  # the emulator needs values, mx.compile traces without them
    with metal_cpu.emulated():
        for _ in range(2):
            launched.clear()
            layer(normal(1, 1, 128, dtype=more.get("dtype", mx.bfloat16)), None, KVCache())
    mx.enable_compile()
    kernels.kernels_for.cache_clear()
    kernel.cache_clear()
    assert fused_parts([layer]) == [part] and launched == launches.split()
