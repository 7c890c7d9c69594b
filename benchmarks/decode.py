"""Decode speed of whole models with random weights made on the device: the fused step in every mode, and bf16.

    python -m benchmarks.decode                                   # Qwen3-8B's shape: exact, int8 and bf16, sampling on
    python -m benchmarks.decode --shape llama-3.1-8b --modes int8 --context 4096
    python -m benchmarks.decode --generate --compile              # also the loop of generate, and transformers' own
                                                                  # with bf16, a static cache and torch.compile

A token is one replay of a CUDA graph: the step, the draw (temperature .7, top-p .9) and the advance of the position;
nothing is copied to the host. The cache holds `--context` tokens. Codes are random bits, which cost what real ones do.
The ceiling is the time to read every weight, norm and cached token once at the measured read bandwidth.
The last line of the output is the JSON that `--output` writes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
import triton

from benchmarks.cuda_timing import read_bandwidth
from hlwq_cuda.gpu import launch_options
from hlwq_cuda.kernels.sample import Sampler
from hlwq_cuda.layers import HLWQLinear
from hlwq_cuda.step import FusedStep

SHAPES = {  # model_type and the numbers of config.json
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 64, 49152, True),
}
REPEATS = 5


def make_config(shape: str, length: int) -> transformers.PretrainedConfig:
    """The transformers config of a shape, for texts up to `length` tokens."""
    model_type, hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, tied = SHAPES[shape]
    return transformers.AutoConfig.for_model(
        model_type,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=length,
    )


def random_model(config: transformers.PretrainedConfig, bits: int | None, mode: str | None, device: torch.device):
    """A bf16 model with random weights; every linear layer and the head at `bits`, or all bf16 when None."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if bits is not None:
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and not (name == "lm_head" and config.tie_word_embeddings):
                model.set_submodule(name, random_linear(module, bits, mode, device))
    rotary = type(model.model.rotary_emb)(config).to(device)  # its tables are computed, not random
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            values = values.uniform_(0.5, 1.5) if "norm" in name else values.normal_(0.0, 0.02)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    model.model.rotary_emb = rotary
    model.tie_weights()
    return model.eval()


def random_linear(linear: torch.nn.Linear, bits: int, mode: str | None, device: torch.device) -> HLWQLinear:
    """A quantized layer of the same shape in the device layout."""
    from convert.codebook import codebook
    from convert.format import ModuleSpec, default_block_size

    spec = ModuleSpec(bits, default_block_size(linear.in_features), linear.in_features)
    bias_dtype = None if linear.bias is None else torch.bfloat16
    module = HLWQLinear(linear.out_features, spec, codebook(bits), bias_dtype, mode, device="meta").to_empty(
        device=device
    )
    shape = module.weight_codes.shape
    codes = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device)
    module.weight_codes = torch.nn.Parameter(codes, requires_grad=False)
    module.weight_norms.data.uniform_(0.1, 0.3)
    if module.bias is not None:
        module.bias.data.normal_()
    return module.prepare()


class Loop:
    """The step, the draw and the advance of one model in a CUDA graph."""

    def __init__(self, model: transformers.PreTrainedModel, length: int, sampling: bool) -> None:
        self.step = FusedStep(model, length)
        self.step.cache.normal_()
        device = self.step.token.device
        self.sampler = Sampler(model.config.vocab_size, device, launch_options(device))
        self.sampler.settings.copy_(torch.tensor([0.7, 0.9]))
        self._sampling = sampling

    def one_token(self) -> None:
        logits = self.step.run()
        if self._sampling:
            self.sampler.sample(logits, self.step.position, self.step.token)
        else:
            self.sampler.greedy(logits, self.step.token)
        self.step.position += 1

    def capture(self) -> torch.cuda.CUDAGraph:
        return capture(self.one_token)

    def token_seconds(self, context: int, tokens: int) -> list[float]:
        """Seconds a token, of REPEATS runs of `tokens` tokens that begin with `context` tokens in the cache."""
        graph = self.capture()
        seconds = []
        for _ in range(REPEATS + 1):
            self.step.position.fill_(context)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(tokens):
                graph.replay()
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / tokens)
        return seconds[1:]  # the first warms up the clocks


