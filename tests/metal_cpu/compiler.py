"""Metal source to a shared object that the runtime can dispatch.

Two modes. "fast" is optimized and runs larger shapes. "check" instruments every access: clang's sanitizer passes skip
pointers of another address space, so the front end checks the spaces and writes unoptimized LLVM IR, the spaces are
erased from that text, and the second half of the compilation adds the calls.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tests.metal_cpu import source as metal

HERE = Path(__file__).parent
CLANG = "clang++-19"
LANGUAGE = [
    "-std=c++17",
    "-fPIC",
    "-w",
    "-Xclang",
    "-cl-single-precision-constant",  # 1.5 is a float in Metal
    "-Xclang",
    "-ffloat16-excess-precision=none",  # half and bfloat round after every operation
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    "-ffp-contract=on",
    f"-I{HERE / 'shim'}",
]
OPTIONS = {
    "fast": ["-O2"],
    "check": [
        "-O1",
        "-g1",
        "-fsanitize=thread",
        "-fsanitize=undefined",
        "-fno-sanitize=vptr,function",
        "-Xclang",
        "-fsanitize-minimal-runtime",
    ],
}
PRELUDE = """#include <metal_stdlib>
using namespace metal;
typedef bfloat bfloat16_t;
typedef half float16_t;
"""


class CompileError(Exception):
    """The Metal source does not compile, or breaks a rule of the language."""


def clang_missing() -> str | None:
    """Why kernels cannot be emulated on this machine, or None."""
    if platform.machine() != "x86_64":
        return f"the Metal emulator switches stacks by x86-64 instructions, this machine is {platform.machine()}"
    if not shutil.which(CLANG):
        return f"the Metal emulator needs {CLANG}: apt-get install clang-19 libclang-rt-19-dev"
    return None


def build(text: str, kernel: str, instance: str, mode: str) -> Path:
    """Compile one kernel of the Metal source `text`. Returns the shared object; unchanged sources are not rebuilt."""
    try:
        metal.check(text)
        program = PRELUDE + '# 1 "kernel.metal"\n' + metal.to_cpp(text) + '\n# 1 "entry"\n'
        program += metal.entry_point(text, kernel, instance)
    except metal.SourceError as error:
        raise CompileError(f"kernel.metal: error: {error}") from None
    key = digest(program, mode, own_sources(), *LANGUAGE, *OPTIONS[mode])
    library = cache_folder() / f"{mode}_{key}.so"
    if not library.exists():
        _compile(program, mode, library)
    return library


def _compile(program: str, mode: str, library: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cpp, ir, built = (Path(folder, name) for name in ("kernel.cpp", "kernel.ll", "kernel.so"))
        cpp.write_text(program)
        front = [CLANG, *LANGUAGE, *OPTIONS[mode], *_precompiled(mode), str(cpp)]
        _refuse_space_casts(front)
        if mode == "check":
            run([*front, "-S", "-emit-llvm", "-Xclang", "-disable-llvm-passes", "-o", str(ir)])
            text = re.sub(r" addrspace\([123]\)", "", ir.read_text())
            ir.write_text(re.sub(r"\baddrspacecast (\(?)ptr", r"bitcast \1ptr", text))
            front = [CLANG, "-fPIC", "-w", *OPTIONS[mode], str(ir)]
        link = ["-shared", "-Wl,-Bsymbolic", "--rtlib=compiler-rt", "--unwindlib=libgcc"]
        objects = [str(runtime_object(part)) for part in ("scheduler", "checker")]
        run([*front, "-c", "-o", f"{cpp}.o"])
        run([CLANG, *link, f"{cpp}.o", *objects, "-o", str(built)])
        install(built, library)


def _refuse_space_casts(front: list[str]) -> None:
    """C++ allows a C-style cast between address spaces, Metal does not."""
    dump = ["-fsyntax-only", "-Xclang", "-ast-dump", "-Xclang", "-ast-dump-filter=custom_kernel"]
    tree = run([*front, "-fno-color-diagnostics", *dump])
    for line in tree.splitlines():
        explicit = re.search(r"CStyleCast|CXXReinterpretCast|CXXFunctionalCast", line)
        if explicit and "AddressSpaceConversion" in line and "'void *'" not in line:
            raise CompileError(f"kernel.metal: error: cast between address spaces: {line.strip(' |`-')[:160]}")


def _precompiled(mode: str) -> list[str]:
    """Options that use the shim as a precompiled header: parsing it is half of a small kernel's compilation."""
    options = [*LANGUAGE, *OPTIONS[mode]]
    header_text = str(HERE / "shim" / "metal_stdlib")
    header = cache_folder() / f"{mode}_{digest(own_sources(), *options)}.pch"
    if not header.exists():
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder, "shim.pch")
            run([CLANG, *options, "-Xclang", "-fno-pch-timestamp", "-x", "c++-header", header_text, "-o", str(built)])
            install(built, header)
    return ["-include-pch", str(header)]


def runtime_object(part: str, threadgroup_memory: int = 32768) -> Path:
    """runtime/<part>.cpp compiled, for a limit of threadgroup memory in bytes."""
    target = cache_folder() / f"{part}_{digest(own_sources(), str(threadgroup_memory))}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder, "part.o")
            source = HERE / "runtime" / f"{part}.cpp"
            limit = f"-DTHREADGROUP_MEMORY_LIMIT=size_t({threadgroup_memory})"
            run([CLANG, "-std=c++17", "-fPIC", "-O2", limit, "-c", str(source), "-o", str(built)])
            install(built, target)
    return target


def install(built: Path, target: Path) -> None:
    """Move into the cache in one step: test processes may build the same thing at once."""
    staging = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy(built, staging)
    staging.replace(target)


def run(command: list[str]) -> str:
    """What the compiler printed; CompileError with its message when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout


@cache
def own_sources() -> str:
    """The text of the emulator, on which every built object depends."""
    files = sorted(path for folder in ("shim", "runtime") for path in (HERE / folder).iterdir())
    return "".join(path.read_text() for path in files)


def digest(*parts: str) -> str:
    """A name for what is built from these texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@cache
def cache_folder() -> Path:
    """Where built objects are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base, "hlwq-metal-cpu")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def load(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def line_of(library: Path, offset: str) -> str:
    """The kernel line behind a program counter of a report."""
    out = subprocess.run(["addr2line", "-e", str(library), offset], capture_output=True, text=True).stdout
    line = re.search(r"kernel\.metal:(\d+)", out)
    return f"line {line[1]}" if line else f"pc +{offset}"
