"""The tables of benchmarks/quality.py that run the model run, and put the encoders in their order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks import quality, quality_generation  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What benchmarks/quality_data.py prepares, of a tiny model and random tokens."""
    root = tmp_path_factory.mktemp("data")
    tiny_model("qwen3", root / "model", dtype="float32")
    rng = np.random.default_rng(0)
    for name, count in (("wiki", 2), ("news", 2), ("calibration", 32)):
        np.save(root / f"{name}.npy", rng.integers(0, 256, (count, 128)))
    return root


def rows(output: str) -> dict[str, dict]:
    lines = [json.loads(line) for line in output.splitlines()]
    return {row["name"]: row for row in lines if "table" in row}


def test_tables_that_run_the_model(data: Path, capsys: pytest.CaptureFixture):
    tables = ["encoders", "calibrated", "gptq", "ablation", "peers", "detour", "gain"]
    assert quality.main([str(data), "--windows", "2", "--table", *tables]) == 0
    found = rows(capsys.readouterr().out)
    kl = {name: row["wiki"]["kl"] for name, row in found.items()}
    for bits in (2, 3, 4, 5, 6):
        assert kl[f"HLWQ Q{bits} calibrated"] < 0.8 * kl[f"HLWQ Q{bits} search"]
    assert kl["GPTQ act-order, affine 4-bit g64"] < kl["HLWQ Q4 plain"]
    error = {name: row["weight_error"] for name, row in found.items()}
    assert error["absmax INT4 g128"] < error["HLWQ Q5 plain, dequantized, then absmax INT4 g128"]
    assert error["HLWQ Q4 search"] < error["HLWQ Q4 search, unit gain"]
    assert error["Hadamard + Lloyd-Max (HLWQ plain), 4 bits"] == error["HLWQ Q4 plain"]


def test_recipes(data: Path, capsys: pytest.CaptureFixture):
    assert quality.main([str(data), "--windows", "2", "--table", "recipes", "--only", ", search"]) == 0
    kl = {name: row["wiki"]["kl"] for name, row in rows(capsys.readouterr().out).items()}
    assert kl["auto at the size of seeds, search"] < kl["seeds, search"]
    assert quality.main([str(data), "--windows", "2", "--table", "recipes", "--only", "uniform 4, calibrated"]) == 0
    found = rows(capsys.readouterr().out)
    assert list(found) == [
        f"{row}uniform 4, calibrated" for row in ("", "auto at the size of ", "auto by search at the size of ")
    ]


def test_long_generation(data: Path, capsys: pytest.CaptureFixture):
    assert quality_generation.main([str(data), "--prompts", "2", "--tokens", "24"]) == 0
    found = rows(capsys.readouterr().out)
    assert found["source"]["kl"] == 0
    assert found["HLWQ Q4 search, unit gain"]["kl"] < found["HLWQ Q2 search, unit gain"]["kl"]
    assert quality_generation.repeated(np.array([1, 2, 3, 4, 1, 2, 3, 4])) == pytest.approx(1 / 5)