def capture(function) -> torch.cuda.CUDAGraph:
    """`function` run once, for compilation, then captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def bytes_a_token(step: FusedStep, model: transformers.PreTrainedModel, context: int) -> int:
    """Weights (embedding aside) and the cached keys and values that one token must read."""
    embedding = model.get_input_embeddings()
    skipped = set() if model.config.tie_word_embeddings else {id(parameter) for parameter in embedding.parameters()}
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in skipped)
    cached = step.cache[:, :, :, :context]
    return weights + cached.numel() * cached.element_size()


def measure_step(args: argparse.Namespace, mode: str, bandwidth: float, device: torch.device) -> dict:
    """One row of the table."""
    length = args.context + args.tokens + 8
    config = make_config(args.shape, length)
    bits = None if mode == "bf16" else args.bits
    model = random_model(config, bits, None if mode == "bf16" else mode, device)
    torch.cuda.reset_peak_memory_stats()
    loop = Loop(model, length, not args.greedy)
    seconds = loop.token_seconds(args.context, args.tokens)
    median = statistics.median(seconds)
    needed = bytes_a_token(loop.step, model, args.context + args.tokens // 2)
    return {
        "mode": mode,
        "bits": args.bits if bits else 16,
        "tokens_per_second": round(1 / median, 1),
        "microseconds_per_token": round(median * 1e6, 1),
        "spread": round((max(seconds) - min(seconds)) / median, 4),
        "gigabytes_per_token": round(needed / 1e9, 3),
        "share_of_read_bandwidth": round(needed / bandwidth / median, 3),
        "memory_over_weights": round(torch.cuda.memory_allocated() / sum(p.nbytes for p in model.parameters()), 3),
    }


def measure_generate(args: argparse.Namespace, mode: str, device: torch.device) -> dict:
    """End to end: the loop of `generate`, which reads the prompt, and each token on the host."""
    from hlwq_cuda.decode import Decoder, Sampling

    length = args.context + args.tokens + 8
    config = make_config(args.shape, length)
    model = random_model(config, None if mode == "bf16" else args.bits, None if mode == "bf16" else mode, device)
    decoder = Decoder(model, length)
    prompt = torch.randint(0, config.vocab_size, (1, args.context), device=device)
    sampling = Sampling() if args.greedy else Sampling(temperature=0.7, top_p=0.9)
    seconds = []
    for _ in range(REPEATS + 1):
        decoder.prefill(prompt, sampling)
        start = time.perf_counter()
        count = sum(1 for _ in decoder.tokens(args.tokens))
        seconds.append((time.perf_counter() - start) / count)
    median = statistics.median(seconds[1:])  # the first compiles
    return {"mode": f"{mode}, {decoder.step.name} in generate", "tokens_per_second": round(1 / median, 1)}


def measure_compiled(args: argparse.Namespace, device: torch.device) -> dict:
    """transformers' own generate in bf16 with a static cache and torch.compile, the same number of tokens."""
    from transformers import CompileConfig

    length = args.context + args.tokens
    model = random_model(make_config(args.shape, length), None, None, device)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    prompt = torch.randint(0, model.config.vocab_size, (1, args.context), device=device)

    def run(new_tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=not args.greedy,
            temperature=0.7,
            top_p=0.9,
            top_k=0,
            cache_implementation="static",
            compile_config=CompileConfig(fullgraph=True),
        )
        torch.cuda.synchronize()
        return time.perf_counter() - start

    run(args.tokens)  # compiles
    run(args.tokens)
    per_token = (run(args.tokens) - run(8)) / (args.tokens - 8)  # the difference leaves the prefill out
    return {"mode": "transformers bf16 static + compile", "tokens_per_second": round(1 / per_token, 1)}


def command(args: argparse.Namespace) -> str:
    """The command line that measures the same again."""
    flags = f"--shape {args.shape} --modes {' '.join(args.modes)} --bits {args.bits}"
    flags += f" --context {args.context} --tokens {args.tokens}"
    return (
        f"python -m benchmarks.decode {flags}"
        + " --greedy" * args.greedy
        + " --generate" * args.generate
        + " --compile" * args.compile
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
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
