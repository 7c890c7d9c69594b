"""Decode speed of whole models with random weights made on the device: every mode, and bf16, in the same loop.

    python -m benchmarks.decode                                   # Qwen3-8B's shape: exact, int8 and bf16, sampling on
    python -m benchmarks.decode --shape llama-3.1-8b --modes int8 --context 4096
    python -m benchmarks.decode --shape qwen3.5-9b --profile      # the hybrid; and where the time of a token goes
    python -m benchmarks.decode --generate --compile              # also `generate` end to end, and transformers' own
                                                                  # with bf16, a static cache and torch.compile

A token is one replay of a CUDA graph: the step, the draw (temperature .7, top-p .9) and the advance of the position;
nothing is copied to the host. The step is the fused one where it knows the family, else the model's own module.
The cache holds `--context` tokens. Codes are random bits, which cost what real ones do.
The ceiling is the time to read every weight, norm and cached token once at the measured read bandwidth.
The last line of the output is the JSON that `--output` writes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import triton
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

from benchmarks.cuda_timing import read_bandwidth
from benchmarks.random_models import SHAPES, cache_bytes, make_config, random_model, weight_bytes
from benchmarks.report import report
from hlwq_cuda.decode import Sampling, make_step
from hlwq_cuda.generate import LanguageModel
from hlwq_cuda.gpu import launch_options
from hlwq_cuda.kernels.sample import Sampler

REPEATS = 5


class Loop:
    """The step, the draw and the advance of one model in a CUDA graph."""

    def __init__(self, model: transformers.PreTrainedModel, length: int, sampling: bool) -> None:
        self.step = make_step(model, length)
        device = self.step.token.device
        self._vocabulary = model.config.vocab_size
        self.sampler = Sampler(self._vocabulary, device, launch_options(device))
        self.sampler.settings.copy_(torch.tensor([0.7, 0.9]))
        self._sampling = sampling

    def one_token(self) -> None:
        logits = self.step.run()
        if self._sampling:
            self.sampler.sample(logits, self.step.position, self.step.token)
        else:
            self.sampler.greedy(logits, self.step.token)
        self.step.position += 1

    def read(self, context: int) -> None:
        """Fill the cache with `context` random tokens."""
        self.step.prefill(torch.randint(0, self._vocabulary, (1, context), device=self.step.token.device))

    def token_seconds(self, context: int, tokens: int) -> list[float]:
        """Seconds a token, of REPEATS runs of `tokens` tokens that begin with `context` tokens in the cache."""
        self.read(context)
        graph = capture(self.one_token)
        seconds = []
        for _ in range(REPEATS + 1):
            self.read(context)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(tokens):
                graph.replay()
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / tokens)
        return seconds[1:]  # the first warms up the clocks

    def profile(self, context: int) -> list[tuple[str, int, float]]:
        """Kernels of one token, the most expensive first: name, launches, microseconds of all of them.

        Kernels that overlap by programmatic dependent launch are counted in full, so the sum may exceed a token.
        """
        from torch.profiler import ProfilerActivity, profile

        self.read(context)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.one_token()
            torch.cuda.synchronize()
        events = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)
        return [(event.key[:90], event.count, round(event.device_time_total, 1)) for event in events]


def capture(function) -> torch.cuda.CUDAGraph:
    """`function` run twice, for compilation and workspaces, then captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def bytes_a_token(model: transformers.PreTrainedModel, context: int) -> int:
    """Weights and norms (embedding aside) and the cached keys and values that one token must read."""
    skipped = 0 if model.config.tie_word_embeddings else weight_bytes(model.get_input_embeddings())
    return weight_bytes(model) - skipped + cache_bytes(model.config, context)


def make_model(args: argparse.Namespace, mode: str, length: int, device: torch.device):
    """The random model of one row of the table; resets the peak of the memory."""
    torch.cuda.empty_cache()
    model = random_model(
        make_config(args.shape, length), *((None, None) if mode == "bf16" else (args.bits, mode)), device
    )
    torch.cuda.reset_peak_memory_stats()
    return model


