"""Codes to a matrix in the rotated basis: every width, block size and dtype, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from convert import reference  # noqa: E402
from convert.codebook import codebook  # noqa: E402
from convert.format import SUPPORTED_BITS, ModuleSpec  # noqa: E402
from hlwq_cuda.kernels import tables  # noqa: E402
from hlwq_cuda.kernels.dequantize import dequantize, sequence  # noqa: E402
from hlwq_cuda.kernels.layout import pack_codes  # noqa: E402
from tests.triton_device import DEVICE  # noqa: E402

ON_GPU = DEVICE == "cuda"
SHAPES = [(5, 96, 32), (7, 192, 64), (3, 200, 128)] + ([(1003, 4096, 128)] if ON_GPU else [])
DTYPES = [torch.float16, torch.float32] + ([torch.bfloat16] if ON_GPU else [])  # the interpreter truncates to bfloat16


@pytest.mark.parametrize("ptx", [False, True] if ON_GPU else [False])
@pytest.mark.parametrize(("outputs", "width", "block"), SHAPES)
@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_dequantize_matches_reference(bits: int, outputs: int, width: int, block: int, ptx: bool):
    rng = np.random.default_rng(bits)
    spec = ModuleSpec(bits, block, width)
    codes = rng.integers(0, 2**bits, (outputs, spec.padded_in_features)).astype(np.uint8)
    norms = np.exp(rng.normal(size=(outputs, spec.blocks))).astype(np.float16)
    table = tables.make_table(codebook(bits), bits)
    weight = [pack_codes(torch.from_numpy(codes), bits), torch.from_numpy(norms), table]
    weight = [tensor.to(DEVICE) for tensor in weight]
    half = np.array(codebook(bits)).astype(np.float16)  # the centroids that kernels have
    expected = reference.decode_rotated(reference.Encoded(codes, norms), spec, half)
    for dtype in DTYPES:
        out = torch.full(codes.shape, float("nan"), dtype=dtype, device=DEVICE)
        dequantize(*weight, out, bits, block, ptx)
        error = np.abs(out.double().cpu().numpy() - expected)
        info = torch.finfo(dtype)  # rounded to float32 twice, then to the result, whose smallest values are subnormal
        assert (error <= (info.eps / 2 + 2**-22) * np.abs(expected) + info.smallest_normal * info.eps).all()


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_sequence_keeps_the_order_of_codes(bits: int):
    """The PTX text in the simulator, with norm 1, up to its conversion: words of the result follow the codes."""
    text = sequence(bits, torch.float16)
    kinds = text.constraints.split(",")
    assert kinds.count("=&r") == text.results == text.codes // 2
    stores = [line for line in text.asm.splitlines() if "cvt.rn.f16x2" in line]
    order = [line.split("cvt.rn.f16x2.f32 $")[1].split(",")[0] for line in stores]
    assert order == [str(i) for i in range(text.results)]
