"""Offline half of HLWQ: quantize a checkpoint with numpy and write it in format version 1 (docs/format.md)."""
