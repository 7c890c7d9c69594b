"""The tables of docs/quality.md: KL divergence of fake-quantized linear layers on two texts.

    python -m benchmarks.quality_data DATA                     # once: model, tokens (needs the packages it names)
    python -m benchmarks.quality DATA --table peers --device cuda

DATA holds model/ (a transformers directory), wiki.npy, news.npy and calibration.npy: windows of tokens, int64 [n, 512].
Every linear layer of the decoder is quantized and decoded in float32; embedding and norms stay. Each line of the
output is one variant as JSON; `--render FILES` makes the Markdown tables from such lines.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from benchmarks import quality_peers as peers
from benchmarks.quality_ggml import Ggml, ggml_library, iq4_xs, q4_k_m
from benchmarks.quality_recipes import recipes
from convert import feedback
from convert.calibrate import Outcome, calibrate, round_head, split_windows
from convert.code_store import CodeStore, StoredEncoder, row_digests
from convert.evaluate import Comparison, compare, load_transformers
from convert.format import ModuleSpec, default_block_size
from convert.layer_walk import LayerRun, decoder_layers, enter, record_calls
from convert.plan import TIED_POWER, column_power

CALIBRATION_WINDOWS = (
    128  # 65 536 tokens; 64 windows gave a KL divergence 16 % larger on the same domain, 18 % on another
)
BATCH = 8


def main(argv: list[str]) -> int:
    """One table, or `--render`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--table", choices=TABLES, nargs="+", default=[*TABLES])
    parser.add_argument("--only", help="only variants whose name contains this")
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, of each text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--render", type=Path, nargs="+", metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.render:
        print(render(arguments.render))
        return 0
    if "ggml" in arguments.table:
        ggml_library()  # where there is none it ends the program: now, not after the tables before
    bench = Bench(arguments.data, arguments.device, arguments.windows)
    print(json.dumps(circumstances("quality", argv, bench)), flush=True)
    for table in arguments.table:
        for name, model_bits in TABLES[table](bench, arguments.only or ""):
            print(json.dumps({"table": table, "name": name, **bench.evaluate(model_bits)}), flush=True)
    return 0


def circumstances(module: str, argv: list[str], bench: Bench) -> dict:
    """What a result file must say of its making."""
    import transformers

    return {
        "command": f"python -m benchmarks.{module} " + " ".join(argv),
        "device": torch.cuda.get_device_name() if bench.device == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokens": sum(windows.shape[0] * (windows.shape[1] - 1) for windows in bench.texts.values()),
        "calibration_windows": len(bench.calibration),
        "date": time.strftime("%Y-%m-%d"),
    }


