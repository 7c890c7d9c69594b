"""source.py: local directories, GGUF files, and a Hub that a small local server plays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from convert.__main__ import main
from convert.source import STAGING_MARK, open_source
from convert.tensors import read_tensors
from tests.sources import arguments, contents, refuse, write_llama
from tests.test_gguf import write_gguf

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The parts of the Hub's API that a download needs, for the one model `org/Tiny-1.5B`."""

    requests: list[tuple[str, str]]  # method and path

    def __init__(self, directory: Path, requests: list, *rest) -> None:
        self.directory, self.requests = directory, requests
        super().__init__(*rest)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.requests.append((self.command, self.path))
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/Tiny-1.5B"):
            names = sorted(path.name for path in self.directory.iterdir())
            siblings = [{"rfilename": name, "size": (self.directory / name).stat().st_size} for name in names]
            if "/tree/" in path:
                document: object = [
                    {"type": "file", "path": entry["rfilename"], **entry, "oid": "0"} for entry in siblings
                ]
            else:
                document = {"id": "org/Tiny-1.5B", "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(document).encode(), {"Content-Type": "application/json"}, body)
            return
        name = path.rpartition("/")[2]
        file = self.directory / name
        if not path.startswith("/org/Tiny-1.5B/resolve/") or not file.is_file():
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound" if "Tiny" not in path else "EntryNotFound"}, body)
            return
        data, status, headers = file.read_bytes(), 200, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            last = min(int(last or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[int(first) : last + 1], 206
        self.send(status, data, headers, body)

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[dict[str, str], list[tuple[str, str]]]]:
    """Environment variables that point huggingface_hub to the server, and the requests that it got."""
    source = write_llama(tmp_path / "hub", shards=2)
    (source / "pytorch_model.bin").write_bytes(b"not wanted")
    requests: list[tuple[str, str]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, source, requests))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    yield environment, requests
    server.shutdown()


def run(environment: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convert", *argv]
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**clean, **environment})


def test_a_hub_model_is_downloaded_and_converted(hub, tmp_path: Path):
    environment, requests = hub
    output = tmp_path / "out"
    options = ["--target", "cuda", "--encoder", "plain", "--json"]
    result = run(environment, "--model", "org/Tiny-1.5B", "--output", str(output), *options)
    assert result.returncode == 0 and result.stderr == ""  # no bars: it is not a terminal
    assert not any("pytorch_model.bin" in path for _, path in requests)
    assert main(arguments(tmp_path / "hub", tmp_path / "local")) == 0
    assert contents(output) == contents(tmp_path / "local")


def test_a_plan_of_a_hub_model_downloads_no_weights(hub):
    environment, _ = hub
    result = run(environment, "--model", "org/Tiny-1.5B", "--target", "cuda", "--plan", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert len(document["modules"]) == 15
    assert document["source_bytes"] == 2 * document["weights"]
    cached = [path for path in Path(environment["HF_HOME"]).rglob("*") if path.is_file()]
    assert cached and not any(path.name.endswith(".safetensors") for path in cached)


def test_a_model_that_the_hub_lacks_is_one_sentence(hub, tmp_path: Path):
    environment, _ = hub
    result = run(environment, "--model", "org/None", "--target", "cuda", "--output", str(tmp_path / "out"))
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: --model org/None: no such file or directory, and the Hub")
    assert result.stderr.count("\n") == 1


def test_a_hub_out_of_reach_is_one_sentence(tmp_path: Path):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = run(environment, "--model", "org/None", "--target", "cuda", "--output", str(tmp_path / "out"))
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: --model org/None: no such file or directory, and the Hub")


@pytest.mark.parametrize("model", ["./missing", "/no/such/dir", "missing.gguf", "a/b/c"])
def test_a_missing_path_is_not_asked_of_the_hub(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert f"{Path(model)}: no such file or directory" in refuse(capsys, arguments(Path(model), tmp_path / "out"))


def test_a_name_that_is_no_hub_id(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    argv = ["--model", "not an id", "--target", "cuda", "--output", str(tmp_path / "out")]
    assert "not a Hub id either" in refuse(capsys, argv)


def test_a_file_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "model.bin").write_bytes(b"x")
    message = refuse(capsys, arguments(tmp_path / "model.bin", tmp_path / "out"))
    assert "a directory, a Hub id or a .gguf file" in message


def test_a_gguf_is_decoded_beside_the_output_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_gguf(tmp_path / "m.gguf")
    assert main(arguments(tmp_path / "m.gguf", tmp_path / "out")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out"]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= contents(tmp_path / "out").keys()
    assert main(["verify", str(tmp_path / "out"), "--against", str(tmp_path / "m.gguf")]) == 0


def test_what_a_killed_run_left_is_replaced_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_gguf(tmp_path / "m.gguf")
    staging = tmp_path / "out.source"
    staging.mkdir()
    (staging / "mine.txt").write_text("precious")
    assert "the name is needed for temporary files" in refuse(capsys, arguments(tmp_path / "m.gguf", tmp_path / "out"))
    assert (staging / "mine.txt").read_text() == "precious"
    (staging / STAGING_MARK).touch()
    assert main(arguments(tmp_path / "m.gguf", tmp_path / "out")) == 0
    assert not staging.exists()


def test_a_gguf_without_staging_has_headers_only(tmp_path: Path):
    write_gguf(tmp_path / "m.gguf")
    with open_source(str(tmp_path / "m.gguf"), staging=None) as source:
        assert len(read_tensors(source.directory)) == 12
        assert source.directory != tmp_path
    assert not source.directory.exists()
