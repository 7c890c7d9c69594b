"""delta.py and gated.py against numpy float64: tokens in a row, every format, heads wider and narrower than blocks.

Without a GPU the kernels run in Triton's interpreter (see conftest.py).
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from convert import reference  # noqa: E402
from hlwq_cuda.kernels import delta, gated  # noqa: E402
from tests.triton_device import DEVICE, LAUNCH, poisoned_activation  # noqa: E402

EPS = 1e-6


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def expected_delta(
    rows: np.ndarray,  # [T, C + HV * DV + 2 HV]
    weight: np.ndarray,  # [C, taps]
    log_decay: np.ndarray,  # [HV]
    time_bias: np.ndarray,
    past: np.ndarray,  # [taps, C], the oldest first
    state: np.ndarray,  # [HV, DK, DV]
    shape: delta.Shape,
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [T, HV * DV] and the last state, in float64, by the recurrence as it is written."""
    heads, group = shape.value_heads, shape.value_heads // shape.key_heads
    inputs = np.concatenate([past[1:], rows[:, : shape.channels]])
    out = []
    for t, row in enumerate(rows):
        mixed = silu((inputs[t : t + shape.taps] * weight.T).sum(0))
        q, k, v = np.split(mixed, np.cumsum([shape.key_heads * shape.key_dim] * 2))
        q, k = (np.repeat(x.reshape(shape.key_heads, -1), group, 0) for x in (q, k))
        q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        b, a = row[-2 * heads : -heads], row[-heads:]
        state = state * np.exp(-np.exp(log_decay) * np.log1p(np.exp(a + time_bias)))[:, None, None]
        change = (v.reshape(heads, -1) - np.einsum("hkv,hk->hv", state, k)) / (1 + np.exp(-b))[:, None]
        state = state + k[:, :, None] * change[:, None, :]
        out.append(np.einsum("hkv,hk->hv", state, q).ravel() / np.sqrt(shape.key_dim))
    return np.stack(out), state


