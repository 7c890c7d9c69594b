"""The emulated rivals of the quality tables do what the projects' own encoders do."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks import quality_peers as peers  # noqa: E402


@pytest.mark.parametrize("group", [64, 128])
def test_affine_is_that_of_mlx(group: int):
    mx = pytest.importorskip("mlx.core")
    weight = torch.randn(48, 512, generator=torch.Generator().manual_seed(0)) + 0.1
    decoded, bits = peers.affine(weight, 4, group)
    expected = np.array(mx.dequantize(*mx.quantize(mx.array(weight.numpy()), group, 4), group, 4))
    assert bits == 4 + 32 / group
    # division in another order moves a value on a cell edge to the other code, once in tens of thousands
    assert (np.abs(decoded.numpy() - expected) < 1e-5).mean() > 0.9995


@pytest.mark.parametrize("quantizer", [*peers.PEERS.values(), *peers.ABLATION.values(), *peers.HLWQ.values()])
def test_decoded_weight_is_near(quantizer):
    weight = torch.randn(64, 576, generator=torch.Generator().manual_seed(1))
    decoded, bits = quantizer(weight, -1.0)
    assert decoded.shape == weight.shape
    error = float((decoded - weight).norm() / weight.norm())
    assert error < 1.6 * 2.0 ** -(bits - 0.5)  # a factor 2 for each bit; uniform grids at 4 bits are the worst


def test_gptq_lowers_the_output_error_of_the_affine_grid():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(32, 256, generator=generator)
    inputs = torch.randn(2000, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    hessian = inputs.T @ inputs / 2000
    errors = []
    for decoded, _ in (peers.affine(weight, 4, 64), peers.gptq_affine(weight, hessian, 4, 64)):
        errors.append(float((((decoded - weight) @ hessian) * (decoded - weight)).sum()))
    assert errors[1] < 0.7 * errors[0]


def test_unit_gain_restores_the_gain():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    for bits in (2, 3, 4):
        decoded, _ = peers.hlwq(weight, bits, 0.0, unit_gain=True)
        assert float((decoded * weight).sum() / weight.square().sum()) == pytest.approx(1, abs=2e-3)  # float16 norms
