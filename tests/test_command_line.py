"""`python -m convert`: --plan, inspect, verify, JSON, progress and wrong options."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest

from convert import pipeline
from convert.__main__ import main, parse_size
from convert.tensors import read_header
from tests.sources import LLAMA, arguments, llama_shapes, random_tensors, refuse, write_llama, write_source

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("source") / "llama", tied=False)


@pytest.fixture(scope="module")
def converted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "out"
    assert main(arguments(llama, output, "--recipe", "seeds")) == 0
    return output


def document(capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 0) -> dict:
    capsys.readouterr()
    assert main([*argv, "--json"]) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def copy(directory: Path, to: Path) -> Path:
    to.mkdir()
    for path in directory.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


# --plan


def test_the_plan_is_what_is_written(
    llama: Path, converted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    argv = ["--model", str(llama), "--target", "cuda", "--recipe", "seeds", "--plan"]
    with monkeypatch.context() as patch:
        patch.setattr("convert.target_cuda.read", lambda *_: pytest.fail("--plan read a weight"))
        plan = document(capsys, argv)
    found = document(capsys, ["inspect", str(converted)])
    strip = lambda rows: {row["name"]: (row["shape"], row["bits"], row["block_size"], row["bytes"]) for row in rows}  # noqa: E731
    assert strip(plan["modules"]) == strip(found["modules"]) and strip(plan["kept"]) == strip(found["kept"])
    for key in ("weights", "quantized_weights", "bits_per_weight", "bytes"):
        assert plan[key] == found[key], key
    file = converted / "model.safetensors"
    header_bytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert plan["bytes"] == file.stat().st_size - header_bytes
    assert plan["source_bytes"] == 2 * plan["weights"]
    assert plan["kv_cache_bytes"] == 2 * 2 * 2 * 4096 * 2 * 48  # keys and values, two bytes, layers, tokens, heads, D
    assert plan["run_time_bytes"] == plan["bytes"] + plan["kv_cache_bytes"]
    assert plan["tensor_parallel"] == [1]  # 200 inputs of down_proj are padded


def test_the_plan_in_text(llama: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--model", str(llama), "--target", "cuda", "--plan", "--bits", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["module", "shape", "bits", "block", "bytes"]
    row = next(line for line in lines if line.startswith("model.layers.0.mlp.down_proj"))
    assert row.split() == ["model.layers.0.mlp.down_proj", "192x200", "3", "128", "19,200"]
    text = "\n".join(lines)
    for total in ("bits a weight", "size", "memory at run", "tensor parallel", "weights"):
        assert f"\n{total}" in text


def test_a_plan_writes_nothing(llama: Path, tmp_path: Path):
    before = sorted(path.name for path in llama.iterdir())
    assert main([*arguments(llama, tmp_path / "out"), "--plan"]) == 0
    assert list(tmp_path.iterdir()) == [] and sorted(path.name for path in llama.iterdir()) == before


# inspect and verify


def test_inspect_in_text(converted: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(converted)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{converted}: llama, made for cuda, 1 file(s)\n")
    assert "model.layers.0.mlp.up_proj" in text and "bits a weight" in text


def test_verify_against_the_source(llama: Path, converted: Path, capsys: pytest.CaptureFixture[str]):
    found = document(capsys, ["verify", str(converted), "--against", str(llama)])
    errors = [entry["relative_error"] for entry in found["relative_errors"]]
    assert found["ok"] and found["problems"] == [] and errors == sorted(errors, reverse=True)
    assert 0.17 < errors[0] < 0.21  # 3 bits: the square root of 0.034548 is 0.186
    assert len(errors) == len(llama_shapes(tied=False)) and errors[-1] == 0.0  # kept tensors are equal
    assert main(["verify", str(converted), "--against", str(llama)]) == 0
    text = capsys.readouterr().out
    assert "worst first" in text and "no problem" in text


def test_verify_finds_a_flipped_bit(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    damaged = copy(converted, tmp_path / "damaged")
    path = damaged / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = document(capsys, ["verify", str(damaged)], code=1)
    assert found["problems"] == [f"{path}: the checksum differs from SHA256SUMS; the file is damaged"]


def test_verify_finds_values_that_are_not_finite(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    damaged = copy(converted, tmp_path / "damaged")
    path = damaged / "model.safetensors"
    info = read_header(path)["model.layers.1.mlp.up_proj.weight_norms"]
    with path.open("r+b") as file:
        file.seek(info.start + 6)
        file.write(np.float16(np.inf).tobytes())
    (damaged / "SHA256SUMS").unlink()
    found = document(capsys, ["verify", str(damaged)], code=1)
    assert found["problems"] == [
        f"{path}: SHA256SUMS has no checksum for the file",
        f"{path}: tensor model.layers.1.mlp.up_proj.weight_norms holds NaN or infinity",
    ]


@pytest.mark.parametrize("content", [b"\xff\xfe", b"just words here\n"])
def test_damaged_sums_are_refused(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes):
    damaged = copy(converted, tmp_path / "damaged")
    (damaged / "SHA256SUMS").write_bytes(content)
    assert "SHA256SUMS: not lines of a checksum and a file name" in refuse(capsys, ["verify", str(damaged)])


def test_verify_finds_another_source(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shapes = llama_shapes(tied=False)
    tensors = random_tensors(shapes, seed=1)
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    other = write_source(tmp_path / "other", tensors, {**LLAMA, "tie_word_embeddings": False})
    found = document(capsys, ["verify", str(converted), "--against", str(other)], code=1)
    assert sum("differs from" in problem for problem in found["problems"]) == len(shapes) - 1
    where = f"{other}/model.safetensors: tensor model.extra.weight"
    assert f"tensor model.extra.weight of {where} is not in the checkpoint" in found["problems"]
    assert "model.norm.weight is in the checkpoint but not in the source" in found["problems"]


def test_sums_are_those_of_the_sha256sum_command(converted: Path):
    result = subprocess.run(
        [sys.executable, "-c", "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())",
         str(converted / "model.safetensors")], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (converted / "SHA256SUMS").read_text() == f"{result.stdout.strip()}  model.safetensors\n"


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_directory_of_another_kind_is_refused(command: str, llama: Path, capsys: pytest.CaptureFixture[str]):
    assert "no quantization_config; this is not an HLWQ checkpoint" in refuse(capsys, [command, str(llama)])
    assert "missing/config.json: the file is missing" in refuse(capsys, [command, str(llama / "missing")])


# options


def test_a_recipe_that_splits_fused_layers_is_refused(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "r.json").write_text('{"*.gate_proj": 3}')
    message = refuse(capsys, arguments(llama, tmp_path / "out", "--recipe", str(tmp_path / "r.json")))
    assert "model.layers.0.mlp.gate_proj 3 bits and model.layers.0.mlp.up_proj 4 bits, but engines fuse" in message


def test_output_is_needed_without_plan(llama: Path, capsys: pytest.CaptureFixture[str]):
    assert "--output is missing" in refuse(capsys, ["--model", str(llama), "--target", "cuda"])


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5kB", 1500), ("100kb", 10**5), ("12345", 12345)]
)
def test_sizes(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5XB", "1e999GB", "nan"])
def test_sizes_that_are_none(text: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(arguments(llama, tmp_path / "out", f"--max-shard-size={text}"))
    assert caught.value.code == 2 and "is not a size such as 5GB or 500MB" in capsys.readouterr().err


def test_the_converter_imports_no_framework(llama: Path, tmp_path: Path):
    """--target cuda works where neither torch, transformers, mlx nor gguf is installed."""
    block = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'mlx', 'mlx_lm', 'gguf')))"
    code = f"{block}; from convert.__main__ import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments(llama, tmp_path / "out")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stderr == ""


def test_a_missing_extra_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'hlwq-mlx[gguf]'" in refuse(capsys, arguments(tmp_path / "m.gguf", tmp_path / "out"))


# progress


SLOW = """
import sys, time
from convert import encoders
plain = encoders.encode_plain
def slow(weight, spec, power):
    time.sleep(0.4)
    return plain(weight, spec, power)
encoders.ENCODERS["plain"] = slow
from convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_progress_on_a_terminal(llama: Path, tmp_path: Path):
    """After two seconds a bar with rate and time left; a pseudo-terminal plays the terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows and columns
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments(llama, tmp_path / "out")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:
        pass  # Linux reports the end of a pseudo-terminal as an error
    assert process.wait() == 0
    assert b"%|" in shown and b" weights/s" in shown and b"<" in shown  # elapsed<left


def test_no_progress_elsewhere(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    result = subprocess.run(
        [sys.executable, "-c", SLOW, *arguments(llama, tmp_path / "out")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stderr == "" and result.stdout.count("\n") == 1


def test_progress_adds_up_to_the_plan(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "TASK_WEIGHTS", 1000)
    seen: list[int] = []
    original = pipeline.convert

    def recording(*positional, progress, **named):
        return original(*positional, progress=seen.append, **named)

    monkeypatch.setattr("convert.__main__.convert", recording)
    assert main(arguments(llama, tmp_path / "out")) == 0
    assert sum(seen) == sum(int(np.prod(shape)) for shape in llama_shapes(tied=False).values()) and len(seen) > 100
