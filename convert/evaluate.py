"""Compare a quantized model with its source on a text: perplexity, KL divergence and top-1 agreement.

Both models read the same windows of tokens, so every figure is a paired one. The KL divergence of the quantized from
the source's next-token distribution is the figure to trust: perplexity also moves when errors happen to cancel.
Standard errors are those of the mean over windows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint, read_config
from convert.errors import ConvertError
from convert.format import QUANT_METHOD

WINDOW = 512  # tokens


LogitsOf = Callable[[np.ndarray], Any]  # window int64 [length] -> logits [length, vocabulary] of the backend
Loader = Callable[[Path, "str | None", str], LogitsOf]  # directory, torch device, torch dtype


@dataclass(frozen=True)
class Comparison:
    """Means over all evaluated tokens, and standard errors of the means over windows. Nats."""

    perplexity: float
    source_perplexity: float
    nll_difference: float  # mean of the paired difference of the negative log likelihoods
    nll_difference_error: float
    kl: float  # mean KL(source || quantized)
    kl_error: float
    top1: float  # share of positions where both models put the same token first
    tokens: int
    kl_by_window: tuple[float, ...]


def compare(
    source: LogitsOf, quantized: LogitsOf, windows: np.ndarray, progress: Callable[[int], object] = lambda tokens: None
) -> Comparison:
    """Run both models over `windows`, int64 [windows, length]; the first token of a window is only read."""
    rows = []
    for window in windows:
        rows.append(window_metrics(source(window), quantized(window), window))
        progress(len(window) - 1)
    nll_source, nll, kl, top1 = np.array(rows).T
    difference = nll - nll_source
    return Comparison(
        perplexity=math.exp(min(nll.mean(), 700.0)),
        source_perplexity=math.exp(nll_source.mean()),
        nll_difference=float(difference.mean()),
        nll_difference_error=_standard_error(difference),
        kl=float(kl.mean()),
        kl_error=_standard_error(kl),
        top1=float(top1.mean()),
        tokens=len(windows) * (windows.shape[1] - 1),
        kl_by_window=tuple(kl.tolist()),
    )


def window_metrics(source: Any, quantized: Any, window: np.ndarray) -> tuple[float, float, float, float]:
    """Negative log likelihood of both, KL divergence and top-1 agreement, means over the positions of one window.

    Logits [length, vocabulary], both torch tensors or both numpy arrays.
    """
    if source.shape != quantized.shape:
        raise ConvertError(
            f"the models have vocabularies of {source.shape[-1]} and {quantized.shape[-1]} tokens; "
            "the quantized directory was made from another model"
        )
    log_softmax = _log_softmax if isinstance(source, np.ndarray) else _torch_log_softmax
    log_p, p, best_p = log_softmax(source[:-1])
    log_q, _, best_q = log_softmax(quantized[:-1])
    positions, targets = list(range(len(window) - 1)), window[1:].tolist()
    nll_source, nll = (float(-each[positions, targets].mean()) for each in (log_p, log_q))
    kl = float((p * (log_p - log_q)).sum(-1).mean())
    return nll_source, nll, kl, float((best_p == best_q).sum()) / len(positions)


def _torch_log_softmax(logits: Any) -> tuple[Any, Any, Any]:
    log_p = logits.float().log_softmax(-1)
    return log_p, log_p.exp(), log_p.argmax(-1)


def _log_softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return log_p, np.exp(log_p), log_p.argmax(axis=-1)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def bits_per_weight(directory: Path) -> float:
    """Stored bits a weight over all tensors of an HLWQ directory, norms and unquantized tensors included."""
    checkpoint = Checkpoint.open(directory)
    modules = checkpoint.quantization.modules
    nbytes = sum(info.nbytes for info in checkpoint.tensors.values())
    weights = 0
    for name, info in checkpoint.tensors.items():
        module, _, kind = name.rpartition(".")
        if module in modules and kind == "weight_norms":
            weights += math.prod(info.shape[:-1]) * modules[module].in_features
        elif not (module in modules and kind == "weight_codes"):
            weights += info.size
    return 8 * nbytes / weights


def is_hlwq(directory: Path) -> bool:
    """True for a directory that the converter wrote."""
    config = read_config(directory).get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD


def pick_loader(directories: Sequence[Path]) -> Loader:
    """What runs the directories: one of --target mlx has mlx-lm's names, one of --target cuda those of transformers."""
    for_mlx = {Checkpoint.open(each).quantization.base_model_type is not None for each in directories}
    if len(for_mlx) > 1:
        raise ConvertError("the directories are for mlx-lm and for transformers; evaluate them in two runs")
    return mlx_model if for_mlx.pop() else torch_model


def mlx_model(directory: Path, device: str | None = None, dtype: str = "float32") -> LogitsOf:
    """A source or an HLWQ directory in mlx-lm, run by its own kernels. `device` and `dtype` are those of the files."""
    try:
        import mlx.core as mx
        from mlx_lm import load
    except ImportError:
        raise ConvertError(f"{directory}: the directory is for MLX: pip install 'hlwq-mlx[mlx]'") from None
    model, *_ = load(str(directory))

    def logits(window: np.ndarray) -> np.ndarray:
        return np.array(model(mx.array(window)[None])[0].astype(mx.float32))

    return logits


def torch_model(directory: Path, device: str | None = None, dtype: str = "float32") -> LogitsOf:
    """A source or an HLWQ directory (decoded in numpy) in transformers. device None: the best that is present."""
    torch = import_torch()
    device = device or best_device()
    model = load_transformers(directory, getattr(torch, dtype)).to(device)

    def logits(window: np.ndarray) -> Any:
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(window)[None].to(device), use_cache=False).logits[0]

    return logits


def import_torch() -> Any:
    """torch with all cores (the command line gives BLAS one thread for the converter), or one sentence."""
    try:
        import torch
        from transformers.utils import logging
    except ImportError:
        raise ConvertError("this needs torch and transformers: pip install torch transformers") from None
    logging.disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    return torch


def best_device() -> str:
    """cuda, mps or cpu."""
    torch = import_torch()
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_transformers(directory: Path, dtype: Any) -> Any:
    """The transformers causal language model of a source or a decoded HLWQ directory, on the CPU."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    if not is_hlwq(directory):
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    checkpoint = Checkpoint.open(directory)
    config: Any = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    state = {}
    for module in checkpoint.quantization.modules:
        state[f"{module}.weight"] = torch.from_numpy(checkpoint.weight(module, dtype=np.float32)).to(dtype)
    for name in checkpoint.tensors:
        if name not in state and not name.endswith((".weight_codes", ".weight_norms")):
            state[name] = torch.from_numpy(checkpoint.tensor(name).astype(np.float32)).to(dtype)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model_class.config_class is not type(config):  # the text model of one that also sees
        config = config.get_text_config()
    return model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()
