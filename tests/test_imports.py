"""The arrows between modules hold, and importing each package needs no backend."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BACKENDS = ("mlx", "mlx_lm", "torch", "triton", "transformers", "gguf")


def imports_of(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_backends_never_meet():
    for package, other in (("hlwq_mlx", "hlwq_cuda"), ("hlwq_cuda", "hlwq_mlx")):
        for path in sources(package):
            assert not any(name.split(".")[0] == other for name in imports_of(path)), path


def test_one_file_of_a_backend_imports_convert():
    for package in ("hlwq_mlx", "hlwq_cuda"):
        for path in sources(package):
            if path.name != "checkpoint.py":
                assert not any(name.split(".")[0] == "convert" for name in imports_of(path)), path


def test_nothing_imports_a_command_line():
    for package in ("convert", "hlwq_mlx", "hlwq_cuda"):
        for path in sources(package):
            assert not any("__main__" in name for name in imports_of(path)), path


def test_convert_imports_no_backend_at_module_level():
    for path in sources("convert"):
        assert not {name.split(".")[0] for name in imports_of(path, top_level_only=True)} & set(BACKENDS), path


@pytest.mark.parametrize("module", ["convert.format", "convert.checkpoint", "convert.reference", "convert"])
def test_convert_runs_without_backends(module: str):
    block = f"import sys; sys.modules.update(dict.fromkeys({BACKENDS!r})); import {module}"
    subprocess.run([sys.executable, "-c", block], check=True, cwd=ROOT)


def test_what_stands_in_the_way_of_convert_is_named(tmp_path: Path):
    """A missing dependency, and a file that hides the package."""
    pytest.importorskip("torch")

    def complaint(code: str, folder: Path) -> str:
        command = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r}); {code}"]
        return subprocess.run(command, capture_output=True, text=True, cwd=folder).stderr.splitlines()[-1]

    missing = complaint("sys.modules['ml_dtypes'] = None; import hlwq_cuda", ROOT)
    assert "ml_dtypes" in missing and "hides" not in missing
    (tmp_path / "convert.py").write_text("")
    hidden = complaint("import hlwq_cuda", tmp_path)
    assert str(tmp_path / "convert.py") in hidden and "rename that file" in hidden