def measure_step(args: argparse.Namespace, mode: str, bandwidth: float, device: torch.device) -> dict:
    """One row of the table."""
    length = args.context + args.tokens + 8
    model = make_model(args, mode, length, device)
    loop = Loop(model, length, not args.greedy)
    seconds = loop.token_seconds(args.context, args.tokens)
    median = statistics.median(seconds)
    needed = bytes_a_token(model, args.context + args.tokens // 2)
    row = {
        "mode": f"{mode}, {loop.step.name}",
        "bits": 16 if mode == "bf16" else args.bits,
        "tokens_per_second": round(1 / median, 1),
        "microseconds_per_token": round(median * 1e6, 1),
        "spread": round((max(seconds) - min(seconds)) / median, 4),
        "gigabytes_per_token": round(needed / 1e9, 3),
        "share_of_read_bandwidth": round(needed / bandwidth / median, 3),
    }
    if args.profile:
        row["kernels"] = loop.profile(args.context)
    return row


def measure_generate(args: argparse.Namespace, mode: str, device: torch.device) -> dict:
    """End to end: hlwq_cuda's `generate`, which reads the prompt and hands each token to the host; and its memory."""
    length = args.context + args.tokens
    model = make_model(args, mode, length, device)
    tokenizer = SimpleNamespace(eos_token_id=None)
    language_model = LanguageModel(model, tokenizer)
    sampling = Sampling() if args.greedy else Sampling(temperature=0.7, top_p=0.9)
    timings = []
    for _ in range(REPEATS + 1):
        prompt = torch.randint(0, model.config.vocab_size, (args.context,)).tolist()  # a new one: nothing is cached
        assert sum(1 for _ in language_model.generate_tokens(prompt, args.tokens, sampling)) == args.tokens
        timings.append(language_model.timing)
    weights, cache = weight_bytes(model), cache_bytes(model.config, length)
    timings = timings[1:]  # the first compiles and captures
    return {
        "mode": f"{mode}, {language_model.description.split(', ')[-1]} in generate",
        "tokens_per_second": round(1 / statistics.median(t.new_seconds / (t.new_tokens - 1) for t in timings), 1),
        "prompt_tokens_per_second": round(
            1 / statistics.median(t.prompt_seconds / t.prompt_tokens for t in timings), 1
        ),
        "weight_gigabytes": round(weights / 1e9, 3),
        "memory_over_weights": round((torch.cuda.memory_allocated() - cache) / weights, 3),
        "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 1e9, 3),
    }


class Stopwatch(BaseStreamer):
    """Gets every token as transformers' generate makes it, as a program that shows text does; notes the times."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is buffered."""


def measure_compiled(args: argparse.Namespace, device: torch.device) -> dict:
    """transformers' own generate in bf16 with a static cache and torch.compile, token by token to the host."""
    length = args.context + args.tokens
    model = make_model(args, "bf16", length, device)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    prompt = torch.randint(0, model.config.vocab_size, (1, args.context), device=device)

    def token_seconds() -> float:
        watch = Stopwatch()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=args.tokens,
            do_sample=not args.greedy,
            temperature=0.7,
            top_p=0.9,
            top_k=0,
            cache_implementation="static",
            compile_config=CompileConfig(fullgraph=True),
            streamer=watch,
        )
        assert len(watch.times) == args.tokens + 1  # the prompt comes first
        return (watch.times[-1] - watch.times[1]) / (args.tokens - 1)

    seconds = [token_seconds() for _ in range(2 + 3)][2:]  # the first compiles, the second captures
    tokens_per_second = round(1 / statistics.median(seconds), 1)
    return {"mode": "bf16, transformers with static cache and torch.compile", "tokens_per_second": tokens_per_second}


def command(args: argparse.Namespace) -> str:
    """The command line that measures the same again."""
    flags = f"--shape {args.shape} --modes {' '.join(args.modes)} --bits {args.bits}"
    flags += f" --context {args.context} --tokens {args.tokens}"
    return (
        f"python -m benchmarks.decode {flags}"
        + " --greedy" * args.greedy
        + " --generate" * args.generate
        + " --compile" * args.compile
        + " --profile" * args.profile
    )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--modes", nargs="+", choices=("exact", "int8", "bf16"), default=["exact", "int8", "bf16"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache (default: 512)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a run (default: 128)")
    parser.add_argument("--greedy", action="store_true", help="take the largest logit instead of sampling")
    parser.add_argument("--generate", action="store_true", help="also time the loop of hlwq_cuda's generate")
    parser.add_argument("--compile", action="store_true", help="also time transformers with torch.compile")
    parser.add_argument("--profile", action="store_true", help="also list the kernels of one token")
    parser.add_argument("--output", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("this benchmark needs an NVIDIA GPU; PyTorch sees none", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    torch.set_grad_enabled(False)
    bandwidth = read_bandwidth()
    result = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {module.__name__: module.__version__ for module in (torch, triton, transformers)},
        "command": command(args),
        "date": time.strftime("%Y-%m-%d"),
        "shape": args.shape,
        "context": args.context,
        "tokens": args.tokens,
        "sampling": "greedy" if args.greedy else "temperature 0.7, top-p 0.9",
        "read_bandwidth_terabytes_per_second": round(bandwidth / 1e12, 3),
        "rows": [],
    }
    for mode in args.modes:
        result["rows"].append(measure_step(args, mode, bandwidth, device))
        print(result["rows"][-1], flush=True)
        torch.cuda.empty_cache()
        if args.generate:
            result["rows"].append(measure_generate(args, mode, device))
            print(result["rows"][-1], flush=True)
            torch.cuda.empty_cache()
    if args.compile:
        result["rows"].append(measure_compiled(args, device))
        print(result["rows"][-1], flush=True)
    for row in result["rows"]:
        for base in result["rows"]:
            if base["mode"].startswith("bf16") and not row["mode"].startswith("bf16"):
                times = row["tokens_per_second"] / base["tokens_per_second"]
                row.setdefault("times", {})[base["mode"]] = round(times, 2)
    report(result, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
