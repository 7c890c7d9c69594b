"""Plan -> encode on threads -> write -> report. Prints nothing: progress goes to a callback."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.encoders import DEFAULT_ENCODER, ENCODERS, Encoder
from convert.errors import ConvertError
from convert.format import codes_name, norms_name
from convert.packing import pack
from convert.plan import Plan, PlannedTensor
from convert.progress import Progress, no_progress
from convert.search import GROUP_WEIGHTS
from convert.target import Target
from convert.tensors import is_float
from convert.writer import Staging, cut_shards

# 4 MB of float32 a task, so that tens of tasks in flight stay far below a gigabyte; and what search encodes together:
# its codes do not depend on tasks
TASK_WEIGHTS = GROUP_WEIGHTS


@dataclass(frozen=True)
class Task:
    """A range of one tensor's first axis."""

    planned: PlannedTensor
    rows: slice


@dataclass(frozen=True)
class Report:
    """What a finished conversion did."""

    output: Path
    weights: int
    nbytes: int  # of all tensors
    bits_per_weight: float
    resumed_shards: int
    seconds: float


def convert(
    target: Target,
    plan: Plan,
    output: Path,
    *,
    source_identity: object,
    encoder: str = DEFAULT_ENCODER,
    encode: Encoder | None = None,
    max_shard_bytes: int,
    threads: int,
    progress: Progress = no_progress,
) -> Report:
    """Write `plan` to `output`. `source_identity` (JSON) tells one source from another when a run is resumed.

    encoder: a name of ENCODERS; for any other name, `encode` is what it stands for.
    """
    started = time.monotonic()
    shards = cut_shards(plan, max_shard_bytes)
    config = output_config(target, plan)
    layout = [(shard.name, [str(planned.stored) for planned in shard.tensors]) for shard in shards]
    run = _runner(target, encode or ENCODERS[encoder])
    with Staging(output, _fingerprint([source_identity, encoder, config, layout])) as staging:
        missing = []
        for shard in shards:
            if staging.is_finished(shard):
                progress(sum(planned.tensor.size for planned in shard.tensors))
            else:
                missing.append(shard)
        staging.require_space(missing)
        with ThreadPoolExecutor(threads) as pool:
            for shard in missing:
                tasks = (task for planned in shard.tensors for task in _tasks(planned))
                with staging.shard(shard, {"format": target.format}) as file:
                    for task, arrays in _in_order(pool, run, tasks, ahead=2 * threads):
                        for name, data in arrays.items():
                            file.write(name, task.rows.start, data)
                        progress(_size(task))
        staging.finish(shards, target.files(), config)
    resumed = len(shards) - len(missing)
    return Report(output, plan.weights, plan.nbytes, plan.bits_per_weight, resumed, time.monotonic() - started)


def output_config(target: Target, plan: Plan) -> dict:
    """config.json of the output; where it names the dtype of the weights it names the one that --dtype asked for."""
    config = target.config(plan.quantization())
    if plan.dtype is None:
        return config
    parts = {key: part for key, part in config.items() if isinstance(part, dict) and key.endswith("_config")}
    del parts["quantization_config"]
    return {**_with_dtype(config, plan.dtype), **{key: _with_dtype(part, plan.dtype) for key, part in parts.items()}}


def _with_dtype(config: dict, dtype: np.dtype) -> dict:
    return {key: dtype.name if key in ("dtype", "torch_dtype") else value for key, value in config.items()}


def _tasks(planned: PlannedTensor) -> Iterator[Task]:
    shape = planned.tensor.shape
    length = shape[0] if shape else 1
    step = max(TASK_WEIGHTS * length // max(planned.tensor.size, 1), 1)
    for start in range(0, length, step):
        yield Task(planned, slice(start, min(start + step, length)))


def _size(task: Task) -> int:
    length = task.planned.tensor.shape[0] if task.planned.tensor.shape else 1
    return task.planned.tensor.size * (task.rows.stop - task.rows.start) // length


def _runner(target: Target, encoder: Encoder) -> Callable[[Task], dict[str, np.ndarray]]:
    """The work of one task: read rows, then encode and pack them, or cast them."""

    def run(task: Task) -> dict[str, np.ndarray]:
        planned, tensor = task.planned, task.planned.tensor
        data = target.read(tensor, task.rows)
        if planned.spec is None:
            return {tensor.name: _cast(data, planned)}
        try:
            with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are refused, not warned of
                encoded = encoder(data.astype(np.float32), planned.spec, planned.power)
        except ValueError as error:
            raise ConvertError(f"{tensor.where}: {error}") from None
        return {
            codes_name(tensor.module): pack(encoded.codes, planned.spec.bits),
            norms_name(tensor.module): encoded.norms,
        }

    return run


def _cast(data: np.ndarray, planned: PlannedTensor) -> np.ndarray:
    if not is_float(data.dtype):
        return data
    if not np.isfinite(data).all():
        raise ConvertError(f"{planned.tensor.where}: the tensor holds NaN or infinity")
    with np.errstate(over="ignore"):
        cast = data.astype(planned.dtype, copy=False)
    if not np.isfinite(cast).all():
        raise ConvertError(
            f"{planned.tensor.where}: a value is beyond the range of {planned.dtype}; choose another --dtype"
        )
    return cast


def _in_order(
    pool: ThreadPoolExecutor, run: Callable[[Task], dict[str, np.ndarray]], tasks: Iterable[Task], ahead: int
) -> Iterator[tuple[Task, dict[str, np.ndarray]]]:
    """Results in the order of the tasks, with at most `ahead` of them in memory."""
    pending: deque[tuple[Task, Future[dict[str, np.ndarray]]]] = deque()
    try:
        for task in tasks:
            pending.append((task, pool.submit(run, task)))
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        for _, future in pending:
            future.cancel()


def _fingerprint(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
