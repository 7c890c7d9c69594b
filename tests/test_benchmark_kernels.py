"""What the kernel benchmark computes without a GPU: its encoder, and its table."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks import cuda_model, kernels  # noqa: E402
from convert import reference  # noqa: E402
from convert.format import ModuleSpec  # noqa: E402


@pytest.mark.parametrize(("bits", "block"), [(4, 128), (3, 64), (6, 32)])
def test_encoder_agrees_with_the_reference(bits: int, block: int):
    pytest.importorskip("triton")
    from benchmarks.cuda_hlwq import encode

    weight = np.random.default_rng(0).normal(size=(7, 256)).astype(np.float32)
    codes, norms = encode(torch.from_numpy(weight), bits, block)
    expected = reference.encode(weight, ModuleSpec(bits, block, 256))
    assert (codes.numpy() == expected.codes).mean() > 0.99  # a value at an edge between two codes may fall either way
    np.testing.assert_allclose(norms.float().numpy(), expected.norms.astype(np.float32), rtol=2**-10)


def test_table_reports_ratios_and_failures():
    def record(name: str, **rest) -> dict:
        return {"n": 16, "k": 128, "m": 8, "name": name, **rest}

    records = [
        record("HLWQ int8", us=2.0, spread_us=0.1, share=0.5),
        record("bf16 cuBLAS", us=5.0, share=0.8),
        record("gemlite A16W4", error="not installed (No module named 'gemlite')"),
    ]
    text = kernels.table({"gpu": "a GPU", "read_bandwidth": 4e12, "libraries": {"torch": "2"}, "records": records})
    assert "| HLWQ int8 | 2.00 ± 0.10 (50%; 2.50x) |" in text
    assert "| bf16 cuBLAS | 5.00 (80%; 1.00x) |" in text
    assert "| gemlite A16W4 | not installed |" in text


def test_without_a_gpu_one_sentence(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main([]) == 1
    assert capsys.readouterr().out.startswith("benchmarks.kernels needs an NVIDIA GPU")


def test_model_is_bound_by_the_slower_of_memory_and_instructions():
    card = cuda_model.Card(90, 100, 1.0, 1000)
    assert cuda_model.share(1.0, 0.5, card) == cuda_model.READABLE  # few instructions: memory
    # 100 processors x 1 GHz x 128 lanes / 64 instructions a weight = 2e11 weights a second
    assert cuda_model.share(64.0, 0.0, card) == pytest.approx(2e11 * cuda_model.BYTES_A_WEIGHT / 1e12)
