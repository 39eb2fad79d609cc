"""The C ABI for tests: structs read from the headers in include/, functions called by ctypes."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path
from typing import Any

from minitron_kernels import native

_C_TYPES = {
    "double": ctypes.c_double,
    "float": ctypes.c_float,
    "char": ctypes.c_char,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
}


@functools.cache
def header() -> str:
    """The headers without comments."""
    folder = Path(native.get_include())
    names = ("minitron_kernels.h", "minitron_kernels_fp8.h")
    text = "".join((folder / name).read_text() for name in names)
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


@functools.cache
def structs() -> dict[str, type[ctypes.Structure]]:
    """Every `typedef struct` of the header as a ctypes structure."""
    found: dict[str, type[ctypes.Structure]] = {}
    for name, body in re.findall(r"typedef struct (\w+) \{(.*?)\}", header(), re.DOTALL):
        fields: list[tuple[str, Any]] = []
        for declaration in filter(None, map(str.strip, body.split(";"))):
            type_name, rest = re.fullmatch(
                r"(?:const )?(\w+)\b(.*)", declaration, re.DOTALL
            ).groups()
            for field in rest.split(","):
                pointer, field_name, count = re.fullmatch(
                    r"\s*(\*?)\s*(\w+)(?:\[(\d+)\])?", field
                ).groups()
                c_type = ctypes.c_void_p if pointer else {**_C_TYPES, **found}[type_name]
                fields.append((field_name, c_type * int(count) if count else c_type))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


@functools.cache
def constants() -> dict[str, int]:
    """The enumerators of the headers, and what they define as a number."""
    return {name: int(value) for name, value in re.findall(r"(MK_\w+)(?: =)? (\d+)", header())}


def functions() -> set[str]:
    """Names of the functions that the headers declare."""
    return set(re.findall(r"MK_API [\w* ]+?\b(mk_\w+)\(", header()))


OPS = ("rms_norm", "add_rms_norm", "apply_rope", "rope_append", "silu_and_mul", "embedding",
       "argmax", "sample", "linear", "linear_swiglu", "qkv_rope_append",
       "attention_decode", "attention", "embedding_quant", "quant_prepare_x",
       "linear_quant", "linear_quant_swiglu", "qkv_rope_append_quant",
       "quantize_fp8", "linear_fp8", "linear_fp8_swiglu", "attention_fp8")  # fmt: skip
FP8_OPS = tuple(op for op in OPS if "fp8" in op)  # with kernels for sm_90a only


def load(path: str | Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    lib.mk_last_error.restype = lib.mk_status_name.restype = ctypes.c_char_p
    return lib


@functools.cache
def library() -> ctypes.CDLL:
    return load(native.get_library())


def params_type(op: str) -> type[ctypes.Structure]:
    return structs()[f"mk_{op.removeprefix('add_').removesuffix('_swiglu')}_params"]


DEVICES = {  # mk_device of an A100, L40S, H100 and B200
    "80": (80, 108, 163 << 10),
    "89": (89, 142, 99 << 10),
    "90a": (90, 132, 227 << 10),
    "100a": (100, 148, 227 << 10),
}


def device(arch: str) -> ctypes.Structure:
    return structs()["mk_device"](*DEVICES[arch])


class StatusError(Exception):
    """A status other than MK_OK: its name and mk_last_error()."""

    def __init__(self, status: int, lib: ctypes.CDLL) -> None:
        self.status = lib.mk_status_name(status).decode()
        self.message = lib.mk_last_error().decode()
        super().__init__(f"{self.status}: {self.message}")


def check(status: int, lib: ctypes.CDLL | None = None) -> None:
    """Raises StatusError for a status of `lib` (default: the installed library) but MK_OK."""
    if status:
        raise StatusError(status, lib or library())


def plan(op: str, params: ctypes.Structure, on: str | ctypes.Structure) -> ctypes.Structure:
    """mk_<op>_plan for one of DEVICES, or for an mk_device. Raises StatusError."""
    result = structs()["mk_plan"]()
    where = device(on) if isinstance(on, str) else on
    plan_function = getattr(library(), f"mk_{op}_plan")
    check(plan_function(ctypes.byref(params), ctypes.byref(where), ctypes.byref(result)))
    return result
