"""How long a prompt takes before its first new token, with random weights made on the device.

    python -m benchmarks.prompt                                # Qwen3-8B's shape, prompts of 64, 512 and 2048 tokens
    python -m benchmarks.prompt --shape llama-3.1-8b --lengths 512

For every mode and for bf16: milliseconds until the logits of the last token are there, the part of it in which the host
still prepares launches, and what transformers' module takes for the same prompt (a cache included in all). Medians.
The last line of the output is the JSON that `--output` writes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
import triton

from benchmarks.random_models import SHAPES, make_config, random_model
from benchmarks.report import report
from hlwq_cuda.decode import cache_argument, make_step

REPEATS = 9


def measure(run) -> dict:
    """Milliseconds of `run()`, and of the host's part of it, medians after two warm-ups."""
    whole, host = [], []
    for _ in range(REPEATS + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - start)
    return {
        "milliseconds": round(statistics.median(whole[2:]) * 1e3, 2),
        "host_milliseconds": round(statistics.median(host[2:]) * 1e3, 2),
    }


def measure_mode(shape: str, mode: str, bits: int, lengths: list[int]) -> list[dict]:
    """One row of the table for each length."""
    longest, device = max(lengths) + 8, torch.device("cuda")
    config = make_config(shape, longest)
    model = random_model(config, *((None, None) if mode == "bf16" else (bits, mode)), device)
    step = make_step(model, longest)
    rows = []
    for length in lengths:
        ids = torch.randint(0, config.vocab_size, (1, length), device=device)

        def by_module(ids: torch.Tensor = ids) -> None:
            cache = transformers.DynamicCache(config=config)
            model(ids, **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1)

        row = {"mode": mode, "tokens": length, **measure(lambda ids=ids: step.prefill(ids))}
        row["tokens_per_second"] = round(length / row["milliseconds"] * 1e3)
        row["transformers_module"] = measure(by_module)
        print(row, flush=True)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--modes", nargs="+", choices=("exact", "int8", "bf16"), default=["exact", "int8", "bf16"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 512, 2048], help="tokens of the prompts")
    parser.add_argument("--output", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("this benchmark needs an NVIDIA GPU; PyTorch sees none", file=sys.stderr)
        return 1
    torch.set_grad_enabled(False)
    flags = f"--shape {args.shape} --modes {' '.join(args.modes)} --bits {args.bits}"
    result = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {module.__name__: module.__version__ for module in (torch, triton, transformers)},
        "command": f"python -m benchmarks.prompt {flags} --lengths {' '.join(map(str, args.lengths))}",
        "date": time.strftime("%Y-%m-%d"),
        "rows": [],
    }
    for mode in args.modes:
        result["rows"] += measure_mode(args.shape, mode, args.bits, args.lengths)
        torch.cuda.empty_cache()
    report(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
