"""From a source directory to an HLWQ directory through the command line: every value, dtype and file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from convert import pipeline, search
from convert.__main__ import main
from convert.checkpoint import Checkpoint
from convert.codebook import codebook
from convert.format import ModuleSpec
from convert.plan import PlannedTensor
from convert.reference import decode, encode
from convert.target import OutputTensor
from convert.tensors import read, read_header, read_tensors
from tests.sources import DTYPES, LLAMA, arguments, contents, llama_shapes, random_tensors, write_llama, write_source


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("source") / "llama")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_codes_are_the_references(tmp_path: Path, dtype: str, shards: int):
    source = write_llama(tmp_path / "source", dtype, shards)
    assert main(arguments(source, tmp_path / "out", "--bits", "3")) == 0
    checkpoint = Checkpoint.open(tmp_path / "out")
    tensors = read_tensors(source)
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        weight = read(info)
        if module not in checkpoint.quantization.modules:
            assert weight.ndim == 1
            assert checkpoint.tensor(name).tobytes() == weight.tobytes() and checkpoint.tensor(name).dtype == info.dtype
            continue
        spec = checkpoint.quantization.modules[module]
        expected = encode(weight.astype(np.float32), spec)
        found = checkpoint.encoded(module)
        assert np.array_equal(found.norms, expected.norms)
        # the rotation sums in another order: a value at a midpoint may take the other code
        assert (found.codes != expected.codes).mean() < 1e-4
        assert spec == ModuleSpec(3, 128 if weight.shape[1] == 200 else 64, weight.shape[1])
    assert len(checkpoint.quantization.modules) == 15


def test_other_readers_accept_the_files(llama: Path, tmp_path: Path):
    assert main(arguments(llama, tmp_path / "out", "--max-shard-size", "100kB")) == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    loaded = {}
    for path in files:
        assert path.stat().st_size < 110_000
        for name, tensor in safetensors.numpy.load_file(path).items():
            loaded[name] = tensor
            assert index["weight_map"][name] == path.name
    ours = {name: read(info) for name, info in read_tensors(tmp_path / "out").items()}
    assert loaded.keys() == ours.keys() == index["weight_map"].keys()
    assert all(np.array_equal(loaded[name], ours[name]) for name in ours)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())


def test_tensors_are_aligned_to_their_dtype(llama: Path, tmp_path: Path):
    assert main(arguments(llama, tmp_path / "out")) == 0
    header = read_header(tmp_path / "out" / "model.safetensors")
    assert all(info.start % info.dtype.itemsize == 0 for info in header.values())


def test_config_keeps_the_source_and_lists_modules(llama: Path, tmp_path: Path):
    assert main(arguments(llama, tmp_path / "out", "--embed-bits", "6")) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((llama / "config.json").read_text())
    assert (quantization["bits"], quantization["quant_method"], quantization["format_version"]) == (4, "hlwq", 1)
    assert quantization["modules"]["model.embed_tokens"]["bits"] == 6
    assert set(quantization["codebooks"]) == {"4", "6"} and quantization["codebooks"]["6"] == list(codebook(6))
    assert sorted(contents(tmp_path / "out")) == [
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]


def test_a_tied_head_is_stored_once(tmp_path: Path):
    tensors = random_tensors(llama_shapes(tied=False))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    source = write_source(tmp_path / "source", tensors, {**LLAMA, "tie_word_embeddings": True})
    assert main(arguments(source, tmp_path / "out")) == 0
    modules = Checkpoint.open(tmp_path / "out").quantization.modules
    assert "model.embed_tokens" in modules and "lm_head" not in modules


def test_dtype_is_for_what_stays_unquantized(tmp_path: Path):
    shapes = {**llama_shapes(), "model.layers.0.linear_attn.A_log": (16,)}
    source = write_source(tmp_path / "source", random_tensors(shapes, "float32"), {**LLAMA, "torch_dtype": "float32"})
    assert main(arguments(source, tmp_path / "out", "--dtype", "bfloat16")) == 0
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.tensor("model.norm.weight").dtype == DTYPES["bfloat16"]
    assert checkpoint.tensor("model.layers.0.linear_attn.A_log").dtype == np.float32
    assert checkpoint.config["torch_dtype"] == "bfloat16"


def test_experts_per_expert_and_stacked(tmp_path: Path):
    hidden, width, experts = 128, 96, 3
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, hidden), "lm_head.weight": (64, hidden)}
    for expert in range(experts):
        shapes[f"model.layers.0.mlp.experts.{expert}.gate_proj.weight"] = (width, hidden)
        shapes[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"] = (hidden, width)
    shapes["model.layers.0.mlp.gate.weight"] = (experts, hidden)
    shapes["model.layers.1.mlp.experts.gate_up_proj"] = (experts, 2 * width, hidden)
    shapes["model.layers.1.mlp.experts.down_proj"] = (experts, hidden, width)
    config = {"model_type": "qwen3_moe", "hidden_size": hidden, "tie_word_embeddings": False}
    tensors = random_tensors(shapes, "float32")
    source = write_source(tmp_path / "source", tensors, config)
    assert main(arguments(source, tmp_path / "out", "--head-bits", "8")) == 0
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.quantization.modules["lm_head"].bits == 8
    stack = checkpoint.weight("model.layers.1.mlp.experts.gate_up_proj")
    assert stack.shape == (experts, 2 * width, hidden)
    spec = checkpoint.quantization.modules["model.layers.1.mlp.experts.gate_up_proj"]
    for expert in range(experts):
        weight = tensors["model.layers.1.mlp.experts.gate_up_proj"][expert]
        assert np.allclose(stack[expert], decode(encode(weight, spec), spec, codebook(4)), atol=1e-2)
        assert f"model.layers.0.mlp.experts.{expert}.down_proj" in checkpoint.quantization.modules
    assert checkpoint.tensor("model.layers.0.mlp.gate.weight").shape == (experts, hidden)


def test_the_number_of_threads_and_chunks_does_not_show(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert main(arguments(llama, tmp_path / "a")) == 0
    monkeypatch.setattr("convert.__main__._cores", lambda: 5)
    assert main(arguments(llama, tmp_path / "b")) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_bounded_number_of_tasks_is_in_memory(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At most 2 x threads + 2 results are held (the one being written among them), whatever the size of the model."""
    monkeypatch.setattr(pipeline, "TASK_WEIGHTS", 1000)
    monkeypatch.setattr("convert.__main__._cores", lambda: 2)
    started, written, most = 0, 0, 0
    encode_task, size = pipeline._runner, pipeline._size

    def counting_runner(*runner_arguments):
        def run(task):
            nonlocal started, most
            started += 1
            most = max(most, started - written)
            return encode(task)

        encode = encode_task(*runner_arguments)
        return run

    def counting_size(task):
        nonlocal written
        written += 1
        return size(task)

    monkeypatch.setattr(pipeline, "_runner", counting_runner)
    monkeypatch.setattr(pipeline, "_size", counting_size)
    assert main(arguments(llama, tmp_path / "out")) == 0
    assert written > 300 and 2 <= most <= 6


@pytest.mark.parametrize("shape", [(5000, 576), (300, 12288), (7, 2**21)])
def test_a_task_is_what_the_search_encoder_takes_together(shape: tuple[int, int]):
    """So that a model quantized while it loads, matrix by matrix, gets the converter's codes."""
    tensor = OutputTensor("up_proj.weight", shape, np.dtype(np.float32), "model.safetensors")
    tasks = pipeline._tasks(PlannedTensor(tensor, None, tensor.dtype))
    groups = [range(shape[0])[rows] for rows in search.row_groups(*shape)]
    assert [range(task.rows.start, task.rows.stop) for task in tasks] == groups
