"""How a benchmark ends: its result in a file, and as the last line of the output."""

from __future__ import annotations

import json
from pathlib import Path


def report(result: dict, output: Path | None) -> None:
    """Write `result` to `output`, if given, and print it as one line of JSON."""
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
