"""Where the model comes from: a local directory, a Hub id, or a GGUF file. Everything after sees a directory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert.checkpoint import read_config
from convert.errors import ConvertError
from convert.gguf import decode_gguf
from convert.progress import ProgressBar, no_progress_bar
from convert.shard import ShardFile, StoredTensor
from convert.tensors import DTYPES, read_tensors

DESCRIPTIONS = ["*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "*.py"]  # what describes the weights
WEIGHTS = ["model*.safetensors"]
ELSEWHERE = ["*/*"]  # sub-folders hold other formats (original/, onnx/)
CODES = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_codes", ".codes", "__packed")
IDENTIFYING = (".safetensors", ".json", ".gguf")
STAGING_MARK = ".hlwq-staging"


@dataclass(frozen=True)
class Source:
    """A model directory with safetensors files, and what identifies it when a conversion is resumed."""

    directory: Path
    identity: list[list]  # [file name, bytes, modification time in ns] of weights and config


@contextmanager
def open_source(
    model: str,
    *,
    staging: Path | None,
    revision: str | None = None,
    token: str | None = None,
    progress_bar: ProgressBar = no_progress_bar,
) -> Iterator[Source]:
    """The directory of `model` for the time of the `with` block.

    staging: a directory to create for a decoded GGUF, deleted afterwards. None: the caller wants headers only, so that
    no GGUF is decoded and nothing but small files and headers is downloaded from the Hub.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        yield Source(path, identity(sorted(path.iterdir())))
    elif path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConvertError(f"{path}: --model is a directory, a Hub id or a .gguf file")
        with _scratch(staging) as directory:
            decode_gguf(path, directory, weights=staging is not None, progress_bar=progress_bar)
            yield Source(directory, identity([path]))
    elif path.suffix in (".gguf", ".safetensors") or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConvertError(f"{path}: no such file or directory")
    elif staging is None:
        with _scratch(None) as directory:
            _download_headers(model, revision, token, directory)
            yield Source(directory, [])
    else:
        directory = _download(model, revision, token, DESCRIPTIONS + WEIGHTS)
        yield Source(directory, identity(sorted(directory.iterdir())))


def identity(paths: list[Path]) -> list[list]:
    """Name, size and time of the files among `paths` that decide what is written."""
    stats = [(path.name, path.stat()) for path in paths if path.suffix in IDENTIFYING and path.is_file()]
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
                raise _already_quantized(directory / "config.json", str(method))
    for name, info in read_tensors(directory).items():
        if name.endswith(CODES) or info.dtype.name.startswith("float8"):
            raise _already_quantized(info.path, f"tensor {name}, {info.dtype.name}")


def _already_quantized(path: Path, what: str) -> ConvertError:
    return ConvertError(f"{path}: the model is already quantized ({what}); convert the original checkpoint instead")


@contextmanager
def _scratch(staging: Path | None) -> Iterator[Path]:
    """A directory to fill, deleted at the end; one that a killed run left at `staging` is deleted first."""
    if staging is None:
        with tempfile.TemporaryDirectory(prefix="hlwq-") as temporary:
            yield Path(temporary) / "model"
        return
    if staging.exists():
        if not (staging / STAGING_MARK).exists():
            raise ConvertError(f"{staging}: the name is needed for temporary files; move it or choose another --output")
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    (staging / STAGING_MARK).touch()
    try:
        yield staging / "model"
    finally:
        shutil.rmtree(staging)


def _download(model: str, revision: str | None, token: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(model, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=ELSEWHERE)
        )
    except HFValidationError:
        raise ConvertError(f"--model {model}: no such file or directory, and not a Hub id either") from None
    except (HfHubHTTPError, OSError) as error:
        raise _hub_error(model, error) from None


def _download_headers(model: str, revision: str | None, token: str | None, directory: Path) -> None:
    """The Hub model's small files, and safetensors files of the real size that hold only headers (sparse files)."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    cached = _download(model, revision, token, DESCRIPTIONS)
    shutil.copytree(cached, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    try:
        metadata = get_safetensors_metadata(model, revision=revision, token=token)
    except (HfHubHTTPError, OSError, NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise _hub_error(model, error) from None
    for name, file_metadata in metadata.files_metadata.items():
        tensors = []
        for tensor, info in file_metadata.tensors.items():
            if info.dtype not in DTYPES:
                raise ConvertError(f"{model}/{name}: tensor {tensor} has dtype {info.dtype}, which is not supported")
            tensors.append(StoredTensor(tensor, DTYPES[info.dtype], tuple(info.shape)))
        with (directory / name).open("wb") as file:
            ShardFile(file, tensors, {"format": "pt"})


def _hub_error(model: str, error: Exception) -> ConvertError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ConvertError(f"--model {model}: no such file or directory, and the Hub did not deliver it: {reason}")
