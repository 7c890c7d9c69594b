"""Plans, checkpoints and reports as JSON documents and as text; the command line prints nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from convert.checkpoint import Checkpoint, config_number, text_config
from convert.format import codes_name, norms_name
from convert.pipeline import Report
from convert.plan import Plan, PlannedTensor, legal_tensor_parallel
from convert.verify import Verdict

CONTEXT_TOKENS = 4096  # of the key-value cache in the estimate of memory at run time


def plan_document(plan: Plan, config: Mapping) -> dict:
    """What a conversion would write: per-module rows and totals. config: the output's config.json."""
    cache = kv_cache_bytes(config, CONTEXT_TOKENS)
    return {
        "modules": [_planned_row(planned) for planned in plan.tensors if planned.spec],
        "kept": [_planned_row(planned) for planned in plan.tensors if not planned.spec],
        "weights": plan.weights,
        "quantized_weights": plan.quantized_weights,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "bytes": plan.nbytes,
        "source_bytes": sum(planned.tensor.size * planned.tensor.dtype.itemsize for planned in plan.tensors),
        "kv_cache_bytes": cache,
        "run_time_bytes": plan.nbytes + cache,
        "tensor_parallel": legal_tensor_parallel(plan, config),
    }


def checkpoint_document(checkpoint: Checkpoint) -> dict:
    """What an HLWQ directory holds."""
    modules, stored = [], set()
    for module, spec in checkpoint.quantization.modules.items():
        names = (codes_name(module), norms_name(module))
        stored.update(names)
        shape = [*checkpoint.tensors[names[0]].shape[:-1], spec.in_features]
        nbytes = sum(checkpoint.tensors[name].nbytes for name in names)
        modules.append(_row(module, shape, spec.bits, spec.block_size, nbytes))
    kept = [
        _row(name, list(info.shape), None, None, info.nbytes, info.dtype.name)
        for name, info in checkpoint.tensors.items()
        if name not in stored
    ]
    quantized = sum(math.prod(row["shape"]) for row in modules)
    weights = quantized + sum(math.prod(row["shape"]) for row in kept)
    nbytes = sum(row["bytes"] for row in modules + kept)
    return {
        "directory": str(checkpoint.directory),
        "model_type": checkpoint.quantization.base_model_type or checkpoint.config.get("model_type"),
        "target": "mlx" if checkpoint.quantization.base_model_type else "cuda",
        "files": sorted(path.name for path in {info.path for info in checkpoint.tensors.values()}),
        "modules": modules,
        "kept": kept,
        "weights": weights,
        "quantized_weights": quantized,
        "bits_per_weight": round(8 * nbytes / max(weights, 1), 4),
        "bytes": nbytes,
    }


def plan_text(document: Mapping) -> str:
    """`plan_document` for people."""
    degrees = ", ".join(map(str, document["tensor_parallel"])) or "none"
    return "\n".join(
        [
            *_module_table(document),
            "",
            *_totals(document),
            f"memory at run   {human(document['run_time_bytes'])} (weights, and {human(document['kv_cache_bytes'])} "
            f"of key-value cache for {CONTEXT_TOKENS} tokens at 16 bits)",
            f"tensor parallel {degrees}",
        ]
    )


def checkpoint_text(document: Mapping) -> str:
    """`checkpoint_document` for people."""
    return "\n".join(
        [
            f"{document['directory']}: {document['model_type']}, made for {document['target']}, "
            f"{len(document['files'])} file(s)",
            *_module_table(document),
            "",
            *_totals(document),
        ]
    )


def verdict_document(verdict: Verdict) -> dict:
    """What `verify` found."""
    return {
        "directory": str(verdict.directory),
        "ok": not verdict.problems,
        "problems": list(verdict.problems),
        "checked_files": verdict.checked_files,
        "checked_tensors": verdict.checked_tensors,
        "relative_errors": [{"tensor": name, "relative_error": error} for name, error in verdict.errors],
    }


