"""Tiny checkpoints and their conversions, made once a session and shared by the tests of every backend."""

from __future__ import annotations

from pathlib import Path

import torch

from convert.__main__ import main as convert
from tests.tiny_models import VOCABULARY, tiny_model

PROMPT = torch.tensor([[257, 72, 101, 108, 108, 111, 258, 84, 104, 101, 32, 97, 110, 115, 119, 101, 114]])


def source(family: str, root: Path, dtype: str = "float32") -> Path:
    """The unquantized checkpoint of a family under `root`, written at most once."""
    directory = root / f"{family}-{dtype}"
    return directory if directory.exists() else tiny_model(family, directory, dtype)


def converted(family: str, root: Path, *flags: str, dtype: str = "float32") -> Path:
    """The source converted with `--target cuda` and the flags of `python -m convert`, at most once."""
    directory = root / "-".join([family, dtype, "cuda", *(flag.strip("-") for flag in flags)])
    if not directory.exists():
        arguments = ["--target", "cuda", "--model", str(source(family, root, dtype)), "--output", str(directory)]
        assert convert([*arguments, *flags]) == 0
    return directory


def random_ids(length: int, seed: int = 0) -> torch.Tensor:
    """int64 [1, length]."""
    return torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))