@pytest.mark.parametrize(
    "shape",
    [delta.Shape(2, 4, 128, 128, 4), delta.Shape(3, 3, 16, 64, 4), delta.Shape(1, 3, 32, 16, 2)],
    ids=lambda shape: "-".join(map(str, vars(shape).values())),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_follows_the_recurrence(shape: delta.Shape, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    first, tokens = 6, 5  # the ring begins in its middle, and turns over
    values = shape.value_heads * shape.value_dim
    rows = torch.from_numpy(rng.normal(size=(tokens, shape.channels + values + 2 * shape.value_heads))).to(dtype)
    weight = torch.from_numpy(rng.normal(size=(shape.channels, shape.taps))).to(dtype)
    log_decay, time_bias = (torch.from_numpy(rng.normal(size=shape.value_heads)).to(dtype) for _ in range(2))
    past = rng.normal(size=(shape.taps, shape.channels)).astype(np.float32)
    state = rng.normal(size=(shape.value_heads, shape.key_dim, shape.value_dim)).astype(np.float32)

    ring = torch.from_numpy(np.roll(past, first % shape.taps, 0)).to(DEVICE)
    own = torch.from_numpy(state.copy()).to(DEVICE)
    parameters = [tensor.to(DEVICE) for tensor in (weight, log_decay, time_bias)]
    found = []
    for t in range(tokens):
        position = torch.tensor([first + t], device=DEVICE)
        out = torch.full((values,), float("nan"), device=DEVICE)
        delta.delta(rows[t].to(DEVICE), *parameters, position, ring, own, out, shape, LAUNCH)
        found.append(out.double().cpu().numpy())

    exact = [tensor.double().numpy() for tensor in (rows, weight, log_decay, time_bias)]
    expected, expected_state = expected_delta(*exact, past.astype(np.float64), state.astype(np.float64), shape)
    # float32 arithmetic on numbers of order one, sums of at most 128
    np.testing.assert_allclose(np.stack(found), expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(own.cpu().numpy(), expected_state, rtol=1e-4, atol=2e-5)
    newest = rows[:, : shape.channels].double().numpy()[-shape.taps :]
    np.testing.assert_array_equal(np.roll(ring.cpu().numpy(), -(first + tokens) % shape.taps, 0), newest)


def check_row(out, expected: np.ndarray, block: int, format: str) -> None:
    """A formatted row holds `expected`: float32 arithmetic, then one rounding to fp16 or int8 of the rotated row."""
    got = out.values.double().cpu().numpy()
    if format == "plain":
        np.testing.assert_allclose(got, expected, rtol=2**-10, atol=1e-6)
        return
    rotated = reference.rotate(expected, block) / np.sqrt(block)
    scale = out.scales.double().cpu().numpy().repeat(block)
    step = 0.501 * scale if format == "int8" else 2**-11 * np.abs(rotated) + 2e-6 * scale
    assert (np.abs(got * scale - rotated) <= step).all()


@pytest.mark.parametrize("format", ["plain", "exact", "int8"])
@pytest.mark.parametrize(("heads", "width", "block"), [(4, 128, 128), (3, 128, 32), (5, 16, 64), (9, 32, 128)])
def test_gated_norm_matches_reference(heads: int, width: int, block: int, format: str) -> None:
    rng = np.random.default_rng(width)
    x, gate = rng.normal(size=(2, heads, width)).astype(np.float32)
    gain = rng.uniform(0.5, 1.5, width).astype(np.float32)
    out = poisoned_activation(heads * width, block, format)
    arguments = [torch.from_numpy(value).to(DEVICE) for value in (x.ravel(), gate.ravel(), gain)]
    delta.gated_norm(*arguments, EPS, out, block, format, LAUNCH)
    x, gate = x.astype(np.float64), gate.astype(np.float64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * gain * silu(gate)
    check_row(out, expected.ravel(), block, format)


def test_the_order_keeps_rotary_pairs_half_a_head_apart() -> None:
    for head_dim, rotary_dim in ((256, 64), (48, 12), (32, 32), (40, 2)):
        order = gated.rotary_order(head_dim, rotary_dim)
        assert sorted(order) == list(range(head_dim))
        for i in range(rotary_dim // 2):
            assert order.index(i + rotary_dim // 2) - order.index(i) == head_dim // 2


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 1, 256), (3, 2, 48)])
def test_arrange_takes_the_gates_out(heads: int, kv_heads: int, head_dim: int) -> None:
    rng = np.random.default_rng(0)
    row = rng.normal(size=(2 * heads + 2 * kv_heads, head_dim)).astype(np.float32)
    order = rng.permutation(head_dim).astype(np.int32)
    out = torch.full(((heads + 2 * kv_heads) * head_dim,), float("nan"), device=DEVICE)
    gated.arrange(torch.from_numpy(row.ravel()).to(DEVICE), torch.from_numpy(order).to(DEVICE), out, heads, LAUNCH)
    q, k, v = row[: 2 * heads : 2], row[2 * heads : -kv_heads], row[-kv_heads:]
    expected = np.concatenate([q[:, order], k[:, order], v])
    np.testing.assert_array_equal(out.cpu().numpy(), expected.ravel())


@pytest.mark.parametrize("format", ["plain", "exact", "int8"])
@pytest.mark.parametrize(("heads", "head_dim", "block"), [(2, 256, 128), (3, 48, 128), (3, 24, 32)])
def test_gate_matches_reference(heads: int, head_dim: int, block: int, format: str) -> None:
    rng = np.random.default_rng(head_dim)
    x = rng.normal(size=(heads, head_dim)).astype(np.float32)
    row = rng.normal(size=(2 * heads + 2, head_dim)).astype(np.float32)
    out = poisoned_activation(heads * head_dim, block, format)
    arguments = [torch.from_numpy(value.ravel()).to(DEVICE) for value in (x, row)]
    gated.gate(*arguments, head_dim, out, block, format, LAUNCH)
    expected = x.astype(np.float64) / (1 + np.exp(-row[1 : 2 * heads : 2].astype(np.float64)))
    check_row(out, expected.ravel(), block, format)
