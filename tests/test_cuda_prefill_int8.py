"""Many rows in mode int8: rows and weights as int8 with one scale a row, and their product, against numpy float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import ptx_simulator  # noqa: E402
from test_cuda_ptx import registers, units_with_every_code  # noqa: E402

from convert import reference  # noqa: E402
from convert.codebook import codebook  # noqa: E402
from convert.format import ModuleSpec  # noqa: E402
from hlwq_cuda import ops  # noqa: E402
from hlwq_cuda.kernels import plain, prefill, prefill_int8, rotate, tables  # noqa: E402
from hlwq_cuda.kernels.dequantize import dequantize_int8, sequence  # noqa: E402
from hlwq_cuda.kernels.layout import pack_codes  # noqa: E402
from tests.triton_device import DEVICE, LAUNCH  # noqa: E402

ON_GPU = DEVICE == "cuda"
BITS = range(2, ops.PREFILL_INT8_MAX_BITS + 1)
SHAPES = [(1, 96, 32), (3, 200, 128), (5, 576, 64), (2, 16500, 128)]  # rows, K, B; the last exceeds the registers
if ON_GPU:
    SHAPES += [(257, 4096, 128), (64, 8992, 32), (70, 12288, 128), (65, 20000, 128)]
PRODUCTS = [(33, 40, 96), (16, 17, 64)] + ([(300, 520, 4096), (65, 1000, 1120)] if ON_GPU else [])  # M, N, K
SMALL = prefill_int8.Tile(16, 16, 32, 1, 1)
TILES = [SMALL]
if ON_GPU:
    TILES = [prefill_int8.pick(rows, 4096, 132, torch.cuda.get_device_capability()) for rows in (65, 2048)]


def weight(bits: int, outputs: int, width: int, block: int):
    """Random codes with norms over a wide range, one block and one row of them zero: device tensors and float64."""
    rng = np.random.default_rng([bits, outputs, width])
    spec = ModuleSpec(bits, block, width)
    codes = rng.integers(0, 2**bits, (outputs, spec.padded_in_features)).astype(np.uint8)
    norms = np.exp(rng.normal(size=(outputs, spec.blocks))).astype(np.float16)
    norms[0, 0] = 0
    norms[1] = 0
    half = np.array(codebook(bits)).astype(np.float16)  # the centroids that kernels have
    exact = reference.decode_rotated(reference.Encoded(codes, norms), spec, half)
    tensors = [pack_codes(torch.from_numpy(codes), bits), torch.from_numpy(norms)]
    tensors.append(tables.make_table(codebook(bits), bits))
    return [tensor.to(DEVICE) for tensor in tensors], exact


@pytest.mark.parametrize(("rows", "width", "block"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16 if ON_GPU else torch.float16])
def test_rows_are_rounded_to_the_nearest_unit(rows: int, width: int, block: int, dtype: torch.dtype):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    x[-1] = 0
    values, scales = rotate.quantize_rows(x, block, LAUNCH)
    expected = reference.rotate(x.double().cpu().numpy(), block)
    steps = scales.double().cpu().numpy()[:, None]
    assert (np.abs(values.double().cpu().numpy() * steps - expected) <= 0.501 * steps).all()
    assert (values[:-1].abs().amax(-1) == 127).all() and not values[-1].any()
    again, _ = plain.quantize_rows(x, block)
    assert (values.int() - again.int()).abs().max() <= 1  # sums in another order may round another way


@pytest.mark.parametrize("ptx", [False, True] if ON_GPU else [False])
@pytest.mark.parametrize(("outputs", "width", "block"), [(5, 96, 32), (7, 192, 64), (300, 200, 128), (9, 9000, 128)])
@pytest.mark.parametrize("bits", BITS)
def test_weights_are_rounded_to_the_nearest_unit(bits: int, outputs: int, width: int, block: int, ptx: bool):
    tensors, expected = weight(bits, outputs, width, block)
    units = torch.full(expected.shape, -128, dtype=torch.int8, device=DEVICE)  # which no result is
    steps = torch.full((outputs,), float("nan"), device=DEVICE)
    dequantize_int8(*tensors, units, steps, bits, block, ptx)
    step = steps.double().cpu().numpy()[:, None]
    assert (np.abs(units.double().cpu().numpy() * step - expected) <= 0.501 * step).all()
    assert units.min() >= -127 and step[1] == 0 and not units[1].any()
    again, per_block = plain.decode_int8(*tensors, bits)
    assert (units.int() - again.int()).abs().max() <= 1
    torch.testing.assert_close(steps, per_block * block**-0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_sequence_rounds_every_code_in_every_place(bits: int):
    """The PTX text in the simulator."""
    codes = units_with_every_code(bits)
    state = registers(bits, "exact", codes)
    text = sequence(bits, torch.int8)
    largest = float(np.float16(codebook(bits)[-1]))
    words = [state[f"q{i}"] for i in range(text.first)] + [state[f"r{i}"] for i in range(text.second)]
    factor = np.float32(127 / largest)
    words.append(np.full(codes.shape[:2], factor).view(np.uint32))
    words += [state[f"t{i}"] for i in range(text.table_words)]
    operands = {f"${text.results + i}": word for i, word in enumerate(words)}
    after = ptx_simulator.run(text.asm.strip("{}\n").splitlines(), state | operands)
    found = np.stack([after[f"${i}"] for i in range(text.results)], -1).view(np.int8).reshape(codes.shape)
    expected = np.rint(np.array(codebook(bits)).astype(np.float16)[codes].astype(np.float64) * factor)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("rows", "outputs", "width"), PRODUCTS)
def test_product_is_exact(rows: int, outputs: int, width: int, tile: prefill_int8.Tile):
    """Scales are powers of two, so that only the addition of the bias rounds: every sum is that of integers."""
    rng = np.random.default_rng(width)
    values, units = (rng.integers(-127, 128, (n, width)).astype(np.int8) for n in (rows, outputs))
    scales, steps = (2.0 ** rng.integers(-3, 4, n).astype(np.float32) for n in (rows, outputs))
    bias = rng.integers(-9, 10, outputs).astype(np.float32)
    out = torch.full((rows, outputs + 8), float("nan"), device=DEVICE)  # a slice of a wider output
    tensors = [torch.from_numpy(array).to(DEVICE) for array in (values, units, scales, steps, bias)]
    prefill_int8.product(*tensors, out[:, :outputs], tile)
    expected = values.astype(np.int64) @ units.astype(np.int64).T * scales[:, None].astype(np.float64) * steps + bias
    assert np.array_equal(out[:, :outputs].cpu().numpy(), expected.astype(np.float32))
    assert out[:, outputs:].isnan().all()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "outputs", "width", "block"), [(17, 50, 200, 128), (20, 33, 192, 64)])
@pytest.mark.parametrize("bits", BITS)
def test_whole_product(bits, rows, outputs, width, block, with_bias, monkeypatch: pytest.MonkeyPatch):
    """Slices of the weight, against the float64 product of the unrounded operands, and against the plain twin."""
    monkeypatch.setattr(prefill, "SLICE_BYTES", 1)  # slices of 256 rows, the least
    if ON_GPU:
        rows, outputs = 10 * rows, 20 * outputs
    else:
        monkeypatch.setattr(prefill_int8, "dequantize_int8", partial(dequantize_int8, ptx=False))
    tensors, exact = weight(bits, outputs, width, block)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, width, generator=generator).to(DEVICE)
    bias = torch.randn(outputs, generator=generator).to(DEVICE) if with_bias else None
    out = torch.full((rows, outputs), float("nan"), device=DEVICE)
    prefill_int8.multiply(x, *tensors, bias, out, bits, block, TILES[0], LAUNCH)
    same = plain.linear(x, *tensors, bias, bits, block, width, "int8", "prefill_int8")
    torch.testing.assert_close(out, same, rtol=0, atol=2e-3 * float(same.abs().max()))
    rotated = reference.rotate(x.double().cpu().numpy(), block)
    expected = rotated @ exact.T + (0 if bias is None else bias.double().cpu().numpy())
    # each operand is off by at most half its step
    half_x = np.abs(rotated).max(-1, keepdims=True) / 254
    half_w = np.abs(exact).max(-1, keepdims=True) * 1.5 / 254  # the largest norm need not meet the largest centroid
    bound = half_x @ np.abs(exact).sum(-1, keepdims=True).T + np.abs(rotated).sum(-1, keepdims=True) @ half_w.T
    assert (np.abs(out.double().cpu().numpy() - expected) <= bound + half_x @ half_w.T * rotated.shape[1] + 1e-5).all()


def test_tiles():
    assert (
        prefill_int8.pick(2048, 4096, 132, (9, 0)).outputs == prefill_int8.pick(512, 24576, 132, (9, 0)).outputs == 256
    )
    assert prefill_int8.pick(512, 4096, 132, (9, 0)).rows == prefill_int8.pick(65, 24576, 132, (9, 0)).rows == 64
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        for rows in (65, 512, 4096):
            tile = prefill_int8.pick(rows, 12288, 132, capability)
            shared = (tile.rows + tile.outputs) * tile.width * tile.stages
            assert shared <= (227 if capability[0] in (9, 10) else 99) * 1024
