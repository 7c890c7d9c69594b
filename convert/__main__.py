"""`python -m convert`: quantize a model, or look at a quantized one with `inspect`, `verify` and `eval`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Both are read when libraries load, so they stand before the imports. The conversion runs its own threads, one BLAS
# thread each (`eval` runs whole models and needs them all); progress bars of downloads are for terminals.
if sys.argv[1:2] != ["eval"]:
    for _variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ.setdefault(_variable, "1")
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np

from convert import describe, eval_command, model_run
from convert.allocate import PROBE_BITS, auto_plans
from convert.checkpoint import Checkpoint
from convert.encoders import DEFAULT_ENCODER, ENCODERS
from convert.errors import ConvertError
from convert.format import BLOCK_SIZES, SUPPORTED_BITS, FormatError
from convert.pipeline import Report, convert, output_config
from convert.plan import Plan, make_plan
from convert.recipe import DEFAULT_BITS, Recipe, make_recipe
from convert.source import Source, open_source, refuse_quantized
from convert.target import STYLES, TARGETS, Target, open_target
from convert.tensors import DTYPES
from convert.verify import verify, work
from convert.writer import check_output

UNQUANTIZED_DTYPES = {"float32": DTYPES["F32"], "float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"]}
PROGRESS_DELAY_S = 2.0  # shorter work shows no bar


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for a refused or failed run, 130 for an interrupted one."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "inspect": (_inspect_parser, _inspect),
        "verify": (_verify_parser, _verify),
        "eval": (eval_command.parser, eval_command.run),
    }
    parser, run = commands.get(arguments[0] if arguments else "", (_convert_parser, _convert))
    if run is not _convert:
        arguments.pop(0)
    try:
        return run(parser().parse_args(arguments))
    except (ConvertError, FormatError) as error:
        return _fail(str(error))
    except BrokenPipeError:  # whatever reads our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it closes
        return 0
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(f"{place}{error.strerror or error}")
    except KeyboardInterrupt:
        print("interrupted; repeat the command to go on from the finished files", file=sys.stderr)
        return 130


def _convert_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Quantize a language model by Hadamard rotation and Lloyd-Max codebooks (docs/format.md).",
        epilog="Other commands: python -m convert inspect DIR; python -m convert verify DIR [--against SOURCE]; "
        "python -m convert eval DIR --against SOURCE --text FILE",
    )
    bits = ", ".join(map(str, SUPPORTED_BITS))
    add = parser.add_argument
    add("--model", required=True, help="a model directory, a Hub id, or a .gguf file")
    add("--output", type=Path, help="directory to create; what exists is never overwritten")
    add("--target", choices=TARGETS, required=True, help="mlx: names of mlx-lm; cuda: names of transformers and vLLM")
    add(
        "--style",
        choices=STYLES,
        default=STYLES[0],
        help="mlx only. package (default): mlx-lm runs it where hlwq-mlx is installed; "
        "shim: brings its own loader file, mlx-lm needs --trust-remote-code",
    )
    add(
        "--recipe",
        default="uniform",
        help="uniform (default), seeds, auto (measured, for a target), or a JSON or YAML file of patterns and bits",
    )
    add("--bits", type=int, default=DEFAULT_BITS, help=f"bits of recipe uniform: {bits} (default {DEFAULT_BITS})")
    add("--embed-bits", type=int, help="bits of the embedding")
    add("--head-bits", type=int, help="bits of the output head; a tied embedding takes the larger of the two")
    add("--block-size", type=int, choices=BLOCK_SIZES, help="weights a norm (default: the largest that divides K)")
    add(
        "--encoder",
        choices=(*ENCODERS, model_run.CALIBRATED),
        default=DEFAULT_ENCODER,
        help=f"how codes are chosen (default {DEFAULT_ENCODER}; calibrated runs the model in torch and transformers)",
    )
    add(
        "--calibration",
        metavar="FILE|self",
        help="text for --encoder calibrated and --recipe auto: a file, or self: the model writes it (default)",
    )
    add(
        "--device",
        choices=model_run.DEVICES,
        help="of torch: where --encoder search runs (default: numpy on the CPU), and where --encoder calibrated and "
        "--recipe auto run the model (default: cuda if present)",
    )
    add("--target-bpw", type=float, metavar="BITS", help="recipe auto: bits a weight over the whole model")
    add("--target-size", type=parse_size, metavar="SIZE", help="recipe auto: size of all tensors, e.g. 5GB")
    add("--dtype", choices=UNQUANTIZED_DTYPES, help="dtype of what stays unquantized (default: the source's)")
    add("--revision", help="revision of a Hub model")
    add("--token", help="access token of the Hub (default: the one that huggingface_hub has stored)")
    add("--max-shard-size", type=parse_size, default="5GB", help="largest output file, e.g. 500MB (default 5GB)")
    add("--plan", action="store_true", help="only print what would be written; reads no weight")
    add("--json", action="store_true", help="print one JSON document instead of text")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m convert inspect", description="Show what an HLWQ directory holds.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m convert verify", description="Check an HLWQ directory.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--against", metavar="SOURCE", help="what it was made from: adds the error of every tensor")
    parser.add_argument("--revision", help="revision of a Hub model")
    parser.add_argument("--token", help="access token of the Hub")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return parser


def _convert(arguments: argparse.Namespace) -> int:
    output = Path(os.path.abspath(arguments.output)) if arguments.output else None
    if output is None and not arguments.plan:
        raise ConvertError("--output is missing: name the directory to create, or ask for --plan")
    if output is not None:
        check_output(output)
    model_run.check_options(arguments)
    recipe = None
    if arguments.recipe != model_run.AUTO:
        recipe = make_recipe(arguments.recipe, arguments.bits, arguments.embed_bits, arguments.head_bits)
    dtype = UNQUANTIZED_DTYPES.get(arguments.dtype)
    planning = output is None or arguments.plan
    probe = None
    if recipe is None and arguments.encoder == model_run.CALIBRATED:
        probe = (output or Path("plan")).with_name(f"{(output or Path('plan')).name}.probe")
    runs_model = recipe is None or (arguments.encoder == model_run.CALIBRATED and not planning)
    staging = None if planning and not runs_model else _staging_beside(output or Path("plan"))
    origin = {"revision": arguments.revision, "token": arguments.token, "progress_bar": _progress}
    with open_source(arguments.model, staging=staging, **origin) as source:
        refuse_quantized(source.directory)
        target = open_target(arguments.target, source.directory, arguments.style)
        model_run.check_target(arguments, target, dtype)
        model = model_run.SourceModel.load(source, arguments.calibration, arguments.device) if runs_model else None
        if recipe is None:
            assert model
            recipe = _auto_recipe(arguments, model, target, dtype, probe)
        plan = make_plan(target.tensors, recipe, arguments.block_size, dtype)
        if arguments.target == "cuda":
            plan = plan.guarded()
        document = describe.plan_document(plan, output_config(target, plan))
        report = None
        if not planning:
            assert output
            if arguments.recipe == model_run.AUTO:
                print(describe.plan_text(document), file=sys.stderr)
            report = _write(arguments, source, target, plan, model, output)
    if probe is not None:
        shutil.rmtree(probe)
    if report is None:
        _print(arguments, document, describe.plan_text(document))
    else:
        _print(arguments, describe.report_document(report), describe.report_text(report))
    return 0


def _auto_recipe(
    arguments: argparse.Namespace,
    model: model_run.SourceModel,
    target: Target,
    dtype: np.dtype | None,
    probe: Path | None,
) -> Recipe:
    """Recipe auto, measured with codes of search, or where there is a directory for them with calibrated ones."""
    encoder = None
    if probe is not None:
        plan = auto_plans(target, arguments.block_size, dtype)[PROBE_BITS]
        with _progress(None, "layers") as progress:
            encoder, _ = model.calibrated(target, plan, probe, progress, alone=True)
    with _progress(None, "groups") as progress:
        return model.recipe(arguments, target, dtype, encoder, progress)


def _write(
    arguments: argparse.Namespace,
    source: Source,
    target: Target,
    plan: Plan,
    model: model_run.SourceModel | None,
    output: Path,
) -> Report:
    """Quantize as planned; `model` is there where the encoder is calibrated."""
    encode, identity = model_run.device_encoder(arguments), source.identity
    store = output.with_name(f"{output.name}.calibration")
    if arguments.encoder == model_run.CALIBRATED:
        assert model
        with _progress(None, "layers") as progress:
            encode, outcome = model.calibrated(target, plan, store, progress)
        identity = [*identity, model.text_digest]
        print(outcome.text(), file=sys.stderr)
    with _progress(plan.weights, "weights") as progress:
        report = convert(
            target,
            plan,
            output,
            encoder=arguments.encoder,
            encode=encode,
            source_identity=identity,
            max_shard_bytes=arguments.max_shard_size,
            threads=_cores(),
            progress=progress,
        )
    if arguments.encoder == model_run.CALIBRATED:
        shutil.rmtree(store)
    return report


def _inspect(arguments: argparse.Namespace) -> int:
    document = describe.checkpoint_document(Checkpoint.open(arguments.directory))
    _print(arguments, document, describe.checkpoint_text(document))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    checkpoint = Checkpoint.open(arguments.directory)
    if arguments.against is None:
        with _progress(work(checkpoint, None), "bytes") as progress:
            verdict = verify(checkpoint, None, _cores(), progress)
    else:
        staging = _staging_beside(arguments.directory)
        origin = {"revision": arguments.revision, "token": arguments.token, "progress_bar": _progress}
        with open_source(arguments.against, staging=staging, **origin) as source:
            target = open_target("mlx" if checkpoint.quantization.base_model_type else "cuda", source.directory)
            with _progress(work(checkpoint, target), "weights") as progress:
                verdict = verify(checkpoint, target, _cores(), progress)
    _print(arguments, describe.verdict_document(verdict), describe.verdict_text(verdict))
    return 1 if verdict.problems else 0


def _staging_beside(directory: Path) -> Path:
    """Where a GGUF is decoded to, on the disk of the output."""
    directory = directory.absolute()
    return directory.with_name(f"{directory.name}.source")


def parse_size(text: str) -> int:
    """`5GB`, `500MB`, `100kB` or a number of bytes."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    number, unit = (text[:-2], text[-2:].upper()) if text[-2:].upper() in units else (text, "")
    try:
        size = int(float(number) * units.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return size


@contextmanager
def _progress(total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    """A bar with rate and time left on a terminal, after two seconds; nothing elsewhere."""
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    with tqdm(total=total, unit=f" {unit}", unit_scale=True, delay=PROGRESS_DELAY_S, disable=quiet) as bar:
        yield bar.update


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _print(arguments: argparse.Namespace, document: dict, text: str) -> None:
    print(json.dumps(document) if arguments.json else text)


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
