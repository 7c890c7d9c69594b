"""Layers and models on the Metal path, emulated: the same values as on the CPU path, which the reference checks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

import hlwq_mlx.__main__
from convert import packing, reference
from convert.codebook import codebook
from convert.format import ModuleSpec
from hlwq_mlx import kernels, metal, ops, selfcheck, siblings, steps, tune
from hlwq_mlx.layers import HLWQEmbedding, HLWQLinear, HLWQSwitchLinear
from hlwq_mlx.metal.decoder import Way
from tests import metal_cpu
from tests.metal_cpu import require

pytestmark = require.emulator

SPEC = ModuleSpec(4, 64, 128)


@pytest.fixture(autouse=True)
def on_metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every layer takes the kernels, which run on the emulator. Yields the names of the kernels launched."""
    launched: list[str] = []
    real = metal._kernel

    def counted(stem: str, *arguments):
        launched.append(stem)
        return real(stem, *arguments)

    monkeypatch.setattr(metal, "_kernel", counted)
    monkeypatch.setattr(kernels, "backend", lambda: metal)
    monkeypatch.setattr(ops, "pick", lambda *_, **__: ops.Path.KERNELS)
    kernels.kernels_for.cache_clear()
    real.cache_clear()
    mx.disable_compile()  # the emulator needs values, mx.compile traces without them
    with metal_cpu.emulated():
        yield launched
    mx.enable_compile()
    kernels.kernels_for.cache_clear()
    real.cache_clear()


def quantized(cls, rows: tuple[int, ...], spec: ModuleSpec = SPEC, bias: bool = False, seed: int = 0):
    """A layer with random weights, and the weights that its codes stand for, float64 [*rows, K]."""
    random = np.random.default_rng(seed)
    encoded = reference.encode(random.standard_normal((*rows, spec.in_features)).astype(np.float32), spec)
    layer = cls(rows, spec, codebook(spec.bits), mx.float32, bias=bias)
    layer.weight_codes = mx.array(packing.pack(encoded.codes, spec.bits))
    layer.weight_norms = mx.array(encoded.norms)
    if bias:
        layer.bias = mx.array(random.standard_normal(rows).astype(np.float32))
    layer.eval()
    return layer, reference.decode(encoded, spec, codebook(spec.bits))


