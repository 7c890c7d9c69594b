"""What this backend needs of format 1; the one module here that imports `convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from convert.checkpoint import Checkpoint, read_config
    from convert.errors import ConvertError
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
    if not (error.name or "").startswith("convert"):
        raise  # something that `convert` needs is not installed

    import convert

    raise ImportError(
        f"{getattr(convert, '__file__', convert)} hides the package `convert` that HLWQ installs; rename that file, "
        "run from another folder, or start Python with -P"
    ) from error

if TYPE_CHECKING:
    import numpy as np

USER_ERRORS = (FormatError, ConvertError)  # one sentence each, for what a user can put right

__all__ = [
    "BLOCK_SIZES",
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "SUPPORTED_BITS",
    "USER_ERRORS",
    "Checkpoint",
    "FormatError",
    "ModuleSpec",
    "QuantizationConfig",
    "codes_name",
    "default_block_size",
    "encode",
    "find_directory",
    "norms_name",
    "open_checkpoint",
    "plan_quantization",
    "refuse_mlx",
]


def find_directory(model: Path | str) -> Path:
    """The directory `model`, or the local copy of the Hub repository of that name, downloaded if need be."""
    path, name = Path(model).expanduser(), str(model)
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FormatError(f"{path}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{name}: no such directory, and the Hub could not deliver it: {reason}") from None


def open_checkpoint(directory: Path | str) -> Checkpoint:
    """Check config.json and every header of a directory made with `--target cuda`.

    Raises FormatError, one sentence, for a directory made for MLX and for anything that format 1 forbids.
    """
    directory = Path(directory)
    refuse_mlx(read_config(directory), str(directory))
    return Checkpoint.open(directory)


def refuse_mlx(config: Mapping, where: str) -> None:
    """FormatError when `config`, the config.json of the directory `where`, was written for MLX."""
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("base_model_type") is not None:
        raise FormatError(
            f"{where} was made for MLX, whose tensor names transformers does not know; convert the source model with "
            "`python -m convert --target cuda --model SOURCE --output DIRECTORY`"
        )


def plan_quantization(
    directory: Path | str,
    bits: int,
    block_size: int | None,
    recipe: str,
    embed_bits: int | None,
    head_bits: int | None,
) -> tuple[QuantizationConfig, dict[str, float]]:
    """What the converter would quantize in the unquantized model in `directory`, from headers alone.

    The second part says for every module how the search encoder weighs its inputs (convert/plan.py).
    """
    from convert.plan import make_plan
    from convert.recipe import make_recipe
    from convert.target import open_target

    target = open_target("cuda", Path(directory))
    plan = make_plan(target.tensors, make_recipe(recipe, bits, embed_bits, head_bits), block_size)
    return plan.quantization(), {planned.tensor.module: planned.power for planned in plan.quantized}


def encode(weight: np.ndarray, spec: ModuleSpec, encoder: str | None, power: float) -> tuple[np.ndarray, np.ndarray]:
    """float32 [..., N, K] -> the two tensors of format 1: uint32 words, float16 norms. None: the converter's default.

    Raises ValueError when the weight holds NaN or infinity.
    """
    from convert.encoders import DEFAULT_ENCODER, ENCODERS
    from convert.packing import pack

    encoder = encoder or DEFAULT_ENCODER
    if encoder not in ENCODERS:
        raise ValueError(f"encoder is {encoder!r}; the encoders are {', '.join(ENCODERS)}")
    encoded = ENCODERS[encoder](weight, spec, power)
    return pack(encoded.codes, spec.bits), encoded.norms
