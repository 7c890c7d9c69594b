"""One checkpoint, every backend: logits agree with the numpy reference within stated bounds.

Each tiny checkpoint is converted for both targets, whose codes must be equal; then numpy (float64), MLX and torch run
the same tokens. The bound is on the relative error of the whole logit matrix. In float32 only summation order differs;
in bfloat16 every activation is rounded to 8 bits, about 2**-9 each over some ten roundings in a row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy_model import reference_logits
from tiny_models import tiny_model

from convert.__main__ import main as convert_main
from convert.checkpoint import Checkpoint

TOKENS = [72, 101, 108, 108, 111, 44, 32, 119, 0, 255, 258, 111, 114]
BOUNDS = {"float32": 2e-3, "bfloat16": 2e-2}
CASES = [(family, dtype) for family in ("llama", "qwen3") for dtype in BOUNDS]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def converted(request, tmp_path_factory) -> tuple[Path, Path, str]:
    """The same tiny model for MLX and for CUDA, five-bit so that codes straddle words, and its dtype."""
    family, dtype = request.param
    root = tmp_path_factory.mktemp(f"{family}-{dtype}")
    source = tiny_model(family, root / "source", dtype)
    for target in ("mlx", "cuda"):
        command = ["--model", str(source), "--target", target, "--output", str(root / target), "--bits", "5"]
        assert convert_main(command) == 0
    return root / "mlx", root / "cuda", dtype


def test_both_targets_hold_the_same_codes(converted):
    mlx, cuda = Checkpoint.open(converted[0]), Checkpoint.open(converted[1])
    assert mlx.quantization.modules == cuda.quantization.modules
    for module in cuda.quantization.modules:
        for ours, theirs in zip(mlx.encoded(module), cuda.encoded(module), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_mlx_matches_the_reference(converted):
    pytest.importorskip("mlx_lm", reason="the MLX backend is not installed")
    directory, _, dtype = converted
    check(mlx_logits(directory), reference_logits(directory, TOKENS), dtype)


def test_torch_on_the_cpu_matches_the_reference(converted):
    _, directory, dtype = converted
    check(torch_logits(directory, "cpu", dtype), reference_logits(directory, TOKENS), dtype)


@pytest.mark.gpu
def test_torch_on_the_gpu_matches_the_reference(converted):
    _, directory, dtype = converted
    # the kernels' exact mode multiplies in float16: 2**-11 a product, whatever the model's dtype
    check(torch_logits(directory, "cuda", dtype), reference_logits(directory, TOKENS), "bfloat16")


def check(logits: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    """The bound of `dtype`, and the same first choice wherever the reference's margin is above the error made."""
    assert logits.shape == expected.shape and np.isfinite(logits).all()
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert error < BOUNDS[dtype], f"relative error {error:.2e}"
    ordered = np.sort(expected, axis=-1)
    decided = ordered[:, -1] - ordered[:, -2] > 2 * np.abs(logits - expected).max(axis=-1)
    assert decided.any(), "no position has a clear first choice: the comparison would say nothing"
    np.testing.assert_array_equal(logits.argmax(-1)[decided], expected.argmax(-1)[decided])


def mlx_logits(directory: Path) -> np.ndarray:
    """float64 [T, vocabulary] by stock mlx-lm."""
    import mlx.core as mx
    from mlx_lm import load

    model, _ = load(str(directory))
    return np.array(model(mx.array([TOKENS])).astype(mx.float32))[0].astype(np.float64)


def torch_logits(directory: Path, device: str, dtype: str) -> np.ndarray:
    """float64 [T, vocabulary] by stock transformers, exact mode."""
    import torch
    from transformers import AutoModelForCausalLM

    import hlwq_cuda  # noqa: F401  (makes the method known to transformers)
    from hlwq_cuda.layers import HLWQWeight

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), device_map=device)
    for module in model.modules():
        if isinstance(module, HLWQWeight):
            module.mode = "exact"
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS], device=device)).logits[0]
    return logits.double().cpu().numpy()
