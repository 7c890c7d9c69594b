"""Every kind of GEMV compiles to machine code for the GPUs we name; nothing runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_every_kind_compiles():
    script = Path(__file__).parent / "compile_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=script.parent.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    assert {fact["capability"] for fact in facts} == {80, 86, 89, 90, 100, 120}
    assert len({(fact["bits"], fact["mode"], fact["kernel"]) for fact in facts}) == len(facts) == 20


def test_the_step_compiles():
    script = Path(__file__).parent / "compile_step_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=script.parent.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({(fact["capability"], fact["kernel"]) for fact in facts}) == 3 * 15
