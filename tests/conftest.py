"""Settings that must precede every import of a test."""

from __future__ import annotations

import os

# the models are tiny: threads that wait for each other cost more than they do, above all beside other test processes
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tests.triton_device  # noqa: F401  (without a GPU: switches Triton's interpreter on)
