"""Finding our model class from the tests: as an installed package is found, also from a plain checkout."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent
STARTUP = ROOT / "hlwq_mlx" / "startup.pth"


def ensure_found() -> None:
    """Run the package's start-up line in this process, unless Python's `site` did."""
    if importlib.util.find_spec("mlx_lm.models.hlwq") is None:
        exec(STARTUP.read_text())
