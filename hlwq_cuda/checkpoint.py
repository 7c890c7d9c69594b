"""What this backend needs of format 1; the one module here that imports `convert`."""

from __future__ import annotations

try:
    from convert.format import (
        BLOCK_SIZES,
        FORMAT_VERSION,
        QUANT_METHOD,
        SUPPORTED_BITS,
        FormatError,
        ModuleSpec,
        QuantizationConfig,
        codes_name,
        default_block_size,
        norms_name,
    )
except ImportError as error:
    import convert

    raise ImportError(
        f"{getattr(convert, '__file__', convert)} hides the package `convert` that HLWQ installs; rename that file, "
        "run from another folder, or start Python with -P"
    ) from error

__all__ = [
    "BLOCK_SIZES",
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "SUPPORTED_BITS",
    "FormatError",
    "ModuleSpec",
    "QuantizationConfig",
    "codes_name",
    "default_block_size",
    "norms_name",
]
