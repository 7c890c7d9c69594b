"""How long work reports its progress: the library calls what the command line shows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Progress = Callable[[int], object]  # called with the amount of work just done
ProgressBar = Callable[[int, str], AbstractContextManager[Progress]]  # total and unit -> a bar for a `with` block


def no_progress(done: int) -> None:
    """Show nothing."""


def no_progress_bar(total: int, unit: str) -> AbstractContextManager[Progress]:
    """A bar that shows nothing."""
    return nullcontext(no_progress)
