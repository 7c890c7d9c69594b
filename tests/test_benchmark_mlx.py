"""The benchmark of mlx-lm's own command: its directories load, and its output is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlx_lm.models import qwen3

from benchmarks import mlx_commands

TINY = qwen3.ModelArgs(
    model_type="qwen3",
    hidden_size=128,
    num_hidden_layers=2,
    intermediate_size=256,
    num_attention_heads=4,
    rms_norm_eps=1e-6,
    vocab_size=512,
    num_key_value_heads=2,
    max_position_embeddings=64,
    head_dim=32,
    tie_word_embeddings=False,
    rope_theta=1e4,
)


@pytest.mark.parametrize("kind,bits", [("hlwq", 4.125), ("affine", 4.5), ("bf16", 16)])
def test_mlx_lm_benchmark(kind: str, bits: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(mlx_commands.SHAPES, "tiny", (qwen3, TINY))
    found = mlx_commands.write_directory("tiny", kind, tmp_path / "model")
    assert bits <= found < bits + 0.15  # norms of the layers and heads
    result = mlx_commands.benchmark(tmp_path / "model", ["-p", "8", "-g", "4", "-n", "1"])
    assert result["prefill"] > 0 and result["decode"] > 0
