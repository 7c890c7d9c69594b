"""A few or many rows times a weight: every width, mode, block size, ragged M, N and K, against numpy float64.

On the CPU the plain kernels run in Triton's interpreter; on a GPU those with inline assembly run as well.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from convert import reference  # noqa: E402
from convert.codebook import codebook  # noqa: E402
from convert.format import SUPPORTED_BITS, ModuleSpec  # noqa: E402
from hlwq_cuda.kernels import gemm, plain, prefill, tables  # noqa: E402
from hlwq_cuda.kernels.layout import pack_codes  # noqa: E402
from tests.triton_device import DEVICE, LAUNCH  # noqa: E402

ON_GPU = DEVICE == "cuda"
KINDS = [(bits, "exact") for bits in SUPPORTED_BITS] + [(bits, "int8") for bits in (2, 3, 4, 5)]
ROWS = (2, 3, 7, 8, 16, 33, 64, 257)
SMALL = [(5, 96, 32), (20, 192, 64), (18, 200, 128)]  # N, K, B: odd chunks, half a piece, padding
LARGE = [(1003, 4096, 128), (130, 4800, 64), (65, 1312, 32), (64, 9000, 128)]
# every kind meets every small shape, and one with every number of rows; of the large shapes it takes one
CASES = [
    (*kind, *shape) for i, kind in enumerate(KINDS) for shape in SMALL + ([LARGE[i % len(LARGE)]] if ON_GPU else [])
]


class Case:
    """A random weight and rows; norms over a wide range, as real models have them."""

    def __init__(self, bits: int, mode: str, rows: int, outputs: int, width: int, block: int) -> None:
        rng = np.random.default_rng([bits, rows, outputs, width])
        self.mode, self.spec = mode, ModuleSpec(bits, block, width)
        codes = rng.integers(0, 2**bits, (outputs, self.spec.padded_in_features)).astype(np.uint8)
        norms = np.exp(rng.normal(size=(outputs, self.spec.blocks))).astype(np.float16)
        self.encoded = reference.Encoded(codes, norms)
        x = rng.normal(size=(rows, width)) * np.exp(rng.normal(size=width))
        self.x = torch.from_numpy(x.astype(np.float32)).to(DEVICE)
        self.activation = plain.quantize_activation(self.x, block, mode)
        self.weight = [pack_codes(torch.from_numpy(codes), bits), torch.from_numpy(norms)]
        self.weight = [tensor.to(DEVICE) for tensor in (*self.weight, tables.make_table(codebook(bits), bits))]
        self.bias = torch.linspace(-1, 1, outputs, device=DEVICE)
        self.out = torch.full((rows, outputs), float("nan"), device=DEVICE)

    def check(self, tolerance: float) -> None:
        """Against the same rounded numbers in float64; `tolerance` is relative to |x| |w|."""
        spec = self.spec
        entries = tables.float_entries(self.weight[2].cpu(), spec.bits, self.mode).double().numpy()
        weight = entries[self.encoded.codes].reshape(len(self.encoded.codes), spec.blocks, -1)
        weight = (weight * self.encoded.norms[..., None].astype(np.float64)).reshape(len(weight), -1)
        x = self.activation.values.double().cpu().numpy().reshape(len(self.x), spec.blocks, -1)
        x = (x * self.activation.scales.double().cpu().numpy()[..., None]).reshape(len(x), -1)
        found = (self.out - self.bias).double().cpu().numpy()
        assert (np.abs(found - x @ weight.T) <= tolerance * (np.abs(x) @ np.abs(weight).T) + 1e-6).all()


@pytest.mark.parametrize(("bits", "mode", "outputs", "width", "block"), CASES)
def test_plain_kernel_matches_reference(bits: int, mode: str, outputs: int, width: int, block: int):
    for rows in (3, 17):
        case = Case(bits, mode, rows, outputs, width, block)
        gemm.gemm_plain(case.activation, *case.weight, case.bias, case.out, bits, block, mode)
        case.check(2**-18)  # float32 sums in another order


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="inline assembly needs a GPU")
@pytest.mark.parametrize(("bits", "mode", "outputs", "width", "block"), CASES)
def test_tensor_core_kernel_matches_reference(bits: int, mode: str, outputs: int, width: int, block: int):
    for rows in ROWS if (outputs, width, block) == SMALL[1] else (2, 17):
        case = Case(bits, mode, rows, outputs, width, block)
        config = gemm.pick(rows, outputs, case.activation.half_sums.shape[1], mode == "int8", 132)
        gemm.gemm(case.activation, *case.weight, case.bias, case.out, bits, block, mode, config, LAUNCH)
        case.check(2**-18)  # float32 sums in another order


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="inline assembly needs a GPU")
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_one_hot_returns_norm_times_centroid(bits: int):
    case = Case(bits, "exact", 16, 40, 256, 128)
    centroids = np.array(codebook(bits)).astype(np.float16).astype(np.float64)[case.encoded.codes]
    weight = (centroids.reshape(40, 2, 128) * case.encoded.norms.astype(np.float64)[..., None]).reshape(40, 256)
    config = gemm.pick(16, 40, 8, False, 132)
    for first in range(0, 256, 16):
        values = torch.zeros((16, 256), dtype=torch.float16, device=DEVICE)
        values[:, first : first + 16] = torch.eye(16)
        activation = plain.Activation(values, torch.ones((16, 2), device=DEVICE), torch.zeros((16, 8), device=DEVICE))
        gemm.gemm(activation, *case.weight, None, case.out, bits, 128, "exact", config, LAUNCH)
        assert np.array_equal(case.out.double().cpu().numpy(), weight[:, first : first + 16].T)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="inline assembly needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_dtypes(dtype: torch.dtype):
    case = Case(4, "int8", 9, 70, 512, 128)
    config = gemm.pick(9, 70, 16, True, 132)
    arguments = (case.activation, *case.weight, None)
    gemm.gemm(*arguments, case.out, 4, 128, "int8", config, LAUNCH)
    rounded = torch.empty_like(case.out, dtype=dtype)
    gemm.gemm(*arguments, rounded, 4, 128, "int8", config, LAUNCH)
    assert torch.equal(rounded, case.out.to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="inline assembly needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_many_rows_by_slices(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefill, "SLICE_BYTES", 1 << 19)  # two slices
    case = Case(4, "exact", 257, 300, 1024, 128)
    rotated = plain.rotate(case.x, 128).to(dtype)
    out = torch.full(case.out.shape, float("nan"), dtype=dtype, device=DEVICE)
    prefill.multiply(rotated, *case.weight, case.bias.to(dtype), out, 4, 128)
    weight = reference.decode_rotated(case.encoded, case.spec, codebook(4))
    x = rotated.double().cpu().numpy()
    expected = x @ weight.T + case.bias.double().cpu().numpy()
    # each weight and the result are rounded once, centroids to fp16
    tolerance = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-10
    assert (np.abs(out.double().cpu().numpy() - expected) <= tolerance * (np.abs(x) @ np.abs(weight).T + 1)).all()


def test_configurations():
    for rows, outputs, chunks in itertools.product((2, 8, 9, 64, 300), (5, 1024, 4096, 24576, 151936), (3, 128, 384)):
        for processors in (20, 108, 132, 170):
            config = gemm.pick(rows, outputs, chunks, rows % 2 == 0, processors)
            assert config.warps in (2, 4, 8) and config.output_tiles in (1, 2) and 1 <= config.row_tiles <= 4
            assert config.row_tiles == 4 or 8 * config.row_tiles >= rows
    assert gemm.pick(8, 4000, 128, True, 132).warps == 8  # few tiles: the warps of a block split K
    assert gemm.pick(8, 24000, 128, True, 132).warps < 8
    for configurations in gemm.MEASURED.values():  # every configuration serves its key
        for (outputs, width, row_tiles, _), config in configurations.items():
            assert outputs % 16 == width % 128 == 0 and config.row_tiles == row_tiles
