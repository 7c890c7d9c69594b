"""Write a model directory that appears whole or not at all, and that a repeated command can finish.

Everything goes to `OUTPUT.partial`; a shard counts once its checksum stands in the journal there, and the directory
takes its final name when config.json, the last file, is written. A loader accepts no directory without config.json.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert.errors import ConvertError, writing
from convert.plan import Plan, PlannedTensor
from convert.shard import ShardFile
from convert.tensors import INDEX_NAME

CHECKSUMS_NAME = "SHA256SUMS"  # the format of the sha256sum command
JOURNAL_NAME = "journal.json"


@dataclass(frozen=True)
class Shard:
    """One output file and what goes into it."""

    name: str
    tensors: tuple[PlannedTensor, ...]


def cut_shards(plan: Plan, max_bytes: int) -> list[Shard]:
    """Fill files of at most `max_bytes` in the order of the plan; a larger tensor has a file of its own."""
    groups: list[list[PlannedTensor]] = [[]]
    room = max_bytes
    for planned in plan.tensors:
        if planned.nbytes > room and groups[-1]:
            groups.append([])
            room = max_bytes
        groups[-1].append(planned)
        room -= planned.nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    total = len(groups)
    return [Shard(f"model-{i:05}-of-{total:05}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)]


class Staging:
    """The directory `OUTPUT.partial` and its journal of finished shards, for one process at a time.

    A context manager: it locks the directory, and the lock goes with the process however that ends.
    """

    def __init__(self, output: Path, fingerprint: str) -> None:
        """Create the staging directory, or take it over if `fingerprint` says that the same command left it."""
        check_output(output)
        self.output, self.path = output, output.with_name(f"{output.name}.partial")
        self._journal = self.path / JOURNAL_NAME
        self._fingerprint = fingerprint
        self._finished: dict[str, str] = {}  # shard name -> SHA-256
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        if any(self.path.iterdir()):
            self._finished = self._read_journal()
        else:
            self._write_journal()

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._lock)

    def require_space(self, shards: Sequence[Shard]) -> None:
        """Refuse to start when the disk has no room for `shards`, the ones still to write."""
        needed = sum(planned.nbytes for shard in shards for planned in shard.tensors)
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise ConvertError(f"{self.output}: needs {needed:,} bytes, and the disk has {free:,} free; make room")

    def is_finished(self, shard: Shard) -> bool:
        """True if an earlier run finished this shard and its bytes still have the recorded checksum."""
        path = self.path / shard.name
        return shard.name in self._finished and path.exists() and checksum(path) == self._finished[shard.name]

    @contextmanager
    def shard(self, shard: Shard, metadata: Mapping[str, str]) -> Iterator[ShardFile]:
        """Open a shard for writing; it is recorded as finished when the block ends without an error."""
        path = self.path / shard.name
        with writing(path), path.open("w+b") as file:
            yield ShardFile(file, [stored for planned in shard.tensors for stored in planned.stored], metadata)
            file.flush()
            os.fsync(file.fileno())
        self._finished[shard.name] = checksum(path)
        self._write_journal()

    def finish(self, shards: Sequence[Shard], files: Mapping[str, Path | str], config: Mapping) -> None:
        """Write the index, the other files and, last, config.json, and give the directory its final name."""
        weight_map = {
            stored.name: shard.name for shard in shards for planned in shard.tensors for stored in planned.stored
        }
        total = sum(planned.nbytes for shard in shards for planned in shard.tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_text(self.path / INDEX_NAME, json.dumps(index, indent=2) + "\n")
        for name, content in files.items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                with writing(path):
                    shutil.copyfile(content, path)
            else:
                _write_text(path, content)
        sums = "".join(f"{self._finished[shard.name]}  {shard.name}\n" for shard in shards)
        _write_text(self.path / CHECKSUMS_NAME, sums)
        _write_text(self.path / "config.json", json.dumps(config, indent=2) + "\n")
        if self.output.exists():
            self.output.rmdir()  # empty: check_output refused anything else
        self.path.rename(self.output)
        (self.output / JOURNAL_NAME).unlink()

    def _read_journal(self) -> dict[str, str]:
        try:
            journal = json.loads(self._journal.read_text(encoding="utf-8"))
            if journal["fingerprint"] == self._fingerprint:
                return dict(journal["shards"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no journal of ours: the same refusal
        raise ConvertError(
            f"{self.path}: an unfinished conversion of another model or with other options lies there; "
            "repeat that command to finish it, or delete the directory"
        )

    def _write_journal(self) -> None:
        temporary = self._journal.with_suffix(".new")
        _write_text(temporary, json.dumps({"fingerprint": self._fingerprint, "shards": self._finished}))
        os.replace(temporary, self._journal)


def check_output(output: Path) -> None:
    """Refuse an output that exists and is not an empty directory."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConvertError(f"{output}: exists and is not an empty directory; choose another --output or delete it")


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _lock(directory: Path) -> int:
    """Lock a directory for this process; the lock lasts while the returned descriptor is open."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConvertError(f"{directory}: another process is writing there; wait for it to end") from None
    return descriptor


def _write_text(path: Path, text: str) -> None:
    with writing(path), path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
