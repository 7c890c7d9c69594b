"""One row times a weight: every width, mode, block size, ragged N and K, against numpy float64.

On the CPU the plain kernel runs in Triton's interpreter (without inline assembly); on a GPU all three bodies run.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from convert import reference  # noqa: E402
from convert.codebook import codebook  # noqa: E402
from convert.format import SUPPORTED_BITS, ModuleSpec  # noqa: E402
from hlwq_cuda.kernels import gemv, plain, tables  # noqa: E402
from hlwq_cuda.kernels.layout import pack_codes  # noqa: E402
from tests.triton_device import DEVICE, LAUNCH  # noqa: E402

ON_GPU = DEVICE == "cuda"
BODIES = ["plain", "ptx", "gluon"] if ON_GPU else ["plain"]
KINDS = [(bits, "exact") for bits in SUPPORTED_BITS] + [(bits, "int8") for bits in (2, 3, 4, 5)]
SMALL = [(5, 96, 32), (7, 192, 64), (3, 200, 128)]  # N, K, B: odd chunks, rows that no configuration divides, padding
LARGE = [(1003, 4096, 128), (130, 4800, 64), (65, 1312, 32), (64, 9000, 128), (4096, 2048, 128)]
# every kind, body and block size meet; of the large shapes each kind takes two, so that a GPU compiles in minutes
CASES = [
    (*kind, *shape, body)
    for i, kind in enumerate(KINDS)
    for body in BODIES
    for shape in SMALL + ([LARGE[(i + k) % len(LARGE)] for k in (0, 2)] if body == "gluon" else [])
]


class Case:
    """A random weight and row; norms over a wide range, as real models have them."""

    def __init__(self, bits: int, rows: int, width: int, block: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.spec = ModuleSpec(bits, block, width)
        codes = rng.integers(0, 2**bits, (rows, self.spec.padded_in_features)).astype(np.uint8)
        norms = np.exp(rng.normal(size=(rows, self.spec.blocks))).astype(np.float16)
        self.encoded = reference.Encoded(codes, norms)
        self.x = rng.normal(size=width).astype(np.float32) * np.exp(rng.normal(size=width)).astype(np.float32)
        self.codes = pack_codes(torch.from_numpy(codes), bits).to(DEVICE)
        self.norms = torch.from_numpy(norms).to(DEVICE)
        self.table = tables.make_table(codebook(bits), bits).to(DEVICE)

    def run(self, activation, mode: str, body: str, bias=None, dtype=torch.float32) -> torch.Tensor:
        rows, spec = len(self.codes), self.spec
        # inline assembly takes whole units: a lane must hold one or more, as in every configuration of gemv.pick
        config = gemv.Config(2, 64, 2, body == "gluon") if ON_GPU else gemv.Config(1, 4, 4, False)
        out = torch.full((rows,), float("nan"), dtype=dtype, device=DEVICE)
        weight = (self.codes, self.norms, self.table, bias, out, spec.bits, spec.block_size, mode)
        gemv.gemv(activation, *weight, config, LAUNCH, ptx=body != "plain")
        return out

    def magnitudes(self) -> np.ndarray:
        """|x| |w| in the rotated basis, [N]: what rounding errors are relative to."""
        weight = reference.decode_rotated(self.encoded, self.spec, codebook(self.spec.bits))
        return np.abs(weight) @ np.abs(reference.rotate(self.x.astype(np.float64), self.spec.block_size))

    def bound(self, activation: plain.Activation, mode: str) -> np.ndarray:
        """How far a product may be from the reference, [N].

        exact: centroids and activations are rounded to fp16, 2**-11 each, and so are sums of eight products.
        int8: half a step in every activation and every centroid.
        """
        if mode == "exact":
            return 2**-9 * self.magnitudes()
        table = np.array(codebook(self.spec.bits))
        rounded = tables.float_entries(self.table.cpu(), self.spec.bits, "int8").double().numpy()
        weight = reference.decode_rotated(self.encoded, self.spec, np.abs(table) + np.abs(rounded - table).max())
        half_step = activation.scales.double().cpu().numpy()[0].repeat(self.spec.block_size) / 2
        wrong_weight = np.abs(rounded - table).max() / table.max() * np.abs(weight).max()
        x = np.abs(reference.rotate(self.x.astype(np.float64), self.spec.block_size))
        return weight @ (half_step * self.spec.block_size**0.5) + wrong_weight * x.sum()

    def activation(self, mode: str) -> plain.Activation:
        return plain.quantize_activation(torch.from_numpy(self.x)[None].to(DEVICE), self.spec.block_size, mode)


@pytest.mark.parametrize(("bits", "mode", "rows", "width", "block", "body"), CASES)
def test_gemv_matches_reference(bits: int, mode: str, rows: int, width: int, block: int, body: str):
    case = Case(bits, rows, width, block)
    bias = torch.linspace(-1, 1, rows, device=DEVICE)
    activation = case.activation(mode)
    out = case.run(activation, mode, body, bias)
    found = (out - bias).double().cpu().numpy()
    expected = reference.matmul(case.x, case.encoded, case.spec, codebook(bits))
    assert (np.abs(found - expected) <= case.bound(activation, mode)).all()
    same_numbers = plain.multiply(activation, case.codes, case.norms, case.table, bits, block, mode)[0]
    # the plain body, and integers: float32 sums in another order; else sums of eight products in fp16
    tolerance = 2**-11 if mode == "exact" and body != "plain" else 2**-18
    assert (np.abs(found - same_numbers.double().cpu().numpy()) <= tolerance * case.magnitudes() + 1e-6).all()


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_one_hot_returns_norm_times_centroid(bits: int, body: str):
    blocks = 2 if ON_GPU else 1
    case = Case(bits, 3, blocks * 128, 128)
    centroids = torch.tensor(codebook(bits)).half().double()[torch.from_numpy(case.encoded.codes).int()]
    weight = centroids.view(3, blocks, 128) * torch.from_numpy(case.encoded.norms).double()[..., None]
    for k in (0, 1, 6, 31, 47, 127, 128, 190, 255) if ON_GPU else (1, 30):
        values = torch.zeros(blocks * 128, dtype=torch.float16, device=DEVICE)
        values[k] = 1
        activation = plain.Activation(values, torch.ones(blocks, device=DEVICE), torch.zeros(blocks * 4, device=DEVICE))
        out = case.run(activation, "exact", body)
        assert torch.equal(out.double().cpu(), weight.reshape(3, -1)[:, k])


@pytest.mark.parametrize("body", BODIES)
def test_factor_of_a_norm(body: str):
    """The sums, not the bias, are multiplied by 1 / sqrt(sum(mean_squares) + eps)."""
    case = Case(4, 5, 320, 64)
    activation = case.activation("int8")
    squares = torch.linspace(0.1, 0.9, 5, device=DEVICE)
    bias = torch.linspace(1, 2, 5, device=DEVICE)
    expected = case.run(activation, "int8", body) * (squares.sum() + 0.25) ** -0.5 + bias
    found = case.run(activation._replace(mean_squares=squares, eps=0.25), "int8", body, bias)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_dtypes(dtype: torch.dtype, body: str):
    case = Case(4, 6, 128, 128)
    activation = case.activation("exact")
    expected = case.run(activation, "exact", body).to(dtype)
    out = case.run(activation, "exact", body, dtype=dtype)
    assert out.dtype == dtype
    # the interpreter cuts bfloat16 off where a GPU rounds
    torch.testing.assert_close(out, expected, rtol=0 if ON_GPU else 2**-7, atol=0)


def test_a_lane_takes_whole_units():
    case = Case(4, 6, 128, 128)
    activation = case.activation("exact")
    out = torch.empty(6, device=DEVICE)
    weight = (case.codes, case.norms, case.table, None, out, 4, 128, "exact")
    with pytest.raises(ValueError, match="less than a unit"):
        gemv.gemv(activation, *weight, gemv.Config(1, 64, 4, False), LAUNCH)


def test_configurations():
    for rows, units in ((4096, 128), (24576, 128), (151936, 128), (1024, 128), (2048, 256), (7, 3), (131, 1000)):
        for processors in (20, 108, 132, 170):
            config = gemv.pick(rows, units, gluon=True, processors=processors)
            assert config.units in (32, 64, 128) and config.warps == config.units // 32
            assert config.rows in (2, 4)
    assert gemv.pick(24576, 128, True, 132) == gemv.pick(4096, 384, True, 132) == gemv.Config(4, 64, 2, True)
    # 160 = 5 x 32: larger steps would idle a part of the lanes
    assert gemv.pick(4096, 160, True, 132).units == 32
    # small N: more thread blocks and warps
    assert gemv.pick(1024, 128, True, 132) == gemv.Config(2, 128, 4, True)
