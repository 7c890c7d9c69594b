"""Figures of the comparison against values worked out by hand, and the command on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

from convert.__main__ import main
from convert.errors import ConvertError
from convert.evaluate import bits_per_weight, compare, window_metrics
from convert.text import token_windows

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.tiny_models import tiny_model, tiny_tokenizer  # noqa: E402

TEXT = "The quick brown fox jumps over the lazy dog. Sphinx of black quartz, judge my vow! " * 30


def test_metrics_of_a_window_worked_out_by_hand():
    p, q = np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), np.array([[0.25, 0.5, 0.25], [0.1, 0.6, 0.3]])
    pad = np.full((1, 3), 1 / 3)
    source, quantized = (np.log(np.concatenate([each, pad])) + 7 for each in (p, q))  # a constant must not matter
    window = np.array([2, 0, 1])
    expected = (
        -(math.log(0.5) + math.log(0.8)) / 2,
        -(math.log(0.25) + math.log(0.6)) / 2,
        (p * np.log(p / q)).sum() / 2,
        0.5,
    )
    np.testing.assert_allclose(window_metrics(source, quantized, window), expected, rtol=1e-6)
    tensors = (torch.from_numpy(each) for each in (source, quantized))
    np.testing.assert_allclose(window_metrics(*tensors, window), expected, rtol=1e-6)


def test_means_and_standard_errors_over_windows():
    rng = np.random.default_rng(0)
    source = {i: rng.standard_normal((9, 20)) for i in range(4)}
    quantized = {i: source[i] + rng.standard_normal((9, 20)) for i in range(4)}
    windows = np.stack([np.r_[i, rng.integers(0, 20, 8)] for i in range(4)])
    found = compare(lambda w: source[w[0]], lambda w: quantized[w[0]], windows)
    each = np.array([window_metrics(source[i], quantized[i], windows[i]) for i in range(4)])
    assert found.tokens == 32
    assert found.perplexity == pytest.approx(math.exp(each[:, 1].mean()))
    assert found.kl == pytest.approx(each[:, 2].mean())
    assert found.kl_error == pytest.approx(each[:, 2].std(ddof=1) / 2)
    assert found.nll_difference_error == pytest.approx((each[:, 1] - each[:, 0]).std(ddof=1) / 2)
    same = compare(lambda w: source[w[0]], lambda w: source[w[0]], windows)
    assert same.kl == 0 and same.top1 == 1 and same.nll_difference == 0


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """source, q3 and q8 of one tiny model, and text.txt."""
    root = tmp_path_factory.mktemp("evaluate")
    tiny_model("llama", root / "source", dtype="float32")
    for bits in (3, 8):
        arguments = ["--model", str(root / "source"), "--output", str(root / f"q{bits}"), "--target", "cuda"]
        assert main([*arguments, "--bits", str(bits)]) == 0
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return root


def evaluate(root: Path, *directories: str, text: str = "text.txt", options: tuple[str, ...] = ()) -> int:
    paths = [str(root / name) for name in directories]
    return main(["eval", *paths, "--against", str(root / "source"), "--text", str(root / text), *options])


def test_command_compares_directories_with_the_source(converted: Path, capsys: pytest.CaptureFixture):
    options = ("--max-tokens", "1024", "--json", "--device", "cpu")
    assert evaluate(converted, "q3", "q8", options=options) == 0
    q3, q8 = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
    assert {"ppl", "ppl_source", "kl", "kl_se", "top1", "bits_per_weight", "tokens"} <= q8.keys()
    assert q3["tokens"] == q8["tokens"] == 2 * 511
    assert 0 < q8["kl"] < 0.01 * q3["kl"]  # the squared error falls by a factor of 850
    assert q8["top1"] > q3["top1"]
    assert q8["ppl"] == pytest.approx(q8["ppl_source"], rel=0.02)
    assert q8["bits_per_weight"] == bits_per_weight(converted / "q8")


def test_bits_per_weight_counts_every_stored_byte(converted: Path):
    from safetensors import safe_open

    with safe_open(converted / "source" / "model.safetensors", "np") as file:
        weights = sum(file.get_tensor(name).size for name in file.keys())
    with safe_open(converted / "q3" / "model.safetensors", "np") as file:
        nbytes = sum(file.get_tensor(name).nbytes for name in file.keys())
    assert bits_per_weight(converted / "q3") == pytest.approx(8 * nbytes / weights)


def test_mlx_directory_runs_in_mlx_and_agrees(converted: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("mlx_lm")
    arguments = ["--model", str(converted / "source"), "--output", str(converted / "mlx"), "--target", "mlx"]
    assert main([*arguments, "--bits", "3"]) == 0
    options = ("--max-tokens", "512", "--json", "--device", "cpu")
    found = []
    for name in ("q3", "mlx"):
        assert evaluate(converted, name, options=options) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found[1]["kl"] == pytest.approx(found[0]["kl"], rel=0.02)  # one decodes in float32, the other runs codes
    assert evaluate(converted, "q3", "mlx") == 1
    assert "evaluate them in two runs" in capsys.readouterr().err


def test_plot_is_a_png_or_says_what_is_missing(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    options = ("--max-tokens", "64", "--device", "cpu", "--plot", str(tmp_path / "kl.png"))
    if importlib.util.find_spec("matplotlib") is None:
        assert evaluate(converted, "q3", options=options) == 1
        assert "pip install matplotlib" in capsys.readouterr().err
    else:
        assert evaluate(converted, "q3", "q8", options=options) == 0
        assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")


def test_short_text_is_one_short_window(converted: Path, capsys: pytest.CaptureFixture):
    assert evaluate(converted, "q8", options=("--max-tokens", "40", "--json", "--device", "cpu")) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tokens"] == 39 and found["kl_se"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b" \n", "holds no text"),
        (b"too short", "fewer than one window"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_unusable_text_is_one_sentence(converted: Path, tmp_path: Path, capsys, content: bytes | None, message: str):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert evaluate(converted, "q8", text=str(text)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --text") and message in error and error.count("\n") == 1


def test_source_instead_of_a_quantized_directory_is_one_sentence(converted: Path, capsys: pytest.CaptureFixture):
    assert evaluate(converted, "source") == 1
    assert "not an HLWQ checkpoint" in capsys.readouterr().err


def test_directory_of_another_model_is_refused():
    with pytest.raises(ConvertError, match="vocabularies of 5 and 6"):
        window_metrics(np.zeros((3, 5)), np.zeros((3, 6)), np.zeros(3, np.int64))


def test_tokenizer_of_another_model_is_refused():
    with pytest.raises(ConvertError, match="belongs to another model"):
        token_windows(tiny_tokenizer(), "abc" * 100, 16, 50, "--text x")


def test_text_model_of_one_that_also_sees(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Its config nests that of the text model, its tensors have longer names."""
    tiny_model("qwen3_5", tmp_path / "source", dtype="float32")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = ["--model", str(tmp_path / "source"), "--target", "cuda"]
    found = []
    for bits in (4, 8):
        assert main([*arguments, "--output", str(tmp_path / f"q{bits}"), "--bits", str(bits)]) == 0
        assert evaluate(tmp_path, f"q{bits}", options=("--max-tokens", "512", "--json", "--device", "cpu")) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["kl"])
    assert 0 < found[1] < 0.1 * found[0]
