"""Where the Triton tests run: on the GPU, or in Triton's interpreter on the CPU where there is none.

Triton looks at the switch when it is first imported, so conftest.py imports this module before any test.
"""

from __future__ import annotations

import os

try:
    import torch
except ImportError:
    torch = None

if torch is not None and torch.cuda.is_available():
    DEVICE = "cuda"
    PDL = torch.cuda.get_device_capability() >= (9, 0)
else:
    DEVICE = "cpu"
    PDL = False
    os.environ["TRITON_INTERPRET"] = "1"

LAUNCH = {"PDL": True, "launch_pdl": True} if PDL else {"PDL": False}


def poisoned_activation(size: int, block: int, format: str, eps: float | None = None):
    """Outputs for one row of `size`: an element a kernel forgets is NaN, or -128, which no quantized value is."""
    from hlwq_cuda.kernels.plain import Activation

    padded = size if format == "plain" else -(-size // block) * block
    fill, dtype = (-128, torch.int8) if format == "int8" else (float("nan"), torch.float16)
    values = torch.full((padded,), fill, dtype=dtype, device=DEVICE)
    scales = torch.full((-(-size // block),), float("nan"), device=DEVICE)
    half_sums = torch.full((-(-padded // 32),), float("nan"), device=DEVICE)
    mean_squares = None if eps is None or format == "plain" else torch.full_like(scales, float("nan"))
    return Activation(values, scales, half_sums, mean_squares, eps or 0.0)
