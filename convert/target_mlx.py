"""The target for mlx-lm: the names that its model class has after its own `sanitize`.

mlx-lm's architectures rename, transpose, stack and drop tensors when they load a source. This target runs that very
code on arrays that are not read yet (MLX is lazy), then writes what comes out, so that nothing needs doing at load.
Most results are a source tensor under a new name, or a stack of such: those are read from the file by rows. The rest
(a transposed weight, a norm plus one) is evaluated by MLX, one tensor at a time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.checkpoint import read_config
from convert.errors import ConvertError
from convert.format import QuantizationConfig
from convert.shim import FILE_NAME, loader_source
from convert.target import Kind, OutputTensor
from convert.target_cuda import HEADS, KEEP_DTYPE, MIN_WEIGHTS, NOT_TEXT, ROUTERS, CudaTarget
from convert.tensors import TensorInfo, read, read_tensors

MODEL_TYPE = "hlwq"
TOKENIZER_CONFIG = "tokenizer_config.json"
EVALUATED_BYTES = 2**28  # MLX keeps what it has evaluated; above this the arrays are made anew
SANITIZE_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
)  # what foreign code raises on unexpected tensors


class MlxTarget:
    """The source as mlx-lm names it."""

    format = "mlx"

    def __init__(self, directory: Path, style: str = "package") -> None:
        self._directory = directory
        self._style = style
        self._config = read_config(directory)
        self._infos = read_tensors(directory)
        self._mlx = _Architecture(directory, self._config, self._infos)
        names = sorted(self._mlx.tensors, key=_natural_order)  # MLX keeps none, and a resumed run must have the same
        self.tensors: Sequence[OutputTensor] = [self._describe(name) for name in names]

    def read(self, tensor: OutputTensor, rows: slice) -> np.ndarray:
        """A range of the tensor's first axis."""
        return self._mlx.read(tensor.name, rows)

    def config(self, quantization: QuantizationConfig) -> dict:
        """The source's config under our model_type, which mlx-lm looks up; the source's is in quantization_config."""
        model_type = self._config["model_type"]
        quantization = replace(quantization, base_model_type=model_type)
        config = {**self._config, "quantization_config": quantization.to_dict()}
        if self._style == "shim":
            return {**config, "model_file": FILE_NAME}
        config.pop("auto_map", None)  # with a model_type that it doesn't know, transformers would ask to run that code
        return {**config, "model_type": MODEL_TYPE}

    def files(self) -> Mapping[str, Path | str]:
        """The source's small files, and with --style shim the loader."""
        files = dict(CudaTarget(self._directory).files())
        if self._style == "shim":
            files[FILE_NAME] = loader_source()
        else:
            files |= self._tokenizer_config()
        return files

    def _tokenizer_config(self) -> dict[str, str]:
        """tokenizer_config.json with the class that transformers chooses for the source.

        For some model types transformers corrects the class that the Hub's file names. It wouldn't recognize ours.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._directory)
        except (OSError, ValueError):  # no tokenizer, or one that needs remote code: the files are copied as they are
            return {}
        path = self._directory / TOKENIZER_CONFIG
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {TOKENIZER_CONFIG: json.dumps({**config, "tokenizer_class": type(tokenizer).__name__}, indent=2)}

    def _describe(self, name: str) -> OutputTensor:
        found = self._mlx.tensors[name]
        kind, reason = self._classify(name, found.shape)
        keep = name.rpartition(".")[2] in KEEP_DTYPE or not self._mlx.may_cast(name)
        return OutputTensor(name, found.shape, found.dtype, self._mlx.where(name), kind, reason, keep)

    def _classify(self, name: str, shape: tuple[int, ...]) -> tuple[Kind | None, str]:
        """What a tensor is by the class of the layer that owns it, or None and why it keeps its dtype."""
        layer = self._mlx.layer_class(name)
        parts = name.removesuffix(".weight").split(".")
        if layer not in ("Linear", "Embedding", "SwitchLinear") or not name.endswith(".weight"):
            return None, "not a linear layer or embedding"
        if np.prod(shape) < MIN_WEIGHTS:
            return None, "small"
        if any(part in NOT_TEXT for part in parts):
            return None, "not text"
        if layer == "SwitchLinear":
            return Kind.EXPERTS, ""
        if layer == "Embedding":
            is_position = parts[-1] == "wpe" or "pos" in parts[-1]
            return (None, "positions") if is_position else (Kind.EMBEDDING, "")
        if parts[-1] in ROUTERS:
            return None, "router"
        return (Kind.HEAD if parts[-1] in HEADS else Kind.LINEAR), ""


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the sanitized model: a source tensor, a stack of several, or (no sources) computed by MLX."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sources: tuple[str, ...]
    stacked: bool


class _Architecture:
    """mlx-lm's model class for a source, and the source's tensors as that class wants them: `tensors`, by name.

    All of MLX runs on one thread of its own, because its streams belong to the thread that made them.
    """

    def __init__(self, directory: Path, config: dict, infos: Mapping[str, TensorInfo]) -> None:
        self._directory = directory
        self._infos = infos
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mlx")
        self._latest: dict[str, np.ndarray] = {}  # the last two computed tensors: tasks overlap at a boundary
        self._lock = threading.Lock()
        self._evaluated_bytes = 0
        self._mx, self._nn, self._utils, self._switch_linear = _import_mlx()
        self._run(self._load, config)

    def where(self, name: str) -> str:
        """The source's file and tensor."""
        sources = self.tensors[name].sources
        if not sources:
            return f"{self._directory}: tensor {name}"
        first, last = sources[0], sources[-1]
        what = f"tensor {first}" if first == last else f"one of the stacked tensors {first} to {last}"
        return f"{self._infos[first].path}: {what}"

    def layer_class(self, name: str) -> str:
        """The class of the layer that owns a tensor, "" for one that is not exactly of that class."""
        return self._layers.get(name.rpartition(".")[0], "")

    def may_cast(self, name: str) -> bool:
        """False for tensors that mlx-lm's model wants in their own dtype."""
        return self._cast_predicate(name)

    def read(self, name: str, rows: slice) -> np.ndarray:
        """A range of the first axis."""
        tensor = self.tensors[name]
        if not tensor.sources:
            return self._computed(name)[rows] if tensor.shape else self._computed(name)
        if not tensor.stacked:
            return read(self._infos[tensor.sources[0]], rows)
        return np.stack([read(self._infos[source]) for source in tensor.sources[rows]])

    def _run(self, function: Callable, *args: Any) -> Any:
        return self._thread.submit(function, *args).result()

    def _load(self, config: dict) -> None:
        with self._mx.stream(self._mx.cpu):
            try:
                self._model_class, args_class = self._utils._get_classes(config=config)
                self._args = args_class.from_dict(config)
                model = self._model_class(self._args)
                self._weights, recorded = self._sanitize(model)
            except SANITIZE_ERRORS as error:
                model_type, reason = config.get("model_type"), " ".join(str(error).split())
                raise ConvertError(
                    f"{self._directory}: mlx-lm cannot load this as {model_type!r} ({type(error).__name__}: {reason}); "
                    "is the architecture known to the installed mlx-lm, and is the checkpoint whole?"
                ) from None
        self._cast_predicate = getattr(model, "cast_predicate", lambda name: True)
        classes = {self._nn.Linear: "Linear", self._nn.Embedding: "Embedding", self._switch_linear: "SwitchLinear"}
        self._layers = {path: classes.get(type(module), "") for path, module in model.named_modules()}
        self._check_names(model)
        self.tensors = {
            name: _Tensor(tuple(array.shape), _numpy_dtype(array.dtype), *recorded.sources(array))
            for name, array in self._weights.items()
        }

    def _sanitize(self, model: Any) -> tuple[dict[str, Any], _Recorded]:
        """What `sanitize` makes of the source's tensors, nothing of it evaluated."""
        loaded: dict[str, Any] = {}
        for path in sorted({info.path for info in self._infos.values()}):
            loaded.update(self._mx.load(str(path)))
        loaded = {name: array for name, array in loaded.items() if name in self._infos}
        recorded = _Recorded(loaded)
        with _recording_stacks(self._mx, recorded):
            weights = model.sanitize(loaded) if hasattr(model, "sanitize") else loaded
        return weights, recorded

    def _check_names(self, model: Any) -> None:
        from mlx.utils import tree_flatten

        expected = {name for name, _ in tree_flatten(model.parameters())}
        for names, what in (
            (expected - set(self._weights), "is missing in the source"),
            (set(self._weights) - expected, "of the source belongs to no layer of mlx-lm's model"),
        ):
            if names:
                raise ConvertError(f"{self._directory}: tensor {min(names)} {what}; is the checkpoint whole?")

    def _computed(self, name: str) -> np.ndarray:
        with self._lock:
            if name not in self._latest:
                while len(self._latest) > 1:
                    self._latest.pop(next(iter(self._latest)))
                self._latest[name] = self._run(self._evaluate, name)
            return self._latest[name]

    def _evaluate(self, name: str) -> np.ndarray:
        with self._mx.stream(self._mx.cpu):
            if self._evaluated_bytes > EVALUATED_BYTES:
                self._weights, _ = self._sanitize(self._model_class(self._args))
                self._mx.clear_cache()
                self._evaluated_bytes = 0
            array = self._weights[name]
            self._mx.eval(array)
            self._evaluated_bytes += array.nbytes
            return _to_numpy(self._mx, array)


