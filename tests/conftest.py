"""Settings that must precede every import of a test, and which tests need a GPU."""

from __future__ import annotations

import os
import sys

import pytest

# the models are tiny: threads that wait for each other cost more than they do, above all beside other test processes
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import triton_device  # (without a GPU: switches Triton's interpreter on)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, the tests that run on it belong to `-m gpu`; elsewhere they run in the interpreter."""
    if triton_device.DEVICE == "cuda":
        for item in items:
            if isinstance(item, pytest.Function) and hasattr(item.module, "DEVICE"):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _one_thread_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """`convert` gives torch every core; two test processes that do are ten times slower than with one thread each."""
    if "torch" in sys.modules:
        monkeypatch.setattr(sys.modules["torch"], "set_num_threads", lambda count: None)
