"""Bad input to the CUDA backend: one sentence that says what, where and what to do; no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM  # noqa: E402

from convert.checkpoint import Checkpoint  # noqa: E402
from convert.format import FormatError  # noqa: E402
from hlwq_cuda import environment  # noqa: E402
from hlwq_cuda.__main__ import main  # noqa: E402
from tests.hlwq_models import converted, source  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def directory(root: Path, tmp_path: Path) -> Path:
    """A converted model that a test may damage."""
    return Path(shutil.copytree(converted("llama", root), tmp_path / "model"))


def failure(capsys, *arguments: str) -> str:
    """The one line that `generate` prints, with exit code 1."""
    assert main(["generate", "--prompt", "Hi", "--max-new-tokens", "4", *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def edit_config(directory: Path, change) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def overwrite(directory: Path, name: str, values: np.ndarray) -> None:
    """Put `values` over the first bytes of a tensor."""
    info = Checkpoint.open(directory).tensors[name]
    with info.path.open("r+b") as file:
        file.seek(info.start)
        file.write(values.tobytes())


def test_no_cuda(directory: Path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = failure(capsys, "--model", str(directory), "--device", "cuda")
    assert "no CUDA device" in message and "device cpu" in message


def fake_gpu(monkeypatch, capability=(9, 0), free=2**40) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 2**40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 0)


def test_too_old_a_gpu(directory: Path, capsys, monkeypatch):
    fake_gpu(monkeypatch, capability=(7, 5))
    message = failure(capsys, "--model", str(directory), "--device", "cuda")
    assert "Tesla T4 has compute capability 7.5" in message and "8.0" in message


def test_too_old_a_gpu_is_passed_over_when_none_is_named(monkeypatch):
    fake_gpu(monkeypatch, capability=(7, 5))
    assert environment.pick_device(None) == torch.device("cpu")


def test_no_such_gpu(directory: Path, capsys, monkeypatch):
    fake_gpu(monkeypatch)
    assert "there is no cuda:3" in failure(capsys, "--model", str(directory), "--device", "cuda:3")


def test_too_little_memory(directory: Path, capsys, monkeypatch):
    """Found before a weight is read: the fake GPU could hold none."""
    fake_gpu(monkeypatch, free=2**16)
    message = failure(capsys, "--model", str(directory), "--device", "cuda")
    assert "loading LlamaForCausalLM needs 0.25 GiB and cuda:0 has 0.00 GiB free; close" in message


def test_a_prompt_for_which_the_memory_does_not_last(directory: Path, capsys, monkeypatch):
    def fail(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total ...")

    monkeypatch.setattr("hlwq_cuda.generate.Decoder.prefill", fail)
    message = failure(capsys, "--model", str(directory), "--device", "cpu")
    assert message == "error: CUDA out of memory; shorten the prompt, close what else uses the GPU, or use device cpu"


def test_unknown_device(directory: Path, capsys):
    assert "'gpu0' is not a device" in failure(capsys, "--model", str(directory), "--device", "gpu0")


def test_a_directory_made_for_mlx(directory: Path, capsys):
    def make_mlx(config: dict) -> None:
        config["quantization_config"]["base_model_type"] = config["model_type"]
        config["model_type"] = "hlwq"

    edit_config(directory, make_mlx)
    message = failure(capsys, "--model", str(directory))
    assert "made for MLX" in message and "python -m convert --target cuda" in message


def test_no_such_directory(tmp_path: Path, capsys):
    assert "no such directory" in failure(capsys, "--model", str(tmp_path / "absent"))


def test_an_unquantized_model(root: Path, capsys):
    assert "not an HLWQ checkpoint" in failure(capsys, "--model", str(source("llama", root)))


def test_a_newer_format(directory: Path, capsys):
    edit_config(directory, lambda config: config["quantization_config"].update(format_version=2))
    assert "format_version is 2" in failure(capsys, "--model", str(directory))


def test_a_damaged_norm(directory: Path, capsys):
    overwrite(directory, "model.layers.1.mlp.up_proj.weight_norms", np.array([np.nan, 1], np.float16))
    message = failure(capsys, "--model", str(directory))
    assert "model.layers.1.mlp.up_proj.weight_norms holds 1 values that are not finite" in message


def test_a_truncated_file(directory: Path, capsys):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "truncated" in failure(capsys, "--model", str(directory))


def test_a_module_that_the_model_lacks(directory: Path):
    """The file and config.json agree with each other, but not with the architecture."""
    edit_config(directory, lambda config: config.update(num_hidden_layers=1))
    with pytest.raises(FormatError, match=r"LlamaForCausalLM has no module model\.layers\.1\."):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_matrix_of_another_height(directory: Path):
    edit_config(directory, lambda config: config.update(vocab_size=300))
    with pytest.raises(
        FormatError, match=r"embed_tokens\.weight_codes is \[259, 20\], but the model needs \[300, 20\]"
    ):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_context_that_is_too_long(directory: Path, capsys):
    message = failure(capsys, "--model", str(directory), "--prompt", "x" * 600, "--device", "cpu")
    assert "the prompt has 6" in message and "context has 512" in message


def test_no_tokenizer(directory: Path, capsys):
    for path in directory.glob("*token*"):
        path.unlink()
    assert "no usable tokenizer" in failure(capsys, "--model", str(directory))


@pytest.mark.parametrize(
    ("flag", "value", "message"), [("--temperature", "-1", "temperature is -1"), ("--top-p", "2", "top_p is 2")]
)
def test_sampling_out_of_range(directory: Path, capsys, flag: str, value: str, message: str):
    assert message in failure(capsys, "--model", str(directory), "--device", "cpu", flag, value)