class Bench:
    """The model, its untouched weights, and the texts."""

    def __init__(self, data: Path, device: str, windows: int) -> None:
        self.device = device
        self.model = load_transformers(data / "model", torch.float32).to(device)
        self.texts = {name: np.load(data / f"{name}.npy")[:windows] for name in ("wiki", "news")}
        self.calibration = np.load(data / "calibration.npy")[:CALIBRATION_WINDOWS]
        self.linears = {
            name.removesuffix(".weight"): parameter.data
            for name, parameter in self.model.named_parameters()
            if parameter.ndim == 2 and ".layers." in name
        }
        with torch.no_grad():  # logits of the source, computed once: 100 MB a window
            self.source = {
                window.tobytes(): self.logits(window) for windows in self.texts.values() for window in windows
            }
        self.originals = {name: weight.clone() for name, weight in self.linears.items()}
        self.first_rows = {int(self.digest(weight)): name for name, weight in self.linears.items()}

    @staticmethod
    def digest(weight: torch.Tensor) -> np.uint64:
        return row_digests(weight[:1].float().cpu().numpy())[0]

    def restore(self) -> None:
        """Put every original weight back."""
        for name, weight in self.linears.items():
            weight.copy_(self.originals[name])

    def apply(self, quantizer: Callable[[str, torch.Tensor], peers.Decoded]) -> float:
        """Quantize and decode every linear layer; returns bits a weight."""
        bits = 0.0
        for name, weight in self.linears.items():
            decoded, width = quantizer(name, self.originals[name])
            weight.copy_(decoded)
            bits += width * weight.numel()
        return bits / self.weights

    @property
    def weights(self) -> int:
        return sum(weight.numel() for weight in self.linears.values())

    def specs(self, bits: Mapping[str, int]) -> dict[str, ModuleSpec]:
        """The spec of every linear layer at given bits."""
        return {
            name: ModuleSpec(bits[name], default_block_size(weight.shape[1]), weight.shape[1])
            for name, weight in self.linears.items()
        }

    def calibrated(self, bits: Mapping[str, int]) -> float:
        """Calibrate every linear layer; returns bits a weight."""
        specs = self.specs(bits)
        with self.calibrated_codes(specs) as encoder:

            def decode(name: str, weight: torch.Tensor) -> peers.Decoded:
                spec = specs[name]
                encoded = encoder(weight.cpu().numpy(), spec)
                return feedback.rounding(encoded, spec, weight.device).weight(), spec.bits_per_weight

            return self.apply(decode)

    @contextmanager
    def calibrated_codes(self, specs: Mapping[str, ModuleSpec], *, alone: bool = False) -> Iterator[StoredEncoder]:
        """Codes of every linear layer, in a directory that lasts as long as the context."""
        self.restore()
        by_row = {digest: specs[name] for digest, name in self.first_rows.items()}
        with tempfile.TemporaryDirectory() as directory:
            store = CodeStore(Path(directory) / "store", "")
            started = time.monotonic()
            outcome = calibrate(
                self.model, self.calibration, lambda d: by_row.get(int(d[0])), store, alone=alone, device=self.device
            )
            print(f"{outcome.text()}\ncalibrated in {time.monotonic() - started:.1f} s", file=sys.stderr)
            yield store.encoder()

    def evaluate(self, bits_per_weight: float) -> dict:
        """Figures of the model as it stands, on every text."""
        started = time.monotonic()
        squared = sum(float((w - self.originals[n]).square().sum()) for n, w in self.linears.items())
        total = sum(float(weight.square().sum()) for weight in self.originals.values())
        found: dict = {"bits": bits_per_weight, "weight_error": (squared / total) ** 0.5}
        with torch.no_grad():
            for text, windows in self.texts.items():
                result = compare(lambda window: self.source[window.tobytes()], self.logits, windows)
                found[text] = _figures(result)
        found["seconds"] = time.monotonic() - started
        return found

    def logits(self, window: np.ndarray) -> torch.Tensor:
        """Of the model as it stands, for a window of tokens."""
        tokens = torch.from_numpy(window)[None].to(self.device)
        return self.model(input_ids=tokens, use_cache=False).logits[0]


def _figures(found: Comparison) -> dict:
    return {
        "ppl": found.perplexity,
        "ppl_source": found.source_perplexity,
        "dnll": found.nll_difference,
        "dnll_se": found.nll_difference_error,
        "kl": found.kl,
        "kl_se": found.kl_error,
        "top1": found.top1,
        "kl_by_window": found.kl_by_window,
    }


Variants = Iterator[tuple[str, float]]  # name, bits a weight; the bench's model holds the variant


def _simple(variants: Mapping[str, peers.Quantizer]) -> Callable[[Bench, str], Variants]:
    def run(bench: Bench, only: str) -> Variants:
        for name, quantizer in variants.items():
            if only in name:
                yield name, bench.apply(lambda n, weight, q=quantizer: q(weight, column_power(n)))

    return run


def _calibrated(bench: Bench, only: str) -> Variants:
    for bits in (4, 3, 2, 5, 6):
        name = f"HLWQ Q{bits} calibrated"
        if only in name:
            yield name, bench.calibrated(dict.fromkeys(bench.linears, bits))


def _embedding(bench: Bench, only: str) -> Variants:
    """The embedding alone, which SmolLM2 ties to the output head."""
    bench.restore()
    weight = bench.model.get_input_embeddings().weight.data
    original = weight.clone()
    spec = ModuleSpec(4, default_block_size(weight.shape[1]), weight.shape[1])
    for name, power in {"plain": None, "search, columns alike": 0.0, "search": TIED_POWER}.items():
        if only in f"embedding Q4 {name}":
            weight.copy_(peers.hlwq(original, 4, power)[0])
            yield f"embedding Q4 {name}", spec.bits_per_weight
    if only in "embedding Q4 calibrated":
        weight.copy_(original)
        with tempfile.TemporaryDirectory() as directory, torch.no_grad():
            store = CodeStore(Path(directory) / "store", "")
            batches, held_out = split_windows(torch.from_numpy(bench.calibration).to(bench.device))
            round_head(bench.model, batches, held_out, lambda _: spec, store, Outcome())
            encoded = store.encoder()(original.cpu().numpy(), spec)
        weight.copy_(feedback.rounding(encoded, spec, weight.device).weight())
        yield "embedding Q4 calibrated", spec.bits_per_weight
    weight.copy_(original)