def random_rows(*shape: int, seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def assert_close(got: mx.array, expected: np.ndarray) -> None:
    """Exact centroids, float32 sums of at most 128 products."""
    assert np.linalg.norm(np.array(got) - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("rows", [1, 8, 9])  # 9: decoded, then an MLX product
def test_linear(rows: int, on_metal: list[str]):
    layer, weight = quantized(HLWQLinear, (20,), bias=True)
    x = random_rows(1, rows, 128)
    assert_close(layer(x), np.array(x) @ weight.T + np.array(layer.bias))
    assert on_metal == ["rotate", "gemv" if rows <= 8 else "dequantize"]


def test_embedding_and_its_use_as_the_head(on_metal: list[str]):
    layer, weight = quantized(HLWQEmbedding, (33,))
    ids = mx.array([[3, 32], [0, 3]])
    assert np.abs(np.array(layer(ids)) - weight[np.array(ids)]).max() < 1e-5  # exact centroids, float32
    x = random_rows(2, 128)
    assert_close(layer.as_linear(x), np.array(x) @ weight.T)
    assert on_metal == ["embedding", "rotate", "gemv"]


@pytest.mark.parametrize("tokens,axes", [(1, 1), (2, 1), (2, 2), (7, 1)])
def test_experts(tokens: int, axes: int, on_metal: list[str]):
    """One row for all experts of a token (gate, up), one row an expert (down), and more tokens than experts."""
    layer, weight = quantized(HLWQSwitchLinear, (4, 12), bias=True)
    experts = np.random.default_rng(2).integers(0, 4, (tokens, 2))
    x = random_rows(tokens, axes, 1, 128)
    got = np.array(layer(x, mx.array(experts)))
    for token in range(tokens):
        for slot, expert in enumerate(experts[token]):
            row = np.array(x)[token, slot % axes, 0]
            assert_close(mx.array(got[token, slot, 0]), weight[expert] @ row + np.array(layer.bias)[expert])
    assert sorted(on_metal) == (["gemv", "rotate"] if tokens * 2 < 8 else ["dequantize", "rotate"])


class Attention(nn.Module):
    """Three layers that read one input, the third with other bits."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = {}
        for i, (name, spec) in enumerate((("q_proj", SPEC), ("k_proj", SPEC), ("v_proj", ModuleSpec(2, 64, 128)))):
            layer, weight = quantized(HLWQLinear, (12 + 4 * i,), spec, seed=i)
            setattr(self, name, layer)
            self.__dict__.setdefault("expected", {})[name] = weight


def test_siblings_share_a_rotation_and_a_launch(on_metal: list[str]):
    attention = Attention()
    siblings.link([attention])
    for seed in (3, 4):
        x = random_rows(1, 128, seed=seed)
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        for y, name in ((q, "q_proj"), (k, "k_proj"), (v, "v_proj")):
            assert_close(y, np.array(x) @ attention.expected[name].T)
    assert on_metal == ["rotate", "gemv", "rotate", "gemv"] * 2
    assert attention.q_proj._siblings._inputs == ()  # nothing is held once every layer was called
    assert attention.v_proj._siblings is None


def test_siblings_called_in_any_order_or_with_other_inputs(on_metal: list[str]):
    attention = Attention()
    siblings.link([attention])
    a, b = random_rows(1, 128, seed=5), random_rows(1, 128, seed=6)
    for layer, name, x in (
        (attention.k_proj, "k_proj", a),
        (attention.k_proj, "k_proj", a),
        (attention.q_proj, "q_proj", b),
        (attention.q_proj, "q_proj", a),
    ):
        assert_close(layer(x), np.array(x) @ attention.expected[name].T)
    replaced, weight = quantized(HLWQLinear, (12,), seed=9)
    attention.q_proj.weight_codes, attention.q_proj.weight_norms = replaced.weight_codes, replaced.weight_norms
    assert_close(attention.q_proj(b), np.array(b) @ weight.T)


@pytest.mark.parametrize("tokens", [1, 7])
def test_experts_of_one_input_share_a_rotation_and_a_launch(tokens: int, on_metal: list[str]):
    """gate and up of a mixture of experts: decode, and a prompt of more pairs than twice the experts."""
    module, weights = nn.Module(), {}
    for i, name in enumerate(("gate_proj", "up_proj")):
        module[name], weights[name] = quantized(HLWQSwitchLinear, (4, 12 + i), seed=i)
    siblings.link([module])
    x, experts = random_rows(tokens, 1, 1, 128), np.random.default_rng(2).integers(0, 4, (tokens, 2))
    indices = mx.array(experts)
    for name in ("up_proj", "gate_proj"):
        y = np.array(module[name](x, indices, sorted_indices=False))
        for token, slot in np.ndindex(*experts.shape):
            assert_close(mx.array(y[token, slot, 0]), weights[name][experts[token, slot]] @ np.array(x)[token, 0, 0])
    assert sorted(on_metal) == (["gemv", "rotate"] if tokens == 1 else ["dequantize", "rotate"])
    module.up_proj(x, indices)
    module.gate_proj(x, mx.array(1 - experts % 2))  # other experts: computed again
    assert len(on_metal) == 6


class FeedForward(nn.Module):
    """As mlx-lm's architectures have it."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["expected"] = {}
        for i, (name, rows) in enumerate((("gate_proj", 128), ("up_proj", 128), ("down_proj", 20))):
            self[name], self.expected[name] = quantized(HLWQLinear, (rows,), seed=i)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))

    def reference(self, x: mx.array) -> np.ndarray:
        gate, up = (np.array(x) @ self.expected[name].T for name in ("gate_proj", "up_proj"))
        return (gate / (1 + np.exp(-gate)) * up) @ self.expected["down_proj"].T


def test_a_compiled_step_notices_what_is_replaced(on_metal: list[str]):
    module, x = FeedForward().eval(), random_rows(1, 128, seed=3)
    siblings.link([module])
    steps.compile_steps([module])
    assert isinstance(module, FeedForward) and type(module).__name__ == "FeedForward"
    for _ in range(2):
        assert_close(module(x), module.reference(x))
    step = module.__dict__["_step"]
    assert step.current() and on_metal == ["rotate", "gemv"] * 4
    other, module.expected["down_proj"] = quantized(HLWQLinear, (20,), seed=9)
    module.down_proj.weight_codes, module.down_proj.weight_norms = other.weight_codes, other.weight_norms
    assert not step.current()
    assert_close(module(x), module.reference(x))
    module.down_proj = module.down_proj.to_lora(r=2)
    module.down_proj.lora_b = mx.ones(module.down_proj.lora_b.shape)
    module.eval()
    assert np.abs(np.array(module(x)) - module.reference(x)).max() > 0.1  # the adapter counts


