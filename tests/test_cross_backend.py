"""One checkpoint, every backend: logits agree with the numpy reference within stated bounds.

Each tiny checkpoint is converted for both targets, whose codes must be equal; then numpy (float64), MLX, and torch on
the CPU and on the GPU run the same tokens. The bound is on the relative error of the whole logit matrix. In float32
only summation order differs; in bfloat16 every activation is rounded to 8 bits, about 2**-9 each over some ten
roundings in a row; the GPU's exact mode multiplies in float16 whatever the model's dtype is.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from numpy_model import reference_logits
from tiny_models import tiny_model

from convert.__main__ import main as convert_main
from convert.checkpoint import Checkpoint
from tests.mlx_startup import ensure_found
from tests.triton_device import DEVICE

TOKENS = [72, 101, 108, 108, 111, 44, 32, 119, 0, 255, 258, 111, 114]
BOUNDS = {"float32": 2e-3, "bfloat16": 2e-2}
HAS_MLX = find_spec("mlx_lm") is not None


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_backend_that_is_here_agrees(family: str, dtype: str, tmp_path: Path):
    """Five bits, so that codes straddle words."""
    source = tiny_model(family, tmp_path / "source", dtype)
    for target in ("mlx", "cuda") if HAS_MLX else ("cuda",):
        command = ["--model", str(source), "--target", target, "--output", str(tmp_path / target), "--bits", "5"]
        assert convert_main(command) == 0
    expected = reference_logits(tmp_path / "cuda", TOKENS)
    check(torch_logits(tmp_path / "cuda", "cpu", dtype), expected, dtype)
    if DEVICE == "cuda":
        check(torch_logits(tmp_path / "cuda", "cuda", dtype), expected, "bfloat16")
    if HAS_MLX:
        check_equal_codes(tmp_path / "mlx", tmp_path / "cuda")
        check(mlx_logits(tmp_path / "mlx"), expected, dtype)


def check_equal_codes(first: Path, second: Path) -> None:
    """Both directories hold the same modules, codes and norms."""
    first, second = Checkpoint.open(first), Checkpoint.open(second)
    assert first.quantization.modules == second.quantization.modules
    for module in second.quantization.modules:
        for ours, theirs in zip(first.encoded(module), second.encoded(module), strict=True):
            np.testing.assert_array_equal(ours, theirs)


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

    ensure_found()
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