def verdict_text(verdict: Verdict) -> str:
    """`verify` for people: problems, then the relative errors, worst first."""
    lines = [f"{error:10.6f}  {name}" for name, error in verdict.errors]
    if lines:
        lines.insert(0, "relative error |W - W'| / |W|, worst first")
    lines += [f"problem: {problem}" for problem in verdict.problems]
    found = f"{len(verdict.problems)} problem(s)" if verdict.problems else "no problem"
    lines.append(
        f"{verdict.directory}: {found} in {verdict.checked_tensors} tensors; "
        f"{verdict.checked_files} file(s) have the recorded checksum"
    )
    return "\n".join(lines)


def report_document(report: Report) -> dict:
    """What a conversion did."""
    return {
        "output": str(report.output),
        "weights": report.weights,
        "bytes": report.nbytes,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "resumed_shards": report.resumed_shards,
        "seconds": round(report.seconds, 3),
    }


def report_text(report: Report) -> str:
    """A finished conversion in one line."""
    rate = report.weights / max(report.seconds, 1e-9) / 1e6
    resumed = f", {report.resumed_shards} file(s) from an earlier run" if report.resumed_shards else ""
    return (
        f"{report.output}: {report.weights:,} weights in {human(report.nbytes)}, {report.bits_per_weight:.3f} bits a "
        f"weight; {report.seconds:.1f} s, {rate:.0f} million weights a second{resumed}"
    )


def kv_cache_bytes(config: Mapping, tokens: int) -> int:
    """Bytes of a 16-bit key-value cache, from the usual keys of config.json; layers without attention have none."""
    heads = config_number(config, "num_attention_heads", "n_head") or 1
    kv_heads = config_number(config, "num_key_value_heads") or heads
    head_dim = config_number(config, "head_dim") or config_number(config, "hidden_size", "n_embd") // heads
    layers = ["full_attention"] * config_number(config, "num_hidden_layers", "n_layer")
    window = config_number(config, "sliding_window") or tokens
    held = {"full_attention": tokens, "sliding_attention": min(window, tokens)}
    positions = sum(held.get(kind, 0) for kind in text_config(config).get("layer_types") or layers)
    return 2 * 2 * positions * kv_heads * head_dim  # keys and values, two bytes each


def human(nbytes: float) -> str:
    """Bytes in the decimal units that disks are sold by."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "bytes" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def _planned_row(planned: PlannedTensor) -> dict:
    tensor, spec = planned.tensor, planned.spec
    if spec:
        return _row(tensor.module, list(tensor.shape), spec.bits, spec.block_size, planned.nbytes)
    reason = tensor.reason if tensor.kind is None else "kept by the recipe"
    return _row(tensor.name, list(tensor.shape), None, None, planned.nbytes, f"{planned.dtype.name}, {reason}")


def _row(name: str, shape: list[int], bits: int | None, block: int | None, nbytes: int, note: str = "") -> dict:
    row: dict = {"name": name, "shape": shape, "bits": bits, "block_size": block, "bytes": nbytes}
    return row | {"note": note} if note else row


def _module_table(document: Mapping) -> list[str]:
    header = ("module", "shape", "bits", "block", "bytes")
    small = [row for row in document["kept"] if len(row["shape"]) < 2]
    rows = [_cells(row) for row in (*document["modules"], *document["kept"]) if len(row["shape"]) >= 2]
    lines = _align([header, *rows])
    if small:
        lines.append(f"and {len(small)} vectors and scalars kept, {human(sum(row['bytes'] for row in small))}")
    return lines


def _cells(row: Mapping) -> tuple[str, ...]:
    name = f"{row['name']}  ({row['note']})" if "note" in row else row["name"]
    shape = "x".join(map(str, row["shape"]))
    return name, shape, str(row["bits"] or "-"), str(row["block_size"] or "-"), f"{row['bytes']:,}"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    return lines


def _totals(document: Mapping) -> list[str]:
    return [
        f"weights         {document['weights']:,}, of which {document['quantized_weights']:,} quantized",
        f"bits a weight   {document['bits_per_weight']:.3f} over the whole model",
        f"size            {human(document['bytes'])}"
        + (f", from {human(document['source_bytes'])}" if "source_bytes" in document else ""),
    ]
