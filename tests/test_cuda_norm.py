"""norm.py and activation.py against numpy float64: values, scales, tails, every block size and format.

Without a GPU the kernels run in Triton's interpreter (see conftest.py).
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from convert import reference  # noqa: E402
from hlwq_cuda.kernels import activation, norm  # noqa: E402
from hlwq_cuda.kernels.plain import Activation  # noqa: E402
from tests.triton_device import DEVICE, LAUNCH, poisoned_activation  # noqa: E402

SHAPES = [(576, 64), (576, 128), (1024, 128), (96, 32), (100, 32), (8, 32)]  # K, B; some with a padded last block


def check(out: Activation, expected: np.ndarray, block: int, format: str) -> None:
    """`out` holds `expected` (float64 [K]) in the format that a linear layer reads."""
    got = out.values.cpu().numpy().astype(np.float64)
    if format == "plain":
        np.testing.assert_allclose(got, expected, rtol=2**-10, atol=1e-6)  # one rounding to fp16 after fp32 arithmetic
        return
    rotated = reference.rotate(expected, block) / np.sqrt(block)
    peak = np.abs(reference.blocks(rotated, block)).max(-1).repeat(block)
    scale = out.scales.cpu().numpy().astype(np.float64).repeat(block)
    error = np.abs(got * scale - rotated)
    if format == "exact":
        assert (peak <= scale * (1 + 1e-6)).all()  # values below 1
        assert (error <= 2**-11 * np.abs(rotated) + 2e-6 * peak).all()  # fp16 rounding, fp32 butterflies
        return
    np.testing.assert_allclose(scale, peak / 127, rtol=1e-5)
    assert np.abs(got).max() == 127
    assert (error <= 0.501 * scale).all()  # half a step, and fp32 before the rounding
    np.testing.assert_array_equal(out.half_sums.cpu().numpy(), got.reshape(-1, 32).sum(-1) / 2)


@pytest.mark.parametrize("format", ["plain", "exact", "int8"])
@pytest.mark.parametrize("size,block", SHAPES)
@pytest.mark.parametrize("add", [False, True])
def test_norm_matches_reference(size: int, block: int, format: str, add: bool) -> None:
    rng = np.random.default_rng(size)
    hidden, delta = rng.normal(size=size).astype(np.float32), rng.normal(size=size).astype(np.float16)
    gain = rng.uniform(0.5, 1.5, size).astype(np.float16)
    out = poisoned_activation(size, block, format, 1e-6)
    new_hidden = torch.full((size,), float("nan"), device=DEVICE)
    norm.norm(
        torch.tensor(hidden, device=DEVICE),
        torch.tensor(delta, device=DEVICE) if add else None,
        torch.tensor(gain, device=DEVICE),
        1e-6,
        new_hidden,
        out,
        block,
        format,
        LAUNCH,
    )
    total = hidden.astype(np.float64) + (delta if add else 0.0)
    if add:
        np.testing.assert_allclose(new_hidden.cpu().numpy(), total, rtol=2**-23, atol=1e-7)
    else:
        assert torch.isnan(new_hidden).all()
    inverse_rms = 1 / np.sqrt((total**2).mean() + 1e-6)
    if format == "plain":
        check(out, total * inverse_rms * gain, block, format)
    else:  # the product multiplies by the factor
        check(out, total * gain, block, format)
        left = 1 / np.sqrt(out.mean_squares.double().cpu().numpy().sum() + out.eps)
        np.testing.assert_allclose(left, inverse_rms, rtol=1e-6)


@pytest.mark.parametrize("format", ["plain", "exact", "int8"])
@pytest.mark.parametrize("size,block", SHAPES)
def test_silu_mul_matches_reference(size: int, block: int, format: str) -> None:
    gate_up = np.random.default_rng(size).normal(size=2 * size).astype(np.float32) * 3
    out = poisoned_activation(size, block, format)
    activation.silu_mul(torch.tensor(gate_up, device=DEVICE), out, block, format, LAUNCH)
    gate, up = np.split(gate_up.astype(np.float64), 2)
    check(out, gate / (1 + np.exp(-gate)) * up, block, format)


def test_zero_row_is_exactly_zero() -> None:
    """An all-zero block has no peak to scale by; it must give zeros, not NaN."""
    for format in ("exact", "int8"):
        out = poisoned_activation(64, 32, format)
        activation.silu_mul(torch.zeros(128, device=DEVICE), out, 32, format, LAUNCH)
        assert (out.values == 0).all() and torch.isfinite(out.scales).all()
