"""Mixtures of experts: one tensor an expert on disk or one stack, one stack in the model, the same numbers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import hlwq_cuda  # noqa: E402
from convert.__main__ import main as convert  # noqa: E402
from convert.checkpoint import Checkpoint  # noqa: E402
from hlwq_cuda.checkpoint import FormatError  # noqa: E402
from hlwq_cuda.layers import HLWQExperts  # noqa: E402
from hlwq_cuda.placement import find_places  # noqa: E402
from tests.hlwq_models import converted, decoded, random_ids, source  # noqa: E402

IDS = random_ids(11)
FP16 = 2**-10  # the codebook is rounded to fp16


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("moe")


@pytest.fixture(scope="module")
def stacked(root: Path) -> Path:
    """The source with the experts of a layer in one tensor, as newer checkpoints have them; 4 experts, 2 layers."""
    directory = root / "stacked"
    shutil.copytree(source("qwen3_moe", root), directory)
    tensors = load_file(directory / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}.{expert}.{name}_proj.weight") for expert in range(4)])
            for name in ("gate", "up", "down")
        )
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], 1)
        tensors[f"{prefix}.down_proj"] = down.contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def load(directory: Path, **options):
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32, **options
    )
    assert not any(info.values()), info
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_an_expert_is_the_decoded_expert(root: Path):
    """Every expert of every stack, against numpy."""
    directory = converted("qwen3_moe", root)
    checkpoint, model = Checkpoint.open(directory), load(directory)
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        assert isinstance(experts.gate_up_proj, HLWQExperts)
        for expert in range(4):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            gate, up, down = (
                torch.from_numpy(checkpoint.weight(f"{prefix}.{name}_proj")) for name in ("gate", "up", "down")
            )
            assert relative_error(experts.gate_up_proj[expert].double(), torch.cat([gate, up])) < FP16
            assert relative_error(experts.down_proj[torch.tensor([expert])][0].double(), down) < FP16


def test_stacks_on_disk_load_and_match(root: Path, stacked: Path, tmp_path: Path):
    directory = tmp_path / "quantized"
    assert convert(["--target", "cuda", "--model", str(stacked), "--output", str(directory)]) == 0
    assert "model.layers.0.mlp.experts.gate_up_proj" in Checkpoint.open(directory).quantization.modules
    found = logits(load(directory))
    assert relative_error(found, logits(load(decoded(directory, tmp_path / "decoded")))) < FP16
    loaded = load(stacked, quantization_config=hlwq_cuda.HLWQConfig())
    assert torch.equal(found, logits(loaded))


def test_codes_do_not_depend_on_stacking(root: Path, stacked: Path, tmp_path: Path):
    """A block lies within a row of an expert. (The search encoder looks at the columns of gate and up together.)"""
    directories = tmp_path / "stacked", tmp_path / "apart"
    for directory, model in zip(directories, (stacked, source("qwen3_moe", root)), strict=True):
        options = ["--target", "cuda", "--encoder", "plain", "--model", str(model), "--output", str(directory)]
        assert convert(options) == 0
    assert torch.equal(*(logits(load(directory)) for directory in directories))


def test_batched_experts_agree_with_the_loop(root: Path):
    """Decoding in a CUDA graph gathers the experts of a token; reading a prompt loops over experts."""
    model = load(converted("qwen3_moe", root))
    expected = logits(model)
    model.set_experts_implementation("batched_mm")
    assert relative_error(logits(model), expected) < 1e-5  # float32, another order of summation


def test_experts_of_unequal_bits_are_refused(root: Path):
    directory = converted("qwen3_moe", root)
    quantization = Checkpoint.open(directory).quantization
    name = "model.layers.0.mlp.experts.1.up_proj"
    modules = {**quantization.modules, name: replace(quantization.modules[name], bits=5)}
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(source("qwen3_moe", root))
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(FormatError, match=r"experts\.0\..* and .*experts\.1\.up_proj are one tensor"):
        find_places(model, replace(quantization, modules=modules))
