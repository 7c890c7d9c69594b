"""`python -m convert eval`: the figures of evaluate.py for one or several HLWQ directories."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.errors import ConvertError
from convert.evaluate import WINDOW, Comparison, bits_per_weight, compare, pick_loader
from convert.source import open_source
from convert.text import load_tokenizer, read_text, token_windows


@dataclass(frozen=True)
class Result:
    """One evaluated directory."""

    directory: Path
    bits_per_weight: float
    comparison: Comparison

    def to_dict(self) -> dict:
        """The keys that --json promises; a standard error of a single window is null."""
        found = self.comparison
        return {
            "directory": str(self.directory),
            "ppl": found.perplexity,
            "ppl_source": found.source_perplexity,
            "nll_difference": found.nll_difference,
            "nll_difference_se": _finite(found.nll_difference_error),
            "kl": found.kl,
            "kl_se": _finite(found.kl_error),
            "top1": found.top1,
            "bits_per_weight": self.bits_per_weight,
            "tokens": found.tokens,
        }


def parser() -> argparse.ArgumentParser:
    """The options of `eval`."""
    parser = argparse.ArgumentParser(
        prog="python -m convert eval", description="Compare HLWQ directories with their source on a text."
    )
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="HLWQ directories")
    parser.add_argument("--against", required=True, metavar="SOURCE", help="the unquantized model: directory or .gguf")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="plain text in UTF-8 to evaluate on")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="evaluate the first N tokens only")
    parser.add_argument("--device", help="of torch: cpu, cuda, mps (default: the best present)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of torch")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw KL divergence against bits a weight")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON for each directory")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print, plot. Raises ConvertError or FormatError with a sentence for the user."""
    from tqdm import tqdm

    if arguments.max_tokens is not None and arguments.max_tokens < 2:
        raise ConvertError("--max-tokens must be at least 2: a token is predicted from the one before")
    if arguments.plot is not None:
        _pyplot()
    text = read_text(arguments.text, "--text")
    load = pick_loader(arguments.directories)
    directories: list[Path] = arguments.directories
    staging = directories[0].absolute().with_name(f"{directories[0].name}.source")  # where a GGUF is decoded to
    with open_source(arguments.against, staging=staging) as source:
        windows = _windows(source.directory, text, arguments.max_tokens, f"--text {arguments.text}")
        source_logits = load(source.directory, arguments.device, arguments.dtype)
        results = []
        for directory in directories:
            logits = load(directory, arguments.device, arguments.dtype)
            total = windows.shape[0] * (windows.shape[1] - 1)
            with tqdm(total=total, unit="token", desc=directory.name, disable=not sys.stderr.isatty()) as bar:
                found = compare(source_logits, logits, windows, bar.update)
            results.append(Result(directory, bits_per_weight(directory), found))
    print(format_table(results))
    if arguments.plot is not None:
        plot(results, arguments.plot)
    if arguments.json:
        for result in results:
            print(json.dumps(result.to_dict()))
    return 0


def _windows(directory: Path, text: str, max_tokens: int | None, where: str) -> np.ndarray:
    tokenizer, vocabulary = load_tokenizer(directory)
    length = min(WINDOW, max_tokens or WINDOW)
    windows = token_windows(tokenizer, text, length, vocabulary, where)
    return windows[: max(max_tokens // length, 1)] if max_tokens else windows


def format_table(results: Sequence[Result]) -> str:
    """A Markdown table: KL and differences in 1e-3 nats with standard errors."""
    first = results[0].comparison
    lines = [
        f"source perplexity {first.source_perplexity:.3f}, {first.tokens} tokens; KL divergence and difference of the "
        "negative log likelihood in 1e-3 nats",
        "",
        "| model | bits/weight | perplexity | dNLL | KL | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        found = result.comparison
        lines.append(
            f"| {result.directory.name} | {result.bits_per_weight:.3f} | {found.perplexity:.3f} "
            f"| {1e3 * found.nll_difference:.1f}±{1e3 * found.nll_difference_error:.1f} "
            f"| {1e3 * found.kl:.1f}±{1e3 * found.kl_error:.1f} | {100 * found.top1:.1f} % |"
        )
    return "\n".join(lines)


def plot(results: Sequence[Result], path: Path) -> None:
    """KL divergence (log scale) against bits a weight, one labelled point with its standard error a directory."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for result in results:
        found = result.comparison
        error = 0.0 if math.isnan(found.kl_error) else found.kl_error
        axes.errorbar(result.bits_per_weight, found.kl, yerr=error, fmt="o", capsize=3)
        axes.annotate(
            result.directory.name, (result.bits_per_weight, found.kl), xytext=(6, 4), textcoords="offset points"
        )
    axes.set(xlabel="bits a weight", ylabel="KL divergence to the source, nats", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _pyplot():
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]

        matplotlib.use("Agg")
        from matplotlib import pyplot  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConvertError("--plot needs matplotlib: pip install matplotlib") from None
    return pyplot


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
