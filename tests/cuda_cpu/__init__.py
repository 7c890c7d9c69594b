"""Runs the CUDA kernels of hlwq_mlx on a CPU, and judges them: a stand-in for mx.fast.cuda_kernel.

The runtime and checker are those of tests/metal_cpu: threads as fibers, warps as 32-lane collectives; races, missing
barriers, out-of-bounds and uninitialized accesses and divergence are errors. cuda_shim.h plays CUDA. The text that MLX
puts around a kernel is restated here (MLX's CPU build has no CUDA back end to write it), so what is executed is every
line of *.cuh; whether NVIDIA's compiler accepts it is left to tests on a GPU.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import mlx.core as mx

from tests.metal_cpu import compiler
from tests.metal_cpu.kernel import dispatch, empty_output, to_mlx, to_numpy

HERE = Path(__file__).parent
TYPES = {
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
    mx.uint32: "uint32_t",
    mx.int32: "int",
}
PLAIN_SHARED, MAX_SHARED = 49152, 232448  # bytes a thread block may have without asking, and with
ASKS_ABOVE = 48000  # bytes of dynamic shared memory above which MLX asks
DYNAMIC = "[/*dynamic*/]"
_SHARED = re.compile(r"^([ \t]*)(__shared__ [^;\[]*?(\w+)(?:\[[^;]*\])+;)", re.MULTILINE)
_FLAGS = ["-O1", "-g1", "-fsanitize=thread", "-fsanitize=undefined", "-fno-sanitize=vptr,function"]
_FLAGS += ["-Xclang", "-fsanitize-minimal-runtime"]


@contextmanager
def emulated(order: int = 0, edit: Callable[[str], str] = str) -> Iterator[None]:
    """Inside, mx.fast.cuda_kernel builds emulated kernels.

    order: of threads, 0 forward, 1 backward, else a seed; `edit` changes the text (to inject a bug).
    """

    def build(*args, **kwargs) -> EmulatedKernel:
        return EmulatedKernel(*args, **kwargs, order=order, edit=edit)

    with mock.patch.object(mx.fast, "cuda_kernel", build, create=True):
        yield


class EmulatedKernel:
    """Same arguments as mx.fast.cuda_kernel and as the kernel that it returns."""

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        order: int = 0,
        edit: Callable[[str], str] = str,
        shared_memory: int = 0,
    ) -> None:
        self.shared = shared_memory
        self.name, self.source, self.header, self.order, self.edit = name, source, header, order, edit
        self.input_names, self.output_names = list(input_names), list(output_names)

    def __call__(self, *, inputs, output_shapes, output_dtypes, grid, threadgroup, template=()) -> list[mx.array]:
        program = self.text(inputs, output_dtypes, template)
        outputs = [empty_output(shape, dtype, None) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        buffers = [(name, to_numpy(value), True) for name, value in zip(self.input_names, inputs, strict=True)]
        buffers += [(name, out, False) for name, out in zip(self.output_names, outputs, strict=True)]
        # MLX launches whole thread blocks
        whole = [-(-threads // size) * size for threads, size in zip(grid, threadgroup, strict=True)]
        limit = MAX_SHARED if self.shared > ASKS_ABOVE else PLAIN_SHARED
        dispatch(_build(self.edit(program), limit), buffers, whole, threadgroup, self.order, check=True)
        return [to_mlx(out, dtype) for out, dtype in zip(outputs, output_dtypes, strict=True)]

    def text(self, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype], template: Sequence) -> str:
        """The translation unit: shim, kernel and an entry point for the runtime."""
        named = list(zip(self.input_names, inputs, strict=True))
        arguments = [f"const {TYPES[value.dtype]}* {name}" for name, value in named]
        arguments += [f"{TYPES[dtype]}* {name}" for name, dtype in zip(self.output_names, output_dtypes, strict=True)]
        constants = [
            f"using {name} = {TYPES[value]};" if isinstance(value, mx.Dtype) else f"constexpr int {name} = {value};"
            for name, value in template
        ]
        # MLX passes the shapes whose names the source contains
        constants += [
            f"const int {name}_shape[] = {{{', '.join(map(str, value.shape))}}};"
            for name, value in named
            if f"{name}_shape" in self.source
        ]
        lines = [f"{value} = ({value.rpartition(' ')[0]})buffers[{i}];" for i, value in enumerate(arguments)]
        body = "\n".join([*lines, *constants, self.source])
        text = '#include "cuda_shim.h"\n' + _expand(self.header, HERE, set())
        text = text.replace(DYNAMIC, f"[{self.shared} / 16]")
        return f'{text}\nextern "C" void emu_entry(void** buffers, const ThreadAttributes*) {{\n{body}\n}}\n'


def _expand(text: str, folder: Path, seen: set[Path]) -> str:
    """`text` with its quoted includes in place, once each, and its shared arrays registered."""

    def include(match: re.Match) -> str:
        path = (folder / match[1]).resolve()
        if path in seen:
            return ""
        seen.add(path)
        return _expand(path.read_text(encoding="utf-8").replace("#pragma once", ""), path.parent, seen)

    text = re.sub(r"extern (__shared__ uint4 \w+)\[\];", rf"\1{DYNAMIC};", text)
    register = r'\1\2 ::emu_register_threadgroup((void*)&\3, sizeof(\3), "\3");'
    return re.sub(r'^#include "([^"]+)"', include, _SHARED.sub(register, text), flags=re.MULTILINE)


def _build(program: str, shared_limit: int) -> Path:
    flags = [*compiler.LANGUAGE, *_FLAGS, f"-I{HERE}", f"-I{compiler.HERE / 'runtime'}"]
    own = (HERE / "cuda_shim.h").read_text(encoding="utf-8")
    library = (
        compiler.cache_folder()
        / f"cuda_{compiler.digest(program, own, compiler.own_sources(), *flags, str(shared_limit))}.so"
    )
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            source, built = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
            source.write_text(program, encoding="utf-8")
            link = ["-shared", "-Wl,-Bsymbolic", "--rtlib=compiler-rt", "--unwindlib=libgcc"]
            objects = [str(compiler.runtime_object(part, shared_limit)) for part in ("scheduler", "checker")]
            compiler.run([compiler.CLANG, *flags, "-c", str(source), "-o", f"{source}.o"])
            compiler.run([compiler.CLANG, *link, f"{source}.o", *objects, "-o", str(built)])
            compiler.install(built, library)
    return library
