"""Settings that must precede every import of a test."""

from __future__ import annotations

import tests.triton_device  # noqa: F401  (without a GPU: switches Triton's interpreter on)