def _gptq(bench: Bench, only: str) -> Variants:
    for group in (64, 128):
        name = f"GPTQ act-order, affine 4-bit g{group}"
        if only in name:
            yield name, _gptq_model(bench, group)


def _gptq_model(bench: Bench, group: int) -> float:
    """GPTQ layer by layer on the quantized prefix, as its authors do; Hessians as our calibration gathers them."""
    bench.restore()
    decoded: dict[str, torch.Tensor] = {}
    bits = 0.0
    with torch.no_grad():
        layers = decoder_layers(bench.model)
        batches = list(torch.from_numpy(bench.calibration).to(bench.device).split(BATCH))
        calls = record_calls(bench.model, layers, batches[0])
        hidden = enter(bench.model, layers, batches)
        for layer, call in zip(layers, calls, strict=True):
            run = LayerRun(layer, call, bench.device)
            for stage in run.stages(hidden[0]):
                for names in stage:
                    inputs = [run.inputs(state, names[:1])[names[0]] for state in hidden]
                    hessian = sum(each.T @ each for each in inputs) / sum(map(len, inputs))
                    for name in names:
                        weight = run.weights()[name]
                        key = bench.first_rows[int(bench.digest(weight))]
                        decoded[key], width = peers.gptq_affine(weight, hessian, 4, group)
                        weight.copy_(decoded[key])
                        bits += width * weight.numel()
            hidden = [run.run(state) for state in hidden]
    bench.apply(lambda name, weight: (decoded[name], 0.0))
    return bits / bench.weights


def _ggml(bench: Bench, only: str) -> Variants:
    """llama.cpp's types; the importance matrix is the mean square of every input on the calibration text."""
    bench.restore()
    squares: dict[str, torch.Tensor] = {}

    def see(name: str, inputs: torch.Tensor) -> None:
        squares[name] = squares.get(name, 0) + inputs.square().flatten(0, -2).mean(0)

    hooks = [
        bench.model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name in bench.linears
    ]
    with torch.no_grad():
        for batch in torch.from_numpy(bench.calibration).to(bench.device).split(BATCH):
            bench.model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    weights = {name: weight.cpu().numpy() for name, weight in bench.originals.items()}
    importance = {name: square.cpu().numpy() for name, square in squares.items()}
    ggml = Ggml(ggml_library())
    for kind, kind_of in {"Q4_K_M": q4_k_m, "IQ4_XS": iq4_xs}.items():
        for pad in (False, True):
            name = f"llama.cpp {kind}, importance matrix" + (", rows padded to 768" if pad else "")
            if only in name:
                found = ggml.model(weights, importance, kind_of, pad)
                decoded = {each: (torch.from_numpy(w).to(bench.device), width) for each, (w, width) in found.items()}
                yield name, bench.apply(lambda n, _, d=decoded: d[n])


TABLES: dict[str, Callable[[Bench, str], Variants]] = {
    "ablation": _simple(peers.ABLATION),
    "encoders": _simple(peers.HLWQ),
    "calibrated": _calibrated,
    "embedding": _embedding,
    "peers": _simple(peers.PEERS),
    "gptq": _gptq,
    "ggml": _ggml,
    "detour": _simple(peers.DETOUR),
    "recipes": recipes,
    "gain": _simple(peers.UNIT_GAIN),
}


HEADER = "| variant | bits/weight | weight error | KL wiki | KL news | PPL wiki | PPL news | top-1 wiki |"


def render(paths: list[Path]) -> str:
    """Markdown tables, KL and differences in 1e-3 nats."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.startswith('{"table"')]
    lines: list[str] = []
    for table in dict.fromkeys(row["table"] for row in rows):
        lines += ["", f"### {table}", "", HEADER, "|---" * 8 + "|"]
        for row in rows:
            if row["table"] != table:
                continue
            wiki, news = row["wiki"], row["news"]
            lines.append(
                f"| {row['name']} | {row['bits']:.2f} | {row['weight_error']:.4f} "
                f"| {_pm(wiki, 'kl')} | {_pm(news, 'kl')} | {wiki['ppl']:.2f} | {news['ppl']:.2f} "
                f"| {100 * wiki['top1']:.1f} % |"
            )
    return "\n".join(lines)


def _pm(figures: dict, key: str) -> str:
    return f"{1e3 * figures[key]:.1f}±{1e3 * figures[key + '_se']:.1f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