class _Recorded:
    """What `sanitize` did: which arrays are loaded ones, and which are stacks of those along the first axis."""

    def __init__(self, loaded: Mapping[str, Any]) -> None:
        self._names = {id(array): (name, array) for name, array in loaded.items()}  # held, so no id is used again
        self._stacks: dict[int, tuple[Any, list]] = {}

    def stack(self, result: Any, parts: list) -> None:
        """Note that `result` joins `parts`."""
        self._stacks[id(result)] = (result, parts)

    def sources(self, array: Any) -> tuple[tuple[str, ...], bool]:
        """The source tensors that `array` is made of, none if it was computed; and whether it stacks them."""
        if id(array) in self._names:
            return (self._names[id(array)][0],), False
        parts = self._stacks.get(id(array), (None, []))[1]
        if parts and all(id(part) in self._names for part in parts):
            return tuple(self._names[id(part)][0] for part in parts), True
        return (), False


@contextmanager
def _recording_stacks(core: Any, recorded: _Recorded) -> Iterator[None]:
    """While `sanitize` runs, note which arrays mx.stack joins: experts can then be read one by one.

    MLX has no way to ask an unevaluated array for its inputs, and evaluating one row of a stack evaluates all of it.
    """
    original = core.stack

    def stack(arrays: Sequence, axis: int = 0, **kwargs: Any) -> Any:
        arrays = list(arrays)
        result = original(arrays, axis, **kwargs)
        if axis == 0:
            recorded.stack(result, arrays)
        return result

    core.stack = stack
    try:
        yield
    finally:
        core.stack = original


def _natural_order(name: str) -> list[tuple]:
    """Layer 2 before layer 10."""
    return [(True, int(part)) if part.isdigit() else (False, part) for part in name.split(".")]


def _import_mlx() -> tuple[Any, Any, Any, Any]:
    try:
        import mlx.core
        import mlx.nn
        from mlx_lm import utils
        from mlx_lm.models.switch_layers import SwitchLinear
    except ImportError as error:
        raise ConvertError(
            f"--target mlx needs mlx-lm ({error}); install the extra: hlwq-mlx[mlx] on a Mac, "
            "hlwq-mlx[mlx-cpu] or hlwq-mlx[mlx-cuda] on Linux"
        ) from None
    return mlx.core, mlx.nn, utils, SwitchLinear


def _numpy_dtype(dtype: Any) -> np.dtype:
    name = str(dtype).removeprefix("mlx.core.")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name.removesuffix("_"))


def _to_numpy(core: Any, array: Any) -> np.ndarray:
    if array.dtype == core.bfloat16:  # numpy has no such dtype to exchange it by
        return np.array(array.view(core.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)
