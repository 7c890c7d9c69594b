"""Sources that cannot be converted: one sentence that names file and tensor, exit code 1, no output."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.sources import LLAMA, arguments, llama_shapes, random_tensors, refuse, write_llama, write_source


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_values_that_are_not_finite_name_file_and_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, poison: float
):
    tensors = random_tensors(llama_shapes())
    tensors[name][-1] = poison
    source = write_source(tmp_path / "source", tensors, LLAMA)
    message = refuse(capsys, arguments(source, tmp_path / "out"))
    assert f"{source}/model.safetensors: tensor {name}: the " in message and "NaN or infinity" in message
    assert not (tmp_path / "out").exists()


def test_a_value_beyond_the_asked_dtype_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tensors = random_tensors(llama_shapes())
    tensors["model.norm.weight"][0] = 1e6
    source = write_source(tmp_path / "source", tensors, LLAMA)
    message = refuse(capsys, arguments(source, tmp_path / "out", "--dtype", "float16"))
    assert "model.norm.weight: a value is beyond the range of float16" in message


def test_a_missing_shard_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_llama(tmp_path / "source", shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    message = refuse(capsys, arguments(source, tmp_path / "out"))
    assert "model-00002-of-00003.safetensors: the file is missing" in message
    (source / "model.safetensors.index.json").unlink()
    assert "model-00002-of-00003.safetensors" in refuse(capsys, arguments(source, tmp_path / "out"))


def test_a_truncated_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = write_llama(tmp_path / "source")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refuse(capsys, arguments(source, tmp_path / "out"))
    assert re.search(r"model.safetensors: truncated inside tensor model\.", message)


@pytest.mark.parametrize(
    ("extra", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "hlwq"}}, "hlwq"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
    ],
)
def test_a_quantized_source_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: dict, method: str
):
    source = write_source(tmp_path / "source", random_tensors(llama_shapes()), {**LLAMA, **extra})
    message = refuse(capsys, arguments(source, tmp_path / "out"))
    assert f"config.json: the model is already quantized ({method})" in message


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "int32"),
        ("model.layers.0.mlp.up_proj.weight_packed", "int32"),
        ("model.layers.0.mlp.up_proj.weight", "float8_e4m3fn"),
    ],
)
def test_codes_of_other_quantizers_are_refused_without_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, dtype: str
):
    tensors = {**random_tensors(llama_shapes()), name: np.zeros((64, 64), np.dtype(dtype))}
    source = write_source(tmp_path / "source", tensors, LLAMA)
    message = refuse(capsys, arguments(source, tmp_path / "out"))
    assert f"model.safetensors: the model is already quantized (tensor {name}, {dtype})" in message


@pytest.mark.parametrize("model_type", ["frobnicator", None])
def test_an_unknown_architecture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str | None):
    source = write_source(tmp_path / "source", random_tensors(llama_shapes()), {**LLAMA, "model_type": model_type})
    assert f"(model_type {model_type!r}) is unknown" in refuse(capsys, arguments(source, tmp_path / "out"))
