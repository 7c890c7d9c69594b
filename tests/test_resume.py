"""A conversion that dies leaves nothing a loader accepts, and the same command finishes it, byte for byte."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from convert.__main__ import main
from tests.sources import arguments, contents, refuse, write_llama

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("source") / "llama")


SLOW_COMMAND = """
import sys, time
from convert import encoders
plain = encoders.encode_plain
def slow(weight, spec, power):
    time.sleep(0.05)
    return plain(weight, spec, power)
encoders.ENCODERS["plain"] = slow
from convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_conversion_is_invisible_and_resumes(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ("--max-shard-size", "60kB", "--json")
    assert main(arguments(llama, tmp_path / "whole", *options)) == 0
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen([sys.executable, "-c", SLOW_COMMAND, *arguments(llama, output, *options)], cwd=ROOT)
    finished: dict = {}
    deadline = time.monotonic() + 60
    while len(finished) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
        if (partial / "journal.json").exists():
            finished = json.loads((partial / "journal.json").read_text())["shards"]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and len(finished) >= 2
    assert not output.exists() and not (partial / "config.json").exists()  # no loader accepts either
    capsys.readouterr()
    assert main(arguments(llama, output, *options)) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(finished) <= report["resumed_shards"] < len(list(output.glob("*.safetensors")))
    assert contents(output) == contents(tmp_path / "whole") and not partial.exists()


def test_a_damaged_finished_shard_is_written_again(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = ("--max-shard-size", "100kB")
    assert main(arguments(llama, tmp_path / "whole", *options)) == 0
    with monkeypatch.context() as patch:
        patch.setattr("convert.writer.Staging.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(arguments(llama, tmp_path / "out", *options)) == 130
    shard = sorted((tmp_path / "out.partial").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    assert main(arguments(llama, tmp_path / "out", *options)) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_commands_partial_output_is_left_alone(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr("convert.writer.Staging.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(arguments(llama, tmp_path / "out")) == 130
    before = contents(tmp_path / "out.partial")
    capsys.readouterr()
    assert "with other options" in refuse(capsys, arguments(llama, tmp_path / "out", "--bits", "5"))
    assert contents(tmp_path / "out.partial") == before


def test_two_processes_do_not_share_an_output(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    command = [sys.executable, "-c", SLOW_COMMAND, *arguments(llama, output, "--max-shard-size", "60kB")]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out.partial/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        message = refuse(capsys, arguments(llama, output, "--max-shard-size", "60kB"))
        assert "another process is writing" in message
    finally:
        assert first.wait() == 0


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(llama: Path, tmp_path: Path):
    """A limit on the size of files stands for a full disk: both fail in write(2)."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "convert", *arguments(llama, output)]
    limit = 100_000
    result = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert re.match(rf"error: {output}.partial/model.safetensors: cannot be written \(.*\); make room", result.stderr)
    assert not output.exists()
    assert main(arguments(llama, output)) == 0


def test_a_disk_without_room_is_refused_at_once(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "the disk has 1,000 free" in refuse(capsys, arguments(llama, tmp_path / "out"))


def test_an_output_that_exists_is_not_touched(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    output.mkdir()
    assert main(arguments(llama, output)) == 0  # an empty directory is fine
    before = contents(output)
    capsys.readouterr()
    assert "not an empty directory" in refuse(capsys, arguments(llama, output))
    assert "not an empty directory" in refuse(capsys, arguments(llama, llama))
    assert contents(output) == before
