"""--target mlx: what mlx-lm's own loading makes of a source, read a piece at a time, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_model

from convert import target_mlx
from convert.__main__ import main
from convert.checkpoint import Checkpoint
from convert.target import Kind
from convert.target_mlx import MlxTarget


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("sources")

    def source(family: str) -> Path:
        return root / family if (root / family).exists() else tiny_model(family, root / family, "float32")

    return source


def run(source: Path, output: Path, *options: str) -> int:
    return main(["--target", "mlx", "--model", str(source), "--output", str(output), *options])


def test_kinds(sources: Callable[[str], Path]):
    kinds = {tensor.name: (tensor.kind, tensor.reason) for tensor in MlxTarget(sources("qwen3_moe")).tensors}
    layer = "model.layers.0"
    assert kinds["model.embed_tokens.weight"][0] is Kind.EMBEDDING
    assert kinds["lm_head.weight"][0] is Kind.HEAD
    assert kinds[f"{layer}.self_attn.q_proj.weight"][0] is Kind.LINEAR
    assert kinds[f"{layer}.mlp.switch_mlp.up_proj.weight"][0] is Kind.EXPERTS
    assert kinds[f"{layer}.mlp.gate.weight"] == (None, "router")
    assert kinds[f"{layer}.input_layernorm.weight"][0] is None
    assert {tensor.name: tensor.reason for tensor in MlxTarget(sources("gpt2")).tensors}[
        "model.wpe.weight"
    ] == "positions"


def test_experts_are_read_one_by_one(sources: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    """MLX would evaluate a whole stack for one row of it."""
    source = sources("qwen3_moe")
    monkeypatch.setattr(target_mlx._Architecture, "_evaluate", lambda self, name: pytest.fail(f"evaluated {name}"))
    target = MlxTarget(source)
    tensors = load_file(source / "model.safetensors")
    for tensor in target.tensors:
        target.read(tensor, slice(0, 1))
        if tensor.kind is Kind.EXPERTS:
            leaf = tensor.name.split(".")[-2]
            name = "model.layers.{}.mlp.experts.{}.{}.weight"
            expected = [tensors[name.format(tensor.name.split(".")[2], expert, leaf)] for expert in (1, 2)]
            np.testing.assert_array_equal(target.read(tensor, slice(1, 3)), expected)


def test_what_sanitize_computes(sources: Callable[[str], Path]):
    source = sources("gpt2")
    target, tensors = MlxTarget(source), load_file(source / "model.safetensors")
    (weight,) = (tensor for tensor in target.tensors if tensor.name == "model.h.1.mlp.c_fc.weight")
    np.testing.assert_array_equal(target.read(weight, slice(3, 50)), tensors["h.1.mlp.c_fc.weight"].T[3:50])


def test_plan_evaluates_nothing(sources: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target_mlx._Architecture, "read", lambda self, name, rows: pytest.fail(f"read {name}"))
    assert main(["--target", "mlx", "--model", str(sources("qwen3_5")), "--plan"]) == 0


def test_dtype_leaves_alone_what_mlx_lm_wants_in_float32(sources: Callable[[str], Path], tmp_path: Path):
    assert run(sources("qwen3_5"), tmp_path / "out", "--dtype", "bfloat16") == 0
    dtypes = {name: info.dtype for name, info in Checkpoint.open(tmp_path / "out").tensors.items()}
    layer = "language_model.model.layers.0"
    assert dtypes[f"{layer}.linear_attn.A_log"] == np.float32
    assert dtypes[f"{layer}.input_layernorm.weight"] == ml_dtypes.bfloat16


def test_sharded_source_gives_the_same(sources: Callable[[str], Path], tmp_path: Path):
    source = shutil.copytree(sources("qwen3_moe"), tmp_path / "sharded")
    (source / "model.safetensors").unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(sources("qwen3_moe"))
    model.save_pretrained(tmp_path / "again", max_shard_size="200KB")
    for path in (tmp_path / "again").glob("model*"):
        shutil.copy(path, source)
    assert len(list(source.glob("*.safetensors"))) > 2
    for name, each in (("one", sources("qwen3_moe")), ("many", source)):
        assert run(each, tmp_path / name) == 0
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    assert one.keys() == many.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], many[name])


def edit(source: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def poison(tensors: dict, name: str) -> None:
    tensors[name][3, 7] = np.nan


def rename_model_type(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "perceptron"}))


EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
BAD = {
    "unknown architecture": ("Model type perceptron not supported", rename_model_type),
    "missing expert": (EXPERT, lambda source: edit(source, lambda tensors: tensors.pop(EXPERT))),
    "missing norm": (
        "tensor model.norm.weight is missing in the source",
        lambda source: edit(source, lambda tensors: tensors.pop("model.norm.weight")),
    ),
    "unknown tensor": (
        "tensor model.extra of the source belongs to no layer",
        lambda source: edit(source, lambda tensors: tensors.update({"model.extra": np.ones(3, np.float32)})),
    ),
    "NaN in an expert": (
        "mlp.experts.0.up_proj.weight to model.layers.1.mlp.experts.3.up_proj.weight: the weight holds NaN or infinity",
        lambda source: edit(source, lambda tensors: poison(tensors, EXPERT)),
    ),
}


@pytest.mark.parametrize(("sentence", "damage"), BAD.values(), ids=BAD)
def test_refused_with_one_sentence(
    sources: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture, sentence: str, damage: Callable
):
    source = shutil.copytree(sources("qwen3_moe"), tmp_path / "source")
    damage(source)
    assert run(source, tmp_path / "out") == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and sentence in message and str(source) in message
    assert not (tmp_path / "out").exists()


def test_says_which_extra_is_missing(
    sources: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    assert run(sources("llama"), tmp_path / "out") == 1
    assert "hlwq-mlx[mlx-cpu]" in capsys.readouterr().err
