"""Running mlx-lm from the tests: the start-up line of an installed package, and the environment of child processes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
STARTUP = ROOT / "hlwq_mlx" / "startup.pth"


def ensure_found() -> None:
    """Run the package's start-up line, unless `site` did: so that the tests also run from a plain checkout."""
    if importlib.util.find_spec("mlx_lm.models.hlwq") is None:
        exec(STARTUP.read_text())


def environment(home: Path, **variables: str) -> dict[str, str]:
    """For a child process: no network, caches in `home`, and this checkout hidden unless `variables` says otherwise."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HOME")}
    return {**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **variables}
