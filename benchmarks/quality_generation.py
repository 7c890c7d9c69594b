"""Does a model that norms of least squared error shrink loop, or never end, in a long greedy generation?

    python -m benchmarks.quality_data DATA                     # once (benchmarks/quality_data.py)
    python -m benchmarks.quality_generation DATA --device cuda

Every variant continues the first tokens of some windows greedily. A line of JSON each: the share of 4-grams that stood
in the continuation before, the share of continuations that the end token ended, and the KL divergence from the source
over the text that the variant wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks import quality_peers as peers
from benchmarks.quality import Bench, circumstances
from convert.evaluate import window_metrics
from convert.plan import column_power

PROMPT = 32  # tokens


def main(argv: list[str]) -> int:
    """The source, then search without and with unit gain at 2, 3 and 4 bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args(argv)
    bench = Bench(arguments.data, arguments.device, 0)
    prompts = torch.from_numpy(np.load(arguments.data / "wiki.npy")[: arguments.prompts, :PROMPT]).to(bench.device)
    print(json.dumps(circumstances("quality_generation", argv, bench)), flush=True)
    variants: list[tuple[str, peers.Quantizer | None]] = [("source", None)]
    variants += [
        (name, quantizer)
        for bits in (2, 3, 4)
        for name, quantizer in (peers.HLWQ | peers.UNIT_GAIN).items()
        if name in (f"HLWQ Q{bits} search", f"HLWQ Q{bits} search, unit gain")
    ]
    for name, quantizer in variants:
        _apply(bench, quantizer)
        with torch.no_grad():
            texts = generate(bench, prompts, arguments.tokens)
            logits = [bench.logits(text) for text in texts]
            bench.restore()
            kl = [window_metrics(bench.logits(text), own, text)[2] for text, own in zip(texts, logits, strict=True)]
        written = [text[PROMPT:] for text in texts]
        found = {
            "repeated": float(np.mean([repeated(text) for text in written])),
            "ended": float(np.mean([len(text) < arguments.tokens for text in written])),
            "kl": float(np.mean(kl)),
        }
        print(json.dumps({"table": "generation", "name": name, **found}), flush=True)
    return 0


def _apply(bench: Bench, quantizer: peers.Quantizer | None) -> None:
    if quantizer is not None:
        bench.apply(lambda name, weight: quantizer(weight, column_power(name)))


def generate(bench: Bench, prompts: torch.Tensor, tokens: int) -> list[np.ndarray]:
    """Greedy continuations with their prompts; one that the model ended stops before the end token."""
    end = bench.model.generation_config.eos_token_id
    found = bench.model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=tokens, pad_token_id=end
    )
    texts = []
    for row in found.cpu().numpy():
        ends = np.flatnonzero(row[PROMPT:] == end)
        texts.append(row[: PROMPT + ends[0]] if len(ends) else row)
    return texts


def repeated(text: np.ndarray) -> float:
    """Share of a text's 4-grams that occurred in it before."""
    grams = [tuple(text[start : start + 4].tolist()) for start in range(len(text) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
