"""Steps of a conversion that run the source model: `--encoder calibrated` and `--recipe auto`."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.allocate import auto_budget, auto_plans, auto_recipe
from convert.calibrate import Outcome, calibrate, judging_windows
from convert.code_store import CodeStore, StoredEncoder, row_digests
from convert.encoders import Encoder
from convert.errors import ConvertError
from convert.evaluate import WINDOW, import_torch, load_transformers
from convert.format import ModuleSpec
from convert.plan import Plan, PlannedTensor
from convert.recipe import Recipe
from convert.search_torch import DeviceEncoder
from convert.sensitivity import measure
from convert.source import Source
from convert.target import Target
from convert.text import load_tokenizer, read_text, token_windows

CALIBRATED = "calibrated"  # the encoder's name
AUTO = "auto"  # the recipe's name
CALIBRATION_WINDOWS = (
    128  # 65 536 tokens; 64 windows gave a KL divergence 16 % larger on the same domain, 18 % on another
)
PROBE_WINDOWS = 4  # enough to rank groups: each causes its own, paired change
SELF = "self"
DEVICES = ("cpu", "cuda", "mps")

Progress = Callable[[int], object]


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options of calibration and measured bits that do not fit together, before anything is read."""
    auto, targets = arguments.recipe == AUTO, (arguments.target_bpw, arguments.target_size)
    if auto and targets.count(None) != 1:
        raise ConvertError("--recipe auto needs --target-bpw or --target-size, one of them")
    if not auto and targets.count(None) != 2:
        raise ConvertError("--target-bpw and --target-size serve --recipe auto; add it or drop them")
    if auto and (arguments.embed_bits is not None or arguments.head_bits is not None):
        raise ConvertError(
            "--recipe auto chooses the bits of embedding and head too; drop --embed-bits and --head-bits"
        )
    if arguments.device is not None:
        _check_device(arguments)
    if arguments.calibration is not None:
        if not needs_model(arguments):
            raise ConvertError("--calibration serves --encoder calibrated and --recipe auto; add one or drop it")
        if arguments.calibration != SELF:
            read_text(arguments.calibration, "--calibration")


def needs_model(arguments: argparse.Namespace) -> bool:
    """True if the conversion must run the source model."""
    return arguments.recipe == AUTO or arguments.encoder == CALIBRATED


def _check_device(arguments: argparse.Namespace) -> None:
    if not needs_model(arguments) and arguments.encoder != "search":
        raise ConvertError(
            f"--device serves --encoder search, and --encoder {arguments.encoder} runs in numpy; drop it"
        )
    if arguments.device == "mps" and arguments.encoder == CALIBRATED:
        raise ConvertError("--encoder calibrated needs float64, which mps has not; use --device cpu")
    torch = import_torch()
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present[arguments.device]:
        raise ConvertError(f"--device {arguments.device}: torch finds no such device here")


def check_target(arguments: argparse.Namespace, target: Target, dtype: np.dtype | None) -> None:
    """Refuse a size that no bits can give, from headers alone: before a model is loaded or writes a text."""
    if arguments.recipe == AUTO:
        plans = auto_plans(target, arguments.block_size, dtype)
        auto_budget(plans, arguments.target_bpw, arguments.target_size)


def device_encoder(arguments: argparse.Namespace) -> Encoder | None:
    """The search encoder on --device; None where the encoder's name says everything."""
    if arguments.device in (None, "cpu") or arguments.encoder != "search":
        return None
    return DeviceEncoder(arguments.device)


