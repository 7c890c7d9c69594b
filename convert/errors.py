"""The one error that the converter raises for what its user can fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ConvertError(Exception):
    """A conversion cannot go on. The message is one sentence that names file and tensor and says what to do."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name `path` in errors of writing (a full disk): unlike those of opening, they carry no file name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise ConvertError(
            f"{path}: cannot be written ({error.strerror}); make room and repeat the command, "
            "which goes on from the finished files"
        ) from None
