"""checkpoint.py: a written directory is read back, and one test for every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint import Checkpoint
from convert.codebook import codebook
from convert.format import FormatError, ModuleSpec, QuantizationConfig
from convert.packing import pack
from convert.reference import decode, encode
from tests.sources import write_source

SPEC = ModuleSpec(5, 64, 96)
WEIGHT = np.random.default_rng(0).standard_normal((7, 96), dtype=np.float32)


def write_directory(directory: Path, change: Callable[[dict, dict], object] = lambda tensors, config: None) -> Path:
    """A valid directory with one module `m`, after `change` to its tensors and config."""
    encoded = encode(WEIGHT, SPEC)
    tensors = {"m.weight_codes": pack(encoded.codes, 5), "m.weight_norms": encoded.norms, "b": np.ones(3, np.float32)}
    quantization = QuantizationConfig(5, 64, {5: codebook(5)}, {"m": SPEC})
    config = {"model_type": "llama", "quantization_config": quantization.to_dict()}
    change(tensors, config)
    return write_source(directory, tensors, config)


def test_weights_are_decoded(tmp_path: Path):
    checkpoint = Checkpoint.open(write_directory(tmp_path / "d"))
    expected = decode(encode(WEIGHT, SPEC), SPEC, codebook(5))
    assert np.array_equal(checkpoint.weight("m"), expected)
    assert np.array_equal(checkpoint.weight("m", slice(2, 5)), expected[2:5])
    assert np.array_equal(checkpoint.encoded("m").codes, encode(WEIGHT, SPEC).codes)
    assert np.array_equal(checkpoint.tensor("b"), np.ones(3, np.float32))
    with pytest.raises(FormatError, match="tensor c is missing"):
        checkpoint.tensor("c")


REFUSALS: dict[str, Callable[[dict, dict], object]] = {
    "tensor m.weight_codes is missing": lambda tensors, _: tensors.pop("m.weight_codes"),
    "tensor m.weight_norms is missing": lambda tensors, _: tensors.pop("m.weight_norms"),
    r"m.weight_codes is int32 \[7, 20\], not uint32 \[..., 20\]": lambda tensors, _: tensors.update(
        {"m.weight_codes": tensors["m.weight_codes"].view(np.int32)}
    ),
    r"m.weight_codes is uint32 \[7, 19\], not uint32 \[..., 20\]": lambda tensors, _: tensors.update(
        {"m.weight_codes": tensors["m.weight_codes"][:, :19]}
    ),
    r"m.weight_codes is uint32 \[20\]": lambda tensors, _: tensors.update(
        {"m.weight_codes": tensors["m.weight_codes"][0]}
    ),
    r"m.weight_norms is float32 \[7, 2\], not float16": lambda tensors, _: tensors.update(
        {"m.weight_norms": tensors["m.weight_norms"].astype(np.float32)}
    ),
    "m has codes and norms of different shapes": lambda tensors, _: tensors.update(
        {"m.weight_norms": tensors["m.weight_norms"][:3]}
    ),
    "config.json: no quantization_config": lambda _, config: config.pop("quantization_config"),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_a_directory_outside_the_format_is_refused(tmp_path: Path, message: str):
    directory = write_directory(tmp_path / "d", REFUSALS[message])
    with pytest.raises(FormatError, match=message) as caught:
        Checkpoint.open(directory)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the file is missing"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("3", "not a JSON object"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path: Path, text: str | None, message: str):
    directory = write_directory(tmp_path / "d")
    (directory / "config.json").unlink()
    if text is not None:
        (directory / "config.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        Checkpoint.open(directory)


def test_a_newer_format_is_refused(tmp_path: Path):
    directory = write_directory(tmp_path / "d")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="format_version is 2, this release reads 1"):
        Checkpoint.open(directory)
