"""Metal source: its parameters, rules that clang does not enforce, and the edits that make it C++."""

from __future__ import annotations

import re
from typing import NamedTuple


class SourceError(Exception):
    """The text uses something that the Metal language does not have."""


class Parameter(NamedTuple):
    declaration: str
    attribute: str | None  # None or "buffer": the next buffer; else a thread attribute
    index: int | None  # of [[buffer(index)]]


_FORBIDDEN = (
    (r"\bdouble\b", "double is not a Metal type"),
    (r"\bstd::", "std:: does not exist in Metal"),
    (r"\b(new|delete|throw|try|catch|virtual|goto|dynamic_cast|typeid|thread_local|asm|printf)\b", "not in Metal"),
    (r"\bauto\s*\[", "structured bindings are C++17, Metal is C++14"),
    (r"\bif\s+constexpr\b", "if constexpr is C++17, Metal is C++14"),
    (r"\b(memcpy|memset|malloc|assert)\s*\(", "the C library does not exist in Metal"),
    (r"[=(,]\s*\[[&=]?\]\s*\(", "lambdas are not in Metal"),
    (
        r"(?:^|[;{}(,])\s*(?:const\s+)?(?:float|half|bfloat|u?int|u?short|u?char|T|vec<[^<>]*>|[a-z]+[234])\s*\*\s*\w+",
        "a pointer needs an address space",
    ),
)
_THREADGROUP_DECLARATION = re.compile(
    r"^([ \t]*)threadgroup[ \t]+((?:const[ \t]+)?[A-Za-z_][\w:<>, \t]*?)[ \t]+(\w+)((?:[ \t]*\[[^;\[\]]*\])*)[ \t]*;",
    re.MULTILINE,
)
_ATTRIBUTE = re.compile(r"\[\[\s*(\w+)\s*(?:\(([^()]*)\))?\s*\]\]")


def check(source: str) -> None:
    """Raises SourceError for constructs that clang accepts and Metal does not."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"", "", source, flags=re.DOTALL)
    code = re.sub(r"^\s*#.*$", "", code, flags=re.MULTILINE)
    for pattern, reason in _FORBIDDEN:
        found = re.search(pattern, code, flags=re.MULTILINE)
        if found:
            raise SourceError(f"{' '.join(found[0].split())!r}: {reason}")


def to_cpp(source: str) -> str:
    """The edits, line numbers kept: threadgroup arrays become registered statics, attributes disappear."""
    source = _THREADGROUP_DECLARATION.sub(
        lambda m: (
            f"{m[1]}static threadgroup {m[2]} {m[3]}{m[4]}; "
            f'::emu_register_threadgroup((void*)&{m[3]}, sizeof({m[3]}), "{m[3]}");'
        ),
        source,
    )
    return _ATTRIBUTE.sub("", source)


def parameters(source: str, kernel: str) -> list[Parameter]:
    """The parameters of the function `kernel`, in order."""
    start = re.search(rf"void\s+{re.escape(kernel)}\s*\(", source)
    if not start:
        raise SourceError(f"no function {kernel}")
    depth, end = 1, start.end()
    while depth:
        depth += {"(": 1, ")": -1}.get(source[end], 0)
        end += 1
    found = []
    for text in re.split(r",(?![^()<>]*[)>])", source[start.end() : end - 1]):
        attribute = _ATTRIBUTE.search(text)
        declaration = " ".join(_ATTRIBUTE.sub("", text).split())
        index = int(attribute[2]) if attribute and attribute[1] == "buffer" and attribute[2] else None
        found.append(Parameter(declaration, attribute[1] if attribute else None, index))
    return found


def entry_point(source: str, kernel: str, instance: str) -> str:
    """C++ that calls `kernel` (a template instance such as "<half, 4>") from the runtime."""
    arguments, next_buffer = [], 0
    for parameter in parameters(source, kernel):
        if parameter.attribute in (None, "buffer"):
            buffer = next_buffer if parameter.index is None else parameter.index
            next_buffer = buffer + 1
            kind = "ReferenceArgument" if "&" in parameter.declaration else "PointerArgument"
            arguments.append(f"{kind}{{buffers[{buffer}]}}")
        else:
            arguments.append(f"ATTRIBUTE_{parameter.attribute}")
    call = f"{kernel}{instance}({', '.join(arguments)});"
    return f'extern "C" void emu_entry(void** buffers, const ThreadAttributes* t) {{ (void)t; {call} }}\n'
