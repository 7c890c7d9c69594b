"""Converted tiny models in stock mlx-lm: logits, and one sentence for each thing that can be wrong with a directory.

The expected logits come from mlx-lm's own unquantized model with the decoded weights put in (every family, tight in
float32: the only difference is that we rotate the input instead of the weight), and from the numpy decoder (Llama and
Qwen3, which shares nothing with MLX but the format).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_startup import ensure_found
from numpy_model import reference_logits
from plain_kernels import as_on_a_gpu
from tiny_models import FAMILIES, tiny_model

from convert import target_mlx
from convert.__main__ import main
from convert.checkpoint import Checkpoint
from convert.format import FormatError
from hlwq_mlx import ops
from hlwq_mlx.layers import HLWQEmbedding, HLWQLinear, HLWQSwitchLinear

TOKENS = [7, 250, 3, 90, 90, 12, 199, 0, 31, 64, 128, 5]  # longer than Gemma's window of 8
TYPES = (HLWQLinear, HLWQEmbedding, HLWQSwitchLinear)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """(family, dtype) -> the source directory and the converted one, each made once."""
    ensure_found()
    root = tmp_path_factory.mktemp("models")

    def make(family: str, dtype: str) -> tuple[Path, Path]:
        source, converted = root / f"{family}-{dtype}", root / f"{family}-{dtype}-hlwq"
        if not converted.exists():
            tiny_model(family, source, dtype)
            arguments = ["--target", "mlx", "--model", str(source), "--output", str(converted), "--head-bits", "5"]
            assert main(arguments) == 0
        return source, converted

    return make


def logits(model, tokens: list[int] = TOKENS) -> np.ndarray:
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32), np.float64)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_decoded_weights(models, family: str):
    source, converted = models(family, "float32")
    model, _ = mlx_lm.load(str(converted))
    checkpoint = Checkpoint.open(converted)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, TYPES)}
    assert set(layers) == set(checkpoint.quantization.modules)

    plain, _ = mlx_lm.load(str(source))
    before, original = logits(plain), dict(plain.named_modules())
    decoded = {path: checkpoint.weight(path, dtype=np.float32) for path in layers}
    for path, weight in decoded.items():  # .0975 at 4 bits by docs/format.md, .05 at the head's 5
        assert 0.02 < relative_error(weight, np.array(original[path].weight)) < 0.11, path
    plain.load_weights([(f"{path}.weight", mx.array(weight)) for path, weight in decoded.items()], strict=False)
    assert relative_error(logits(model), logits(plain)) < 2e-5
    assert relative_error(logits(model), before) > 1e-2  # the comparison would see weights that were not put in


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 2e-2)])
def test_logits_are_those_of_the_numpy_decoder(models, family: str, dtype: str, tolerance: float):
    _, converted = models(family, dtype)
    model, _ = mlx_lm.load(str(converted))
    found, expected = logits(model), reference_logits(converted, TOKENS)
    assert relative_error(found, expected) < tolerance
    second, first = np.sort(expected, axis=-1)[:, -2:].T
    clear = first - second > 2 * np.abs(found - expected).max(axis=-1)
    assert clear.sum() >= len(TOKENS) // 2  # the check below is about something
    assert (found.argmax(-1) == expected.argmax(-1))[clear].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_at_a_time_equals_the_whole_prompt(models, family: str):
    """Through the caches of the architecture, one row at a time."""
    model, _ = mlx_lm.load(str(models(family, "float32")[1]))
    whole, cache = logits(model), mlx_lm.models.cache.make_prompt_cache(model)
    steps = [np.array(model(mx.array([[token]]), cache=cache)[0, 0], np.float64) for token in TOKENS]
    assert relative_error(np.array(steps), whole) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_path_of_a_gpu(models, family: str):
    """Siblings, compiled feed-forward modules and products of few rows, around plain operations instead of kernels."""
    model, _ = mlx_lm.load(str(models(family, "float32")[1]))
    whole, cache = logits(model), mlx_lm.models.cache.make_prompt_cache(model)
    with as_on_a_gpu():
        assert relative_error(logits(model), whole) < 2e-5
        steps = [np.array(model(mx.array([[token]]), cache=cache)[0, 0], np.float64) for token in TOKENS]
        assert relative_error(np.array(steps), whole) < 2e-5
        compiled = [module for module in model.modules() if "_step" in vars(module)]
        assert bool(compiled) == (family != "gpt2")  # its feed-forward module has other names
        # as mlx_lm.lora compiles its training step, with the parameters as inputs
        traced = mx.compile(lambda tokens: model(tokens), inputs=model.state)
        assert relative_error(logits(traced, TOKENS[:3]), whole[:3]) < 2e-5


def test_what_mlx_lm_sees(models):
    model, _, config = mlx_lm.load(str(models("gemma3", "bfloat16")[1]), return_config=True)
    assert config["model_type"] == "hlwq"
    assert type(model).__module__ == "mlx_lm.models.gemma3_text" and model.model_type == "gemma3_text"
    assert "lm_head" not in model  # as mlx-lm's sanitize does to a tied Gemma 3
    source, _ = mlx_lm.load(str(models("gemma3", "bfloat16")[0]))
    count = mlx_lm.utils.get_total_parameters
    assert count(model) == count(source)
    assert model(mx.array([TOKENS])).dtype == mx.bfloat16


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_portable_path(models, monkeypatch: pytest.MonkeyPatch, family: str):
    """What a GPU without our kernels runs, here on the CPU."""
    model, _ = mlx_lm.load(str(models(family, "float32")[1]))
    decoded = logits(model)
    monkeypatch.setattr(ops, "pick", lambda *_: ops.Path.PORTABLE)
    assert relative_error(logits(model), decoded) < 2e-5


def test_distributed(models):
    """A group of one: whole layers by pipeline load; a split within layers is refused."""
    directory, group = str(models("qwen3_moe", "float32")[1]), mx.distributed.init()
    model, _ = mlx_lm.utils.sharded_load(directory, pipeline_group=group)
    assert relative_error(logits(model), logits(mlx_lm.load(directory)[0])) < 2e-5
    with pytest.raises(NotImplementedError, match="pass --pipeline"):
        mlx_lm.utils.sharded_load(directory, tensor_group=group)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_5", "qwen3_moe"])
def test_conversion_may_forget_what_mlx_evaluated(models, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Transposed weights and shifted norms are evaluated by MLX, from arrays made anew when too much is in memory."""
    source, converted = models(family, "float32")
    monkeypatch.setattr(target_mlx, "EVALUATED_BYTES", 0)
    arguments = ["--target", "mlx", "--model", str(source), "--output", str(tmp_path / "again"), "--head-bits", "5"]
    assert main(arguments) == 0
    assert (tmp_path / "again/model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


def edit_config(directory: Path, change: Callable[[dict], None]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(directory: Path, change: Callable[[dict], None]) -> None:
    path = directory / "model.safetensors"
    tensors = mx.load(str(path))
    change(tensors)
    mx.save_safetensors(str(path), dict(tensors))


CODES = "model.layers.1.mlp.down_proj.weight_codes"
NORMS = "model.layers.1.mlp.down_proj.weight_norms"


def module(config: dict, name: str = "model.layers.1.mlp.down_proj") -> dict:
    return config["quantization_config"]["modules"][name]


BAD_CONFIGS = {
    "format_version is 2": lambda c: c["quantization_config"].update(format_version=2),
    "quant_method is 'awkward'": lambda c: c["quantization_config"].update(quant_method="awkward"),
    "no quantization_config": lambda c: c.pop("quantization_config"),
    "base_model_type is missing": lambda c: c["quantization_config"].pop("base_model_type"),
    "'no_such_model' is not an architecture of mlx-lm": lambda c: c["quantization_config"].update(
        base_model_type="no_such_model"
    ),
    "lacks the table for 4 bits": lambda c: c["quantization_config"]["codebooks"].pop("4"),
    "module model.layers.9.mlp.down_proj is not a layer": lambda c: c["quantization_config"]["modules"].update(
        {"model.layers.9.mlp.down_proj": module(c)}
    ),
    "has in_features 192, but the model's layer has 200": lambda c: module(c).update(in_features=192),
    "model.norm is a RMSNorm, which cannot be quantized": lambda c: c["quantization_config"]["modules"].update(
        {"model.norm": {"bits": 4, "block_size": 32, "in_features": 160}}
    ),
}
BAD_TENSORS = {
    f"tensor {CODES} is missing": lambda t: t.pop(CODES),
    f"tensor {NORMS} is missing": lambda t: t.pop(NORMS),
    f"{CODES} is mlx.core.int32": lambda t: t.update({CODES: t[CODES].astype(mx.int32)}),
    f"{NORMS} is mlx.core.float32": lambda t: t.update({NORMS: t[NORMS].astype(mx.float32)}),
    f"{CODES} is mlx.core.uint32 [160, 31]": lambda t: t.update({CODES: t[CODES][:, :31]}),
    "tensor model.norm.weight is missing": lambda t: t.pop("model.norm.weight"),
    "tensor model.extra belongs to no layer": lambda t: t.update({"model.extra": mx.ones(3)}),
}


@pytest.mark.parametrize(
    ("sentence", "edit", "change"),
    [(sentence, edit_config, change) for sentence, change in BAD_CONFIGS.items()]
    + [(sentence, edit_tensors, change) for sentence, change in BAD_TENSORS.items()],
    ids=[*BAD_CONFIGS, *BAD_TENSORS],
)
def test_refused_with_one_sentence(models, tmp_path: Path, sentence: str, edit: Callable, change: Callable):
    directory = shutil.copytree(models("llama", "float32")[1], tmp_path / "model")
    edit(directory, change)
    with pytest.raises(FormatError) as caught:
        mlx_lm.load(str(directory))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
