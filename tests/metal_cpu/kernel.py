"""A stand-in for mx.fast.metal_kernel: MLX writes the Metal source, the emulator runs it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import numpy as np

from tests.metal_cpu import compiler

REAL_METAL_KERNEL = mx.fast.metal_kernel


class EmulationError(Exception):
    """The kernel ran and broke a rule; the message lists the findings."""


@contextmanager
def emulated(mode: str = "check", order: int = 0, edit: Callable[[str], str] | None = None) -> Iterator[None]:
    """Inside, mx.fast.metal_kernel builds emulated kernels. `edit` changes the Metal source (to inject a bug)."""

    def build(*args, **kwargs) -> EmulatedKernel:
        return EmulatedKernel(*args, **kwargs, mode=mode, order=order, edit=edit)

    with mock.patch.object(mx.fast, "metal_kernel", build):
        yield


class EmulatedKernel:
    """Same arguments as mx.fast.metal_kernel and as the kernel that it returns.

    mode: "check" (instrumented) or "fast"; order: of threads and threadgroups, 0 forward, 1 backward, else a seed.
    After a call `threadgroup_bytes` holds the largest threadgroup memory.
    """

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: dict | None = None,
        mode: str = "check",
        order: int = 0,
        edit: Callable[[str], str] | None = None,
    ):
        options = {} if compile_options is None else {"compile_options": compile_options}
        self.real = REAL_METAL_KERNEL(
            name,
            list(input_names),
            list(output_names),
            source,
            header,
            ensure_row_contiguous,
            atomic_outputs,
            **options,
        )
        self.input_names, self.output_names = list(input_names), list(output_names)
        self.mode, self.order, self.edit = mode, order, edit
        self.threadgroup_bytes = 0

    def __call__(
        self, *, inputs, output_shapes, output_dtypes, grid, threadgroup, template=None, init_value=None, stream=None
    ) -> list[mx.array]:
        inputs = [mx.array(value) for value in inputs]
        name, text, used = self.generate(
            inputs,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            grid=grid,
            threadgroup=threadgroup,
            template=template,
        )
        instance = re.search(rf"{re.escape(name)}\s*(<[^<>;]*>)\s*;", text)
        text = self.edit(text) if self.edit else text
        library = compiler.build(text, name, instance[1] if instance else "", self.mode)
        buffers = [*self._input_buffers(inputs, used)]
        outputs = [
            empty_output(shape, dtype, init_value) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        ]
        buffers += [(name, out, False) for name, out in zip(self.output_names, outputs, strict=True)]
        self.threadgroup_bytes = dispatch(library, buffers, grid, threadgroup, self.order, self.mode == "check")
        return [to_mlx(out, dtype) for out, dtype in zip(outputs, output_dtypes, strict=True)]

    def generate(self, inputs: list[mx.array], **call) -> tuple[str, str, list]:
        """MLX's text for this call: (function name, Metal source, per input which of shape, strides, ndim it takes)."""
        found = []

        def collect(node: dict) -> None:
            if node.get("type") == "primitive" and node.get("name") == "CustomKernel":
                found.append(node["arguments"])

        # traced on blank arrays: export keeps what it is given, and the values play no part in the text
        blank = [mx.zeros(value.shape, value.dtype) for value in inputs]
        mx.export_function(collect, lambda *args: self.real(inputs=list(args), stream=mx.gpu, **call), *blank)
        (arguments,) = found
        name, text, *numbers = arguments
        if numbers[:6] != [*call["grid"], *call["threadgroup"]]:
            raise AssertionError(f"MLX exported grid {numbers[:6]}")
        return name, text, next(value for value in arguments if isinstance(value, list))

    def _input_buffers(self, inputs: list[mx.array], used: list) -> Iterator[tuple[str, np.ndarray, bool]]:
        for name, value, (shape, strides, ndim) in zip(self.input_names, inputs, used, strict=True):
            yield name, to_numpy(value), True
            if value.ndim == 0:
                continue
            if shape:
                yield f"{name}_shape", np.array(value.shape, np.int32), True
            if strides:
                steps = [int(np.prod(value.shape[axis + 1 :])) for axis in range(value.ndim)]
                yield f"{name}_strides", np.array(steps, np.int64), True
            if ndim:
                yield f"{name}_ndim", np.array([value.ndim], np.int32), True


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("read_only", ctypes.c_int),
        ("name", ctypes.c_char_p),
    )


def dispatch(library, buffers, grid: Sequence[int], threadgroup: Sequence[int], order: int, check: bool) -> int:
    """Run a built kernel on (name, array, read-only) buffers. Returns bytes of threadgroup memory.

    Raises EmulationError with the findings.
    """
    table = (_Buffer * len(buffers))(
        *(_Buffer(array.ctypes.data, array.nbytes, read_only, name.encode()) for name, array, read_only in buffers)
    )
    text, used, three = ctypes.create_string_buffer(8192), ctypes.c_size_t(), ctypes.c_uint32 * 3
    run = compiler.load(library).emu_dispatch
    if run(table, len(buffers), three(*grid), three(*threadgroup), order, check, text, len(text), ctypes.byref(used)):
        findings = re.sub(r"pc \+(\w+)", lambda m: compiler.line_of(library, m[1]), text.value.decode())
        raise EmulationError(findings.strip())
    return used.value


def to_numpy(value: mx.array) -> np.ndarray:
    if value.dtype == mx.bfloat16:
        value = value.view(mx.uint16)
    return np.array(value).reshape(-1)


def empty_output(shape: Sequence[int], dtype: mx.Dtype, init_value: float | None) -> np.ndarray:
    """An output full of 0xff, so that what no thread wrote shows as NaN."""
    out = np.frombuffer(bytearray(b"\xff" * (int(np.prod(shape)) * dtype.size)), np.uint8)
    out = out.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[dtype.size]).reshape(shape)
    if init_value is not None:
        filled = mx.full(shape, init_value, dtype)
        out[...] = np.array(filled.view({2: mx.uint16, 4: mx.uint32}[dtype.size]))
    return out


def to_mlx(out: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(out).view(dtype)
