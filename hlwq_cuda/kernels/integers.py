"""Integer arithmetic of launches. triton.cdiv and next_power_of_2 are made for its compiler: 2 us each on the host."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