@dataclass
class SourceModel:
    """The source in transformers and the tokens that its layers are judged by."""

    source: Source
    model: Any  # on `device`
    windows: np.ndarray  # int64 [windows, WINDOW]
    device: str

    @property
    def text_digest(self) -> str:
        """Tells one calibration text from another."""
        return hashlib.sha256(self.windows.tobytes()).hexdigest()

    @classmethod
    def load(cls, source: Source, calibration: str | None, device: str | None) -> SourceModel:
        """Load the model in the dtype of its files; `calibration` is the path of a text, or `self` (None too)."""
        torch = import_torch()
        calibration = calibration or SELF
        tokenizer, vocabulary = load_tokenizer(source.directory)
        windows = None
        if calibration != SELF:
            where = f"--calibration {calibration}"
            windows = token_windows(tokenizer, read_text(calibration, "--calibration"), WINDOW, vocabulary, where)
            if len(windows) < 2:
                raise ConvertError(f"{where}: {len(windows) * WINDOW} tokens; at least {2 * WINDOW} are needed")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_transformers(source.directory, "auto").to(device)
        if windows is None:
            windows = self_windows(model, CALIBRATION_WINDOWS)
        return cls(source, model, windows[:CALIBRATION_WINDOWS], device)

    def calibrated(
        self, target: Target, plan: Plan, directory: Path, progress: Progress, *, alone: bool = False
    ) -> tuple[StoredEncoder, Outcome]:
        """Codes for every layer of the plan, kept in `directory` so that a repeated run resumes.

        alone: every matrix is rounded as if it were the only one.
        """
        specs = {digest: spec for digest, (_, spec) in _first_rows(target, {"": plan.quantized}).items()}
        layout = [(planned.tensor.name, str(planned.spec)) for planned in plan.quantized]
        store = CodeStore(directory, _fingerprint([self.source.identity, layout, self.text_digest]))
        outcome = calibrate(
            self.model,
            self.windows,
            lambda digests: specs.get(int(digests[0])),
            store,
            alone=alone,
            device=self.device,
            progress=progress,
        )
        return store.encoder(), outcome

    def recipe(
        self,
        arguments: argparse.Namespace,
        target: Target,
        dtype: np.dtype | None,
        probe: StoredEncoder | None,
        progress: Progress,
    ) -> Recipe:
        """Recipe auto for the target of bits or bytes in `arguments`.

        probe: codes at PROBE_BITS of matrices that were calibrated alone; None measures with those of search.
        """
        windows = self.windows if probe is None else judging_windows(self.windows)

        def sensitivities(groups: Mapping[str, Sequence[PlannedTensor]]) -> dict[str, float]:
            rows = _first_rows(target, groups)

            def group_of(digests: np.ndarray) -> tuple[str, ModuleSpec] | None:
                return rows.get(int(digests[0]))

            return measure(self.model, windows[:PROBE_WINDOWS], group_of, progress, encoder=probe)

        return auto_recipe(
            target,
            sensitivities,
            arguments.block_size,
            dtype,
            bits_per_weight=arguments.target_bpw,
            nbytes=arguments.target_size,
        )


def self_windows(model: Any, count: int) -> np.ndarray:
    """Text that the model writes itself, from random first tokens at temperature 1: int64 [count, WINDOW].

    The idea of data-free calibration is that of LLM-QAT (Liu et al., arXiv 2305.17888).
    """
    import torch

    torch.manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    first = torch.randint(vocabulary, (count, 1), device=model.device)
    with torch.no_grad():
        tokens = model.generate(
            first,
            attention_mask=torch.ones_like(first),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=WINDOW - 1,
            max_new_tokens=WINDOW - 1,
            pad_token_id=0,
        )
    return tokens.cpu().numpy()


def _first_rows(target: Target, groups: Mapping[str, Sequence[PlannedTensor]]) -> dict[int, tuple[str, ModuleSpec]]:
    """The digest of the first row of every quantized matrix -> its group and spec: what joins two sets of names."""
    found: dict[int, tuple[str, ModuleSpec]] = {}
    for name, group in groups.items():
        for planned in group:
            assert planned.spec
            matrices = planned.tensor.shape[0] if len(planned.tensor.shape) == 3 else 1  # experts, or one
            for index in range(matrices):
                first = np.asarray(target.read(planned.tensor, slice(index, index + 1)), np.float32)
                found[int(row_digests(first.reshape(-1, first.shape[-1])[:1])[0])] = (name, planned.spec)
    return found


def _fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
