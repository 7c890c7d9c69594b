"""The mark of test modules that emulate kernels: skipped without clang; in continuous integration that is a failure."""

from __future__ import annotations

import os

import pytest

from tests.metal_cpu.compiler import clang_missing

reason = clang_missing()
if reason and os.environ.get("CI"):
    raise RuntimeError(reason)
emulator = pytest.mark.skipif(reason is not None, reason=str(reason))
