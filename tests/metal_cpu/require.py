"""Marks of tests that emulate kernels: skipped without clang or a peer's package; in CI that is a failure."""

from __future__ import annotations

import importlib.util
import os

import pytest

from tests.metal_cpu.compiler import clang_missing

reason = clang_missing()
if reason and os.environ.get("CI"):
    raise RuntimeError(reason)
emulator = pytest.mark.skipif(reason is not None, reason=str(reason))

missing = None
if not importlib.util.find_spec("jang_tools"):
    missing = "the peer's kernel needs its package and Python 3.11: pip install jang==2.5.50"
if missing and os.environ.get("CI"):
    raise RuntimeError(missing)
peer = pytest.mark.skipif(missing is not None, reason=str(missing))
