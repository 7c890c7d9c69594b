"""How mlx-lm finds us: the built wheel in a fresh environment, and the loader file where nothing is installed.

A fresh environment sees the packages of the running one through a path line, which unlike an installation doesn't run
their start-up lines: this package is not importable there until its wheel is installed.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from tiny_models import tiny_model

from convert.__main__ import main

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sysconfig.get_path("scripts"))  # the console commands of mlx-lm


class Environment:
    """A virtual environment with the packages of the running one, `outer`, or with none."""

    def __init__(self, directory: Path, outer: bool = True) -> None:
        venv.create(directory)
        self.directory = directory
        self.python = directory / "bin" / "python"
        if outer:
            site_packages = next(directory.glob("lib/python*/site-packages"))
            (site_packages / "outer.pth").write_text(sysconfig.get_path("purelib"))

    def run(self, *arguments: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [self.python, *arguments],
            cwd=cwd or self.directory,
            env={**kept, "HF_HUB_OFFLINE": "1", **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def generate(self, model: Path, *options: str) -> subprocess.CompletedProcess:
        """The stock console command."""
        options = ("--prompt", "hello", "--max-tokens", "4", *options)
        return self.run(SCRIPTS / "mlx_lm.generate", "--model", model, *options)

    def pip(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def files_named_after_us(self) -> list[Path]:
        return [path for path in self.directory.rglob("*") if "hlwq" in path.name.lower()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(directory)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("source") / "llama")


def convert(source: Path, output: Path, *options: str) -> Path:
    assert main(["--target", "mlx", "--model", str(source), "--output", str(output), *options]) == 0
    return output


def test_installed_wheel(wheel: Path, source: Path, tmp_path: Path):
    model = convert(source, tmp_path / "model")
    environment = Environment(tmp_path / "environment")

    environment.pip("install", "--quiet", "--no-deps", "--no-index", wheel)
    result = environment.generate(model)
    assert result.returncode == 0, result.stderr
    assert "Generation: 4 tokens" in result.stdout

    start = environment.run("-c", "import sys; print([name for name in sys.modules if name.startswith('hlwq')])")
    assert (start.stdout, start.stderr) == ("[]\n", "")  # nothing imported at interpreter start

    environment.pip("uninstall", "--quiet", "--yes", "hlwq-mlx")
    assert not environment.files_named_after_us()
    after = environment.generate(model)
    assert after.returncode and "Model type hlwq not supported" in after.stderr


def test_wheel_without_mlx_lm(wheel: Path, tmp_path: Path):
    environment = Environment(tmp_path / "environment", outer=False)
    environment.pip("install", "--quiet", "--no-deps", "--no-index", wheel)
    result = environment.run("-c", "import importlib.util; print(importlib.util.find_spec('mlx_lm'))")
    assert (result.stdout, result.stderr) == ("None\n", "")


def test_shim_where_nothing_is_installed(source: Path, tmp_path: Path):
    model = convert(source, tmp_path / "model", "--style", "shim")
    environment = Environment(tmp_path / "environment")
    for package in ("hlwq_mlx", "convert"):
        assert environment.run("-c", f"import {package}").returncode, f"{package} is importable; the test is void"

    result = environment.generate(model, "--trust-remote-code")
    assert result.returncode == 0, result.stderr
    assert "Generation: 4 tokens" in result.stdout
    # one file that brings everything: the kernels' texts too, equal to those of this checkout
    loader = runpy.run_path(str(model / "hlwq_model.py"))
    for path in (ROOT / "hlwq_mlx").rglob("*"):
        if path.suffix in (".metal", ".h", ".cu", ".cuh"):
            assert loader["SOURCES"][f"{loader['PREFIX']}/{path.relative_to(ROOT).as_posix()}"] == path.read_text()


def test_a_script_called_convert_is_named(source: Path, tmp_path: Path):
    """`python -c` and `python -m` put the working directory first, and `convert.py` is a common name."""
    model = convert(source, tmp_path / "model")
    (tmp_path / "convert.py").write_text("")
    code = f"exec({(ROOT / 'hlwq_mlx' / 'startup.pth').read_text()!r}); import mlx_lm; mlx_lm.load({str(model)!r})"
    environment = Environment(tmp_path / "environment")
    result = environment.run("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: hlwq_mlx needs its package `convert`, but Python found ")
    assert str(tmp_path / "convert.py") in last and "rename that file" in last


def test_shim_is_for_mlx_only(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = ["--target", "cuda", "--style", "shim", "--model", str(source), "--output", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "--style shim is for --target mlx" in capsys.readouterr().err


def test_tokenizer_class_is_the_one_of_the_source(tmp_path: Path):
    """transformers corrects a wrong class on the Hub by model_type: with ours it could not, so it is written down."""
    from transformers import AutoTokenizer

    source = tiny_model("qwen3_5", tmp_path / "source")
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "Qwen2Tokenizer"}))
    converted = convert(source, tmp_path / "model")
    expected, found = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(converted)
    assert type(found) is type(expected) and type(expected).__name__ == "Qwen3_5Tokenizer"
    assert str(found.backend_tokenizer.pre_tokenizer) == str(expected.backend_tokenizer.pre_tokenizer)
