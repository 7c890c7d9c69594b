"""`--style shim`: one Python file that brings hlwq_mlx along, for machines where the package is not installed.

mlx-lm runs the file that config.json names as `model_file` when it is given --trust-remote-code. Ours holds the sources
of this installation as text, copied at conversion time, and unpacks them to a temporary directory. The only change is a
prefix on our own imports, so that they never meet an installed hlwq_mlx or another package called `convert`.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

FILE_NAME = "hlwq_model.py"
ROOT = Path(__file__).parent.parent
PACKAGES = ("convert", "hlwq_mlx")
# of `convert`, what hlwq_mlx imports; of hlwq_mlx, all but what belongs to an installation
CONVERT_FILES = ("convert/__init__.py", "convert/codebook.py", "convert/format.py")
LEFT_OUT = ("finder.py", "__main__.py")
SUFFIXES = (".py", ".metal", ".h", ".cuh")
_OWN_IMPORT = re.compile(rf"^(\s*)(from|import) ({'|'.join(PACKAGES)})\b", re.MULTILINE)

_LOADER = '''\
"""How mlx-lm loads this model with --trust-remote-code: the sources of hlwq-mlx (Apache-2.0), bundled when it was made.

Written by python -m convert --style shim. For machines where the package is installed, convert without that flag.
"""

import importlib
import importlib.util
import pathlib
import sys
import tempfile

PREFIX = "@PREFIX@"
SOURCES = {
@SOURCES@}


def unpack():
    """Make PREFIX a package, in a directory that lives as long as the process: the kernels are read when first used."""
    directory = tempfile.TemporaryDirectory(prefix=PREFIX)
    for name, text in SOURCES.items():
        path = pathlib.Path(directory.name, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    root = pathlib.Path(directory.name, PREFIX)
    spec = importlib.util.spec_from_file_location(PREFIX, root / "__init__.py", submodule_search_locations=[str(root)])
    package = importlib.util.module_from_spec(spec)
    package.directory = directory
    sys.modules[PREFIX] = package


if PREFIX not in sys.modules:
    unpack()
model = importlib.import_module(f"{PREFIX}.hlwq_mlx.model")
Model, ModelArgs = model.Model, model.ModelArgs
'''


def loader_source() -> str:
    """The text of the loader file, the same for every model that one installation converts."""
    paths = [ROOT / name for name in CONVERT_FILES] + sorted(
        path for path in (ROOT / "hlwq_mlx").rglob("*") if path.suffix in SUFFIXES and path.name not in LEFT_OUT
    )
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    digest = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()
    prefix = f"hlwq_bundled_{digest[:8]}"  # two models made by different releases can live in one process
    sources = {f"{prefix}/__init__.py": ""}
    for name, text in texts.items():
        sources[f"{prefix}/{name}"] = _OWN_IMPORT.sub(rf"\1\2 {prefix}.\3", text) if name.endswith(".py") else text
    entries = "".join(f"    {name!r}: {_literal(text)},\n" for name, text in sources.items())
    return _LOADER.replace("@PREFIX@", prefix).replace("@SOURCES@", entries)


def _literal(text: str) -> str:
    """A string literal that reads like the file: escaped only where it must be."""
    escaped = text.replace("\\", "\\\\").replace("'''", "\\'\\'\\'")
    return f"'''\\\n{escaped}'''"