def test_a_prompt_and_training_take_no_compiled_step():
    module = FeedForward().eval()
    steps.compile_steps([module])
    x = random_rows(9, 128, seed=3)
    assert_close(module(x), module.reference(x))
    module.train()
    assert_close(module(x[:1]), module.reference(x[:1]))
    assert "_step" not in module.__dict__


def test_gradient_of_the_input():
    layer, weight = quantized(HLWQLinear, (20,))
    layer.train()
    x, target = random_rows(3, 128), random_rows(3, 20, seed=8)
    gradient = mx.grad(lambda x: (layer(x) * target).sum())(x)
    assert_close(gradient, np.array(target) @ weight)


def test_adapters_train_and_refuse_to_fuse():
    layer, _ = quantized(HLWQLinear, (20,))
    adapted = layer.to_lora(r=4, scale=2.0)
    adapted.train()
    x, target = random_rows(16, 128), random_rows(16, 20, seed=8)
    optimizer = optim.Adam(learning_rate=0.02)
    step = nn.value_and_grad(adapted, lambda model: ((model(x) - target) ** 2).mean())
    losses = []
    for _ in range(8):
        loss, gradients = step(adapted)
        optimizer.update(adapted, gradients)
        mx.eval(adapted.parameters())
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert set(dict(nn.utils.tree_flatten(adapted.trainable_parameters()))) == {"lora_a", "lora_b"}
    with pytest.raises(ValueError, match="cannot be fused"):
        adapted.fuse()


def test_a_kernel_that_does_not_compile_gives_one_warning(monkeypatch: pytest.MonkeyPatch):
    def broken(*_):
        raise RuntimeError("[metal::Device] Unable to build metal library")

    monkeypatch.setattr(metal, "_kernel", broken)
    kernels._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="plain MLX operations") as caught:
        assert not kernels.kernels_for(codebook(4), SPEC).work(mx.float16)
        assert not kernels.kernels_for(codebook(2), ModuleSpec(2, 64, 128)).work(mx.float16)
    assert len(caught) == 1


def test_selfcheck_passes_and_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selfcheck, "SUPPORTED_BITS", (4,))
    monkeypatch.setattr(selfcheck, "DTYPES", (mx.float16,))
    monkeypatch.setattr(selfcheck, "_ways", lambda *_: (Way.TABLE, Way.POLYNOMIAL))
    monkeypatch.setattr(selfcheck, "TIMED_SHAPE", (8, 128))
    results = {result.name: result for result in selfcheck.selfcheck()}
    assert all(result.passed for result in results.values())
    assert {name.split()[0] for name in results} == {"rotate", "heads", "products", "fused", "speed", "embedding"}
    assert results["speed 4 bits polynomial M = 1"].gigabytes_per_second > 0
    real = metal.rotate
    monkeypatch.setattr(metal, "rotate", lambda x, block_size: real(x, block_size) * 1.01)
    assert not next(selfcheck.selfcheck()).passed


def test_tune_stores_the_fastest_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tune._stored.cache_clear()
    table = codebook(4)
    assert tune.preferred_way(table) is Way.TABLE  # nothing measured
    measured = {Way.POLYNOMIAL: 20.0, Way.PAIRS: 10.0, Way.TABLE: 15.0}
    monkeypatch.setattr(tune, "_microseconds", lambda _metal, _codebook, way: measured[way])
    times = {way.value: microseconds for way, microseconds in measured.items()}
    assert tune.tune({4: table, 8: codebook(8)}) == {4: times, 8: {"table": 15.0}}
    assert tune.preferred_way(table) is Way.PAIRS
    assert tune.preferred_way(codebook(2)) is Way.TABLE  # not measured
    (tmp_path / "hlwq" / "metal_ways.json").write_text("{")
    tune._stored.cache_clear()
    with pytest.raises(ValueError, match="is not JSON; delete it"):
        tune.preferred_way(table)
    tune._stored.cache_clear()


def test_commands_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(kernels, "backend", lambda: None)
    for command in ("selfcheck", "tune"):
        assert hlwq_mlx.__main__.main([command]) == 1
        assert "error: " in capsys.readouterr().err
