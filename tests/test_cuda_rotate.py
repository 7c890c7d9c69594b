"""The rotation, the scaled rotation and the embedding kernels against numpy float64."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from convert import reference  # noqa: E402
from convert.codebook import codebook  # noqa: E402
from convert.format import SUPPORTED_BITS, ModuleSpec  # noqa: E402
from hlwq_cuda.kernels import embedding, plain, rotate, tables  # noqa: E402
from hlwq_cuda.kernels.layout import pack_codes  # noqa: E402
from tests.triton_device import DEVICE, LAUNCH  # noqa: E402

SHAPES = [(1, 128, 128), (3, 200, 128), (2, 96, 32), (5, 576, 64)]  # M, K, B
if DEVICE == "cuda":
    SHAPES += [(257, 4096, 128), (64, 8992, 32), (1, 12288, 128)]


@pytest.mark.parametrize(("rows", "width", "block"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotate_matches_reference(rows: int, width: int, block: int, dtype: torch.dtype):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    out = rotate.rotate(x, block, LAUNCH)
    expected = reference.rotate(x.double().cpu().numpy(), block)
    cut_off = 2 if DEVICE == "cpu" else 1  # the interpreter cuts bfloat16 off where a GPU rounds
    rounding = {torch.float32: 2**-21, torch.float16: 2**-11, torch.bfloat16: 2**-8 * cut_off}[dtype]
    assert out.dtype == dtype and out.shape == expected.shape
    np.testing.assert_allclose(out.double().cpu().numpy(), expected, rtol=rounding, atol=2e-6)


@pytest.mark.parametrize(("rows", "width", "block"), SHAPES)
@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_quantize_activation_matches_plain(rows: int, width: int, block: int, mode: str):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x[0, :block] = 0  # a block without a largest magnitude
    out = rotate.quantize_activation(x, block, mode, LAUNCH)
    rotated = reference.blocks(reference.rotate(x.double().cpu().numpy(), block), block) / np.sqrt(block)
    values = out.values.double().cpu().numpy().reshape(rotated.shape)
    scales = out.scales.double().cpu().numpy()[..., None]
    # int8: half a step; exact: fp16; both after sums in float32
    bound = (
        (0.501 if mode == "int8" else 2**-11) * scales * (1 if mode == "int8" else np.maximum(np.abs(values), 2**-13))
    )
    assert (np.abs(values * scales - rotated) <= bound + 1e-6 * np.abs(rotated).max()).all()
    assert not values[0, 0].any()
    if mode == "int8":
        sums = out.values.float().unflatten(-1, (-1, 32)).sum(-1) / 2
        assert torch.equal(out.half_sums, sums)


def test_large_bf16_activations_stay_finite():
    x = (torch.randn(1, 256, generator=torch.Generator().manual_seed(0)) * 1e6).bfloat16().to(DEVICE)
    out = rotate.quantize_activation(x, 128, "exact", LAUNCH)
    rotated = plain.rotate(x.float(), 128).view(2, 128) / 128**0.5
    found = out.values.float().view(2, 128) * out.scales.view(2, 1)
    torch.testing.assert_close(found, rotated, rtol=2**-11, atol=float(rotated.abs().max()) * 2**-14)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
@pytest.mark.parametrize(("width", "block"), [(128, 128), (200, 128), (96, 32)])
def test_embedding_matches_reference(bits: int, width: int, block: int):
    rng = np.random.default_rng(bits)
    spec = ModuleSpec(bits, block, width)
    codes = rng.integers(0, 2**bits, (11, spec.padded_in_features)).astype(np.uint8)
    norms = rng.uniform(0.5, 2, (11, spec.blocks)).astype(np.float16)
    ids = torch.tensor([[10, 0], [3, 3]], device=DEVICE)
    arguments = (
        pack_codes(torch.from_numpy(codes), bits),
        torch.from_numpy(norms),
        tables.make_table(codebook(bits), bits),
    )
    arguments = [tensor.to(DEVICE) for tensor in arguments]
    out = embedding.embedding(ids, *arguments, bits, block, width, torch.float32, LAUNCH)
    expected = reference.decode(reference.Encoded(codes, norms), spec, codebook(bits))[ids.cpu().numpy()]
    assert np.linalg.norm(out.double().cpu().numpy() - expected) < 2**-11 * np.linalg.norm(expected)  # fp16 centroids
