"""The one error that the converter raises for what its user can fix."""

from __future__ import annotations


class ConvertError(Exception):
    """A conversion cannot go on. The message is one sentence that names file and tensor and says what to do."""
