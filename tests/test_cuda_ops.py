"""The custom ops: values, schema, fake bodies, gradient, torch.compile, hostile arguments.

On a GPU with its kernels, elsewhere with the bodies in plain torch.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from convert import packing, reference  # noqa: E402
from convert.codebook import codebook  # noqa: E402
from convert.format import SUPPORTED_BITS, ModuleSpec  # noqa: E402
from hlwq_cuda import ops  # noqa: E402
from hlwq_cuda.kernels import plain  # noqa: E402
from hlwq_cuda.kernels.layout import to_device_layout  # noqa: E402
from hlwq_cuda.kernels.tables import float_entries, make_table  # noqa: E402
from tests.triton_device import DEVICE  # noqa: E402

BITS, BLOCK, WIDTH, ROWS = 4, 64, 150, 20  # K is padded to 192


@pytest.fixture(scope="module")
def weight():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2**31), 2**31 - 1, (ROWS, 192 * BITS // 32), generator=generator).to(torch.int32)
    norms = torch.rand(ROWS, 192 // BLOCK, generator=generator).half()
    return tuple(tensor.to(DEVICE) for tensor in (codes, norms, make_table(codebook(BITS), BITS)))


@pytest.fixture(autouse=True)
def seed():
    """The same activations in every run, so that a failure repeats."""
    torch.manual_seed(0)


# Every kind with every number of rows; block size and dtype turn against each other, so that each pair of the four
# occurs. K: ragged, with a padded last block where B = 128.
KINDS = [(bits, "exact") for bits in SUPPORTED_BITS] + [(bits, "int8") for bits in (2, 3, 4, 5)]
ROW_COUNTS = (1, 2, 3, 7, 8, 16, 33, 64, 257)
SIZES = ((128, 1000), (64, 960), (32, 416))  # B, K
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CASES = [
    (*kind, rows, *SIZES[(i + j) % 3], DTYPES[(i + j // 3) % 3])
    for i, kind in enumerate(KINDS)
    for j, rows in enumerate(ROW_COUNTS)
]


@pytest.mark.parametrize(("bits", "mode", "rows", "block", "width", "dtype"), CASES)
def test_linear_matches_reference(bits: int, mode: str, rows: int, block: int, width: int, dtype: torch.dtype):
    rng, outputs = np.random.default_rng([bits, rows]), 77
    spec = ModuleSpec(bits, block, width)
    codes = rng.integers(0, 2**bits, (outputs, spec.padded_in_features)).astype(np.uint8)
    encoded = reference.Encoded(codes, np.exp(rng.normal(size=(outputs, spec.blocks))).astype(np.float16))
    x = torch.from_numpy(rng.normal(size=(rows, width)) * np.exp(rng.normal(size=width))).to(dtype)
    bias = torch.linspace(-1, 1, outputs, dtype=dtype)
    table = make_table(codebook(bits), bits)
    words = to_device_layout(torch.from_numpy(packing.pack(codes, bits)), bits)
    arguments = [tensor.to(DEVICE) for tensor in (x, words, torch.from_numpy(encoded.norms), table, bias)]
    out = torch.ops.hlwq.linear(*arguments, bits, block, width, mode)
    assert out.dtype == dtype and out.shape == (rows, outputs)

    x, bias = x.double().numpy(), bias.double().numpy()
    weight, rotated = reference.decode_rotated(encoded, spec, codebook(bits)), reference.rotate(x, block)
    expected = rotated @ weight.T + bias
    kernel = ops.pick(rows, mode, bits)
    dense = DEVICE == "cuda" and kernel == "dequantize"  # rounds to the activation's dtype, never int8
    # else centroids and activations are rounded to fp16, and so are sums of eight products
    unit = torch.finfo(dtype).eps if dense else 2**-10
    bound = max(2 * unit, 2**-9) * (np.abs(rotated) @ np.abs(weight).T)
    if kernel == "prefill_int8":  # half a step in every activation and weight, one step a row
        step = np.abs(rotated).max(-1) / 127
        weight_step = codebook(bits)[-1] / 127 * encoded.norms.max(-1).astype(np.float64) * block**-0.5
        bound = bound + np.outer(step / 2, np.abs(weight).sum(-1) + weight_step / 2 * weight.shape[1])
        bound = bound + np.outer(np.abs(rotated).sum(-1), weight_step / 2)
    elif mode == "int8" and not dense:  # half a step in every activation and centroid, one step a block
        step = np.abs(reference.blocks(rotated, block)).max(-1).repeat(block, -1) / 127
        change = np.abs(float_entries(table, bits, "int8").numpy() - np.array(codebook(bits))).max()
        norms = encoded.norms.astype(np.float64).repeat(block, -1) * block**-0.5
        bound = bound + (step / 2 + 2**-9 * np.abs(rotated)) @ (np.abs(weight) + change * norms).T
        bound = bound + np.abs(rotated) @ (change * norms).T
    bound = bound + torch.finfo(dtype).eps * (np.abs(expected) + np.abs(bias)) + 1e-6
    assert (np.abs(out.double().cpu().numpy() - expected) <= bound).all()


def test_ops_keep_the_rules_of_torch_library(weight):
    x = torch.randn(2, 3, WIDTH, requires_grad=True, device=DEVICE)
    bias = torch.randn(ROWS, device=DEVICE)
    torch.library.opcheck(torch.ops.hlwq.linear.default, (x, *weight, bias, BITS, BLOCK, WIDTH, "exact"))
    torch.library.opcheck(torch.ops.hlwq.linear.default, (x, *weight, None, BITS, BLOCK, WIDTH, "int8"))
    torch.library.opcheck(torch.ops.hlwq.rotate.default, (x, BLOCK))
    ids = torch.tensor([[1, 2], [3, 3]], device=DEVICE)
    torch.library.opcheck(torch.ops.hlwq.embedding.default, (ids, *weight, BITS, BLOCK, WIDTH, torch.bfloat16))
    torch.library.opcheck(torch.ops.hlwq.dequantize.default, (*weight, BITS, BLOCK, WIDTH, torch.float16))


def test_gradient_is_that_of_the_dequantized_weight(weight):
    x = torch.randn(3, WIDTH, requires_grad=True, device=DEVICE)
    bias = torch.randn(ROWS, requires_grad=True, device=DEVICE)
    dense = torch.ops.hlwq.dequantize(*weight, BITS, BLOCK, WIDTH, torch.float32)
    torch.ops.hlwq.linear(x, *weight, bias, BITS, BLOCK, WIDTH, "exact").square().sum().backward()
    found = x.grad.clone(), bias.grad.clone()
    x.grad = bias.grad = None
    torch.nn.functional.linear(x, dense, bias).square().sum().backward()
    # y is off by two roundings to fp16 a product, of the rotated activation and of the centroid: at most
    # 2**-10 |x| |w|, as rotations keep lengths (1 % more for float32 sums). The gradients 2 y W and 2 y carry that on.
    off = 2.02 * 2**-10 * x.norm(dim=-1, keepdim=True) * dense.norm(dim=-1)
    assert ((found[0] - x.grad).abs() <= off @ dense.abs()).all()
    assert ((found[1] - bias.grad).abs() <= off.sum(0)).all()
    assert (off.sum(0) < 0.01 * bias.grad.norm()).all()  # the bound is one


def test_gradient_of_rotation():
    x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True, device=DEVICE)
    assert torch.autograd.gradcheck(lambda v: torch.ops.hlwq.rotate(v, BLOCK), x, eps=1e-3, atol=1e-3)


def test_compiles_without_graph_breaks(weight):
    def function(x, ids):
        rows = torch.ops.hlwq.embedding(ids, *weight, BITS, BLOCK, WIDTH, torch.float32)
        return torch.ops.hlwq.linear(rows + x, *weight, None, BITS, BLOCK, WIDTH, "int8")

    x, ids = torch.randn(WIDTH, device=DEVICE), torch.tensor([0, 19], device=DEVICE)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, ids), function(x, ids))


@pytest.mark.parametrize(("rows", "kernel"), [(1, "gemv"), (2, "gemm"), (32, "gemm")])
def test_pick(rows: int, kernel: str):
    assert ops.pick(rows, "exact", 4) == ops.pick(rows, "int8", 4) == kernel


def test_pick_of_many_rows():
    assert (ops.pick(64, "exact", 4), ops.pick(64, "int8", 4)) == ("dequantize", "gemm")
    assert (ops.pick(65, "int8", 4), ops.pick(65, "int8", 5)) == ("prefill_int8", "dequantize")


def test_activation_of_another_width_is_refused(weight):
    with pytest.raises(ValueError, match="the activation has 128 columns, the weight takes 150"):
        torch.ops.hlwq.linear(torch.randn(1, 128, device=DEVICE), *weight, None, BITS, BLOCK, WIDTH, "exact")


def test_unknown_mode_is_refused(weight):
    with pytest.raises(ValueError, match="mode is 'fast'; the modes are exact, int8"):
        torch.ops.hlwq.linear(torch.randn(1, WIDTH, device=DEVICE), *weight, None, BITS, BLOCK, WIDTH, "fast")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "int8"])
def test_ops_are_captured_in_a_graph(weight, mode: str):
    """A replay computes with the values that its inputs hold then."""

    def run():
        rows = torch.ops.hlwq.embedding(ids, *weight, BITS, BLOCK, WIDTH, torch.float32)
        return torch.ops.hlwq.linear(torch.ops.hlwq.rotate(rows, BLOCK)[:, :WIDTH], *weight, None, *shape, mode)

    shape = (BITS, BLOCK, WIDTH)
    ids = torch.tensor([0], device=DEVICE)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for token in (3, 19):
        ids.fill_(token)
        out.fill_(float("nan"))
        graph.replay()
        rows = plain.embedding(ids, *weight, *shape, torch.float32)
        expected = plain.linear(plain.rotate(rows, BLOCK)[:, :WIDTH], *weight, None, *shape, mode, "gemv")
        # a sum in another order may round one activation to another int8
        torch.testing.assert_close(
            out, expected, rtol=0, atol=float(expected.abs().max()) * (2e-3 if mode == "exact" else 2e-2)
        )


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the ops themselves take this path")
@pytest.mark.parametrize(("rows", "mode"), [(1, "exact"), (1, "int8"), (3, "exact")])
def test_gpu_body_in_the_interpreter(weight, monkeypatch, rows: int, mode: str):
    """gpu.linear puts its kernels together: rotation, choice, product; without inline assembly."""
    gpu = pytest.importorskip("hlwq_cuda.gpu")
    monkeypatch.setattr(gpu, "has_gluon", lambda version: False)
    monkeypatch.setattr(gpu.gemv_kernels, "gemv", partial(gpu.gemv_kernels.gemv, ptx=False))
    x, bias = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1)), torch.randn(ROWS)
    arguments = (x, *weight, bias, BITS, BLOCK, WIDTH, mode, ops.pick(rows, mode, BITS))
    out = gpu.linear(*arguments)
    expected = plain.linear(*arguments)
    # fp16 products by cuBLAS's stand-in for three rows; for one row the same numbers in another order
    torch.testing.assert_close(out, expected, rtol=0, atol=float(expected.abs().max()) * (2e-3 if rows > 1 else 1e-5))
