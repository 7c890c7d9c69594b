"""Where the model comes from: a local directory, a Hub id, or a GGUF file. Everything after sees a directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint import read_config
from convert.errors import ConvertError

# weights and what describes them: no other framework's weights, no images
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "tokenizer*", "LICENSE*", "*.py"]
UNWANTED = ["original/*", "onnx/*", "*.bin", "*.pth", "*.h5", "*.gguf"]


@dataclass(frozen=True)
class Source:
    """A model directory with safetensors files, and what identifies it when a conversion is resumed."""

    directory: Path
    identity: list[list]  # [file name, bytes, modification time in ns] of every file


def open_source(model: str, revision: str | None = None, token: str | None = None) -> Source:
    """The directory of `model`, downloaded if it is a Hub id."""
    path = Path(model).expanduser()
    if path.is_dir():
        return Source(path, identity(path))
    if path.exists():
        raise ConvertError(f"{path}: not a directory and not a .gguf file")
    directory = _download(model, revision, token)
    return Source(directory, identity(directory))


def identity(directory: Path) -> list[list]:
    """Name, size and time of every file directly in `directory`."""
    stats = [(path.name, path.stat()) for path in sorted(directory.iterdir()) if path.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def refuse_quantized(directory: Path) -> None:
    """Refuse a checkpoint that somebody has quantized: its weights are codes, not numbers."""
    config = read_config(directory)
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "quantization", "compression_config"):
            found = part.get(key)
            if found:
                method = found.get("quant_method") or found.get("mode") or key if isinstance(found, dict) else found
                raise ConvertError(
                    f"{directory / 'config.json'}: the model is already quantized ({method}); "
                    "convert the original checkpoint instead"
                )


def _download(model: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(model, revision=revision, token=token, allow_patterns=WANTED, ignore_patterns=UNWANTED)
        )
    except HFValidationError:
        raise ConvertError(f"--model {model}: no such directory or file, and not a Hub id either") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConvertError(f"--model {model}: no such directory, and the Hub could not deliver it: {reason}") from None
