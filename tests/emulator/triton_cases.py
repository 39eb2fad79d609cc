"""Kernels that Triton compiles, as third-party code to validate the emulator on.

Triton writes PTX for any NVIDIA target without a GPU, and nobody of this project writes that PTX:
layouts, swizzles, pipelines and reductions are Triton's own. A `Case` couples such a kernel with
inputs, a float64 reference and the same operation done by PyTorch; `compile_case` gives the PTX and
everything a launch needs.

Only `.asm["ptx"]` is used, so Triton needs neither a driver nor a C compiler. Triton's own cache
(`TRITON_CACHE_DIR`) keeps the results and is safe for parallel test processes.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from . import gluon_kernels, library
from . import triton_kernels as kernels
from . import triton_problems as problems
from .triton_problems import DOT_CAPABILITIES, Descriptor, MatmulType, Problem

ALL_CAPABILITIES = (80, 89, 90, 100)

_TRITON_DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}

# --------------------------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True, eq=False)
class Case:
    """One kernel at one shape, tile and pipeline depth.

    mma: regular expression of the tensor-core instruction that the PTX must hold, or None; wgmma:
    the same for capability 90.
    """

    id: str
    kernel: Any
    constexprs: dict[str, Any]
    build: Callable[[torch.Generator], Problem]
    capabilities: Sequence[int] = ALL_CAPABILITIES
    num_warps: int = 4
    num_stages: int = 3
    mma: str | None = None
    wgmma: str | None = None
    slow: bool = False

    @property
    def is_gluon(self) -> bool:
        return self.kernel is gluon_kernels.matmul_specialised

    def tensor_core_instruction(self, capability: int) -> str | None:
        return self.wgmma if capability == 90 else self.mma

    @property
    def table_row(self) -> str:
        """The kernel, products with their type: "matmul bf16"."""
        is_product = "matmul" in self.id or "flash" in self.id
        return " ".join(self.id.split("-")[:2]) if is_product else self.kernel.__name__

    def problem(self, seed: int) -> Problem:
        return self.build(torch.Generator().manual_seed(seed))


def _case(
    kernel: Any,
    build: Callable[..., Problem],
    constexprs: dict[str, Any],
    num_warps: int = 4,
    capabilities: Sequence[int] = ALL_CAPABILITIES,
    **shape: Any,
) -> Case:
    """A case without tensor cores; `shape`: the keyword arguments of `build`, which name it too."""
    words = [_TRITON_DTYPES.get(value, str(value)) for value in shape.values()]
    name = "-".join([kernel.__name__, *words, f"w{num_warps}"])
    return Case(name, kernel, constexprs, partial(build, **shape), capabilities, num_warps)


_MATMUL_TYPES = {
    "bf16": MatmulType(
        torch.bfloat16, torch.bfloat16, r"mma\.\S*m16n8k16\S*bf16", wgmma="f32.bf16"
    ),
    "f16": MatmulType(
        torch.float16, torch.float16, r"mma\.\S*m16n8k16\S*f32\.f16", wgmma="f32.f16"
    ),
    "f16_acc": MatmulType(
        torch.float16,
        torch.float16,
        r"mma\.\S*m16n8k16\S*col\.f16\.f16",
        tl.float16,
        wgmma="f16.f16",
    ),
    "tf32": MatmulType(torch.float32, torch.float32, r"mma\.\S*m16n8k8\S*tf32", wgmma="f32.tf32"),
    "s8": MatmulType(torch.int8, torch.int32, r"mma\.\S*m16n8k32\S*s8", tl.int32, wgmma="s32.s8"),
    "e4m3": MatmulType(
        torch.float8_e4m3fn,
        torch.float32,
        r"mma\.\S*m16n8k32\S*e4m3",
        wgmma="f32.e4m3",
        capabilities=(89, 90),
    ),
    "e5m2": MatmulType(
        torch.float8_e5m2,
        torch.float32,
        r"mma\.\S*m16n8k32\S*e5m2",
        wgmma="f32.e5m2",
        capabilities=(89, 90),
    ),
    "f64": MatmulType(torch.float64, torch.float64, r"mma\.\S*f64", tl.float64, capabilities=(80,)),
    "f32": MatmulType(
        torch.float32, torch.float32, None, precision="ieee", capabilities=ALL_CAPABILITIES
    ),
}


def _matmul_case(
    name: str,
    block: tuple[int, int, int],
    mnk: tuple[int, int, int],
    num_warps: int,
    num_stages: int,
) -> Case:
    kind = _MATMUL_TYPES[name]
    tile = "x".join(map(str, block))
    constexprs = {"ACC": kind.acc, "PRECISION": kind.precision}
    return Case(
        f"matmul-{name}-{tile}-w{num_warps}-s{num_stages}",
        kernels.matmul,
        dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True)) | constexprs,
        partial(problems.matmul, mnk=mnk, block=block, kind=kind),
        kind.capabilities,
        num_warps,
        num_stages,
        kind.mma,
        # Below 64 rows Triton takes mma.sync there too, of f16 for fp8.
        kind.wgmma and (rf"wgmma\.mma_async\S*{kind.wgmma}" if block[0] >= 64 else r"\smma\.sync"),
    )


def _flash_case(
    dtype: torch.dtype,
    causal: bool,
    dim: int,
    block: tuple[int, int],
    seq: int,
    num_warps: int,
    num_stages: int,
) -> Case:
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    mask = "causal" if causal else "full"
    return Case(
        f"flash_attention-{name}-{mask}-d{dim}-{block[0]}x{block[1]}-w{num_warps}-s{num_stages}",
        kernels.flash_attention,
        {"CAUSAL": causal, "HEAD_DIM": dim, "BLOCK_M": block[0], "BLOCK_N": block[1]},
        partial(
            problems.flash_attention,
            heads=2,
            seq=seq,
            dim=dim,
            block_m=block[0],
            causal=causal,
            dtype=dtype,
        ),
        DOT_CAPABILITIES,
        num_warps,
        num_stages,
        r"mma\.\S*m16n8k16",
        rf"wgmma\.mma_async\S*k16\.f32\.{name}",
    )


def _matmul_descriptors_case(
    name: str,
    block: tuple[int, int, int],
    mnk: tuple[int, int, int],
    num_warps: int,
    num_stages: int,
    programs: int,
    flatten: bool = False,
    specialise: bool = False,
    slow: bool = False,
) -> Case:
    kind = _MATMUL_TYPES[name]
    tile = "x".join(map(str, block))
    constexprs = {"ACC": kind.acc, "FLATTEN": flatten, "SPECIALIZE": specialise}
    how = "-flat" * flatten + "-specialised" * specialise
    return Case(
        f"matmul_tma-{name}-{tile}-w{num_warps}-s{num_stages}{how}",
        kernels.matmul_descriptors,
        dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True)) | constexprs,
        partial(problems.matmul_descriptors, mnk=mnk, block=block, programs=programs, kind=kind),
        (90,),
        num_warps,
        num_stages,
        wgmma=r"(?s)"
        + r"setmaxnreg.*" * specialise
        + rf"cp\.async\.bulk\.tensor.*wgmma\.mma_async\S*{kind.wgmma}",
        slow=slow,
    )


def _specialised_case(
    name: str, block: tuple[int, int, int], mnk: tuple[int, int, int], num_warps: int, stages: int
) -> Case:
    kind = _MATMUL_TYPES[name]
    tile = "x".join(map(str, block))

    def build(gen: torch.Generator) -> Problem:
        problem = problems.matmul_descriptors(gen, mnk, block, 1, kind)
        problem.grid = problems.cdiv(mnk[0], block[0]), problems.cdiv(mnk[1], block[1]), 1
        return problem

    return Case(
        f"matmul_specialised-{name}-{tile}-w{num_warps}-s{stages}",
        gluon_kernels.matmul_specialised,
        {"STAGES": stages},
        build,
        (90,),
        num_warps,
        wgmma=rf"(?s)setmaxnreg.*wgmma\.mma_async\S*{kind.wgmma}",
    )


def _flash_descriptors_case(
    dtype: torch.dtype,
    causal: bool,
    dim: int,
    block: tuple[int, int],
    seq: int,
    num_warps: int,
    num_stages: int,
    slow: bool = False,
) -> Case:
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    mask = "causal" if causal else "full"
    shape = {"heads": 2, "seq": seq, "dim": dim, "block": block, "causal": causal, "dtype": dtype}
    return Case(
        f"flash_tma-{name}-{mask}-d{dim}-{block[0]}x{block[1]}-w{num_warps}-s{num_stages}",
        kernels.flash_attention_descriptors,
        {"CAUSAL": causal, "HEAD_DIM": dim, "BLOCK_M": block[0], "BLOCK_N": block[1]},
        partial(problems.flash_descriptors, **shape),
        (90,),
        num_warps,
        num_stages,
        wgmma=rf"(?s)cp\.async\.bulk\.tensor.*wgmma\.mma_async\S*f32\.{name}",
        slow=slow,
    )


_CASTS = [
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float8_e4m3fn),
    (torch.float32, torch.float8_e5m2),
    (torch.float32, torch.float64),
    (torch.float32, torch.int32),
    (torch.float32, torch.int64),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float16, torch.float8_e4m3fn),
    (torch.float16, torch.float8_e5m2),
    (torch.float16, torch.int32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.bfloat16, torch.int8),
    (torch.float8_e4m3fn, torch.float16),
    (torch.float8_e4m3fn, torch.bfloat16),
    (torch.float8_e5m2, torch.float16),
    (torch.float8_e5m2, torch.float32),
    (torch.float64, torch.float32),
    (torch.float64, torch.float16),
    (torch.int8, torch.float16),
    (torch.uint8, torch.bfloat16),
    (torch.int32, torch.float32),
    (torch.int32, torch.float16),
    (torch.int64, torch.float32),
    (torch.int64, torch.float64),
]


def _cases() -> list[Case]:
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    k, p, block = kernels, problems, {"BLOCK": 512}
    cases = [
        _case(k.vector_add, p.vector_add, block, dtype=f32, n=3000, block=512),
        _case(k.vector_add, p.vector_add, block, dtype=bf16, n=4097, block=512),
        _case(k.vector_add, p.vector_add, block, dtype=f16, n=2064, block=512),
        _case(k.row_softmax, p.row_softmax, {"BLOCK": 1024}, dtype=f32, rows=5, cols=781),
        _case(k.row_softmax, p.row_softmax, {"BLOCK": 2048}, 8, dtype=bf16, rows=5, cols=2000),
        _case(k.row_softmax, p.row_softmax, {"BLOCK": 64}, 1, dtype=f32, rows=5, cols=33),
        _case(k.layer_norm, p.layer_norm, block, dtype=f32, rows=3, cols=1151),
        _case(k.layer_norm, p.layer_norm, block, 8, dtype=f16, rows=3, cols=2048),
        _case(k.linear_recurrence, p.linear_recurrence, {"BLOCK": 1024}, rows=3, cols=1000),
        _case(k.linear_recurrence, p.linear_recurrence, {"BLOCK": 64}, 1, rows=3, cols=60),
        _case(k.histogram, p.histogram, block | {"BINS": 128}, n=5000, bins=128, block=512),
        _case(k.histogram, p.histogram, block | {"BINS": 256}, 8, n=5000, bins=256, block=512),
        _case(k.row_sort, p.row_sort, {"BLOCK": 256}, rows=2, cols=256),
        _case(k.row_sort, p.row_sort, {"BLOCK": 64}, 1, rows=2, cols=64),
        _case(k.row_argmax, p.row_argmax, {"BLOCK": 1024}, rows=4, cols=1000),
        _case(k.philox, p.philox, block, programs=2, block=512),
        _case(k.integer_division, p.integer_division, block, programs=2, block=512),
        _case(k.atomics, p.atomics, block, programs=3, block=512, bins=16),
        _case(k.locked_sum, p.locked_sum, block, programs=6, block=512),
    ]
    cases += [
        _case(
            k.elementary_functions,
            p.elementary_functions,
            block,
            dtype=dtype,
            n=1000,
            block=512,
        )
        for dtype in (bf16, f16)
    ]
    for pair in _CASTS:
        capabilities = (89, 90, 100) if torch.float8_e4m3fn in pair else ALL_CAPABILITIES
        shape = dict(zip(("from_dtype", "to_dtype"), pair, strict=True))
        cases.append(_case(k.cast, p.cast, block, capabilities=capabilities, **shape, block=512))
    small, ragged = (128, 128, 256), (100, 80, 208)
    cases += [
        _matmul_case("bf16", (64, 64, 32), small, 4, 3),
        _matmul_case("bf16", (128, 64, 32), ragged, 8, 4),
        _matmul_case("bf16", (16, 128, 64), ragged, 4, 4),
        _matmul_case("f16", (64, 128, 32), small, 4, 4),
        _matmul_case("f16", (32, 32, 64), ragged, 2, 3),
        _matmul_case("tf32", (64, 64, 32), small, 4, 3),
        _matmul_case("tf32", (32, 64, 16), ragged, 4, 4),
        _matmul_case("s8", (64, 64, 64), small, 4, 3),
        _matmul_case("s8", (32, 128, 32), ragged, 4, 4),
        _matmul_case("e4m3", (64, 64, 64), small, 4, 3),
        _matmul_case("e4m3", (32, 64, 32), ragged, 4, 4),
        _matmul_case("e5m2", (64, 64, 64), small, 4, 3),
        _matmul_case("f16_acc", (64, 64, 32), small, 4, 3),
        _matmul_case("f64", (32, 32, 16), (48, 40, 64), 4, 3),
        _matmul_case("f32", (32, 32, 16), (48, 40, 64), 4, 3),
    ]
    large = (256, 256, 512)
    cases += [
        _matmul_case("bf16", (128, 128, 32), large, 4, 3),
        _matmul_case("bf16", (128, 256, 64), large, 8, 3),
        _matmul_case("f16", (256, 64, 32), large, 4, 4),
        _matmul_case("tf32", (128, 128, 32), large, 8, 3),
        _matmul_case("s8", (128, 128, 64), large, 8, 4),
        _matmul_case("e4m3", (128, 128, 64), large, 8, 4),
        _matmul_case("e5m2", (128, 64, 64), large, 4, 4),
    ]
    cases += [
        _flash_case(bf16, False, dim=64, block=(64, 32), seq=160, num_warps=4, num_stages=3),
        _flash_case(bf16, True, dim=64, block=(64, 64), seq=160, num_warps=4, num_stages=2),
        _flash_case(f16, True, dim=128, block=(64, 32), seq=100, num_warps=4, num_stages=2),
        _flash_case(f16, False, 128, (128, 64), seq=512, num_warps=8, num_stages=3),
        _flash_case(bf16, True, 128, (128, 64), seq=500, num_warps=8, num_stages=2),
    ]
    cases += [
        _matmul_descriptors_case("bf16", (64, 64, 64), (100, 96, 200), 4, 3, programs=3),
        _matmul_descriptors_case("bf16", (128, 128, 64), (256, 384, 256), 4, 3, 2, flatten=True),
        _matmul_descriptors_case("f16", (128, 64, 32), (256, 128, 160), 4, 2, programs=4),
        _matmul_descriptors_case("f16", (128, 256, 64), (256, 512, 320), 8, 3, 2, slow=True),
        _matmul_descriptors_case("bf16", (64, 128, 64), (128, 256, 320), 4, 3, 2, specialise=True),
        _matmul_descriptors_case("f16", (64, 64, 64), (100, 96, 200), 4, 2, 3, specialise=True),
        _matmul_descriptors_case("e4m3", (64, 128, 128), (128, 256, 384), 4, 3, programs=2),
        _matmul_descriptors_case("e5m2", (128, 128, 64), (200, 256, 192), 8, 3, programs=4),
        _matmul_descriptors_case("s8", (64, 64, 128), (128, 192, 256), 4, 3, programs=2),
        _matmul_descriptors_case("tf32", (64, 64, 32), (128, 96, 160), 4, 3, programs=2),
        _specialised_case("bf16", (128, 128, 64), (256, 256, 512), 4, 3),
        _specialised_case("f16", (64, 256, 64), (64, 512, 448), 4, 4),
        _specialised_case("bf16", (128, 64, 64), (200, 128, 320), 8, 2),
        _flash_descriptors_case(bf16, False, 64, (64, 64), 192, 4, 3),
        _flash_descriptors_case(bf16, True, 128, (128, 64), 256, 8, 2),
        _flash_descriptors_case(f16, True, 64, (128, 128), 384, 8, 3),
        _flash_descriptors_case(f16, False, 128, (128, 128), 512, 8, 2, slow=True),
    ]
    cases += [
        Case(
            f"int4_matmul-f16-{'x'.join(map(str, block))}-s{stages}",
            kernels.int4_matmul,
            {"GROUP": 32, "BLOCK_M": block[0], "BLOCK_N": block[1], "BLOCK_K": block[2]},
            partial(problems.int4_matmul, mnk=mnk, block=block, group=32),
            DOT_CAPABILITIES,
            num_stages=stages,
            mma=r"mma\.\S*m16n8k16\S*f16",
            wgmma=wgmma,
        )
        for block, mnk, stages, wgmma in [
            ((32, 64, 64), (48, 96, 192), 3, r"\smma\.sync"),
            ((16, 32, 128), (5, 70, 256), 4, r"\smma\.sync"),
            ((64, 64, 64), (96, 96, 192), 3, r"wgmma\.mma_async\S*f16"),
        ]
    ]
    return cases


CASES = _cases()


# --------------------------------------------------------------------------------------------------
# Compilation


@dataclass(frozen=True)
class CompiledCase:
    """PTX of a case and how to launch it.

    hidden_params: pointers that Triton appends to the kernel's own parameters (global scratch,
    profiler scratch); null, as no kernel here asks for scratch memory.
    """

    ptx: str
    name: str
    block: tuple[int, int, int]
    smem: int
    hidden_params: int
    maps: list[dict[str, Any]] | None  # of the descriptors, in order: how Triton lays them out

    def args(self, problem: Problem) -> list[Any]:
        """Arguments of a launch. A descriptor is its tensor map, then its shape and strides."""
        args, maps = [], iter(self.maps or [])
        for arg in problem.args:
            if isinstance(arg, Descriptor):
                tensor = arg.tensor
                args += [_encode(arg, next(maps)), *tensor.shape, *tensor.stride()]
            else:
                args.append(arg)
        return args + [None] * self.hidden_params

    def regions(self, problem: Problem) -> list[torch.Tensor]:
        """What it reaches through tensor maps."""
        return [arg.tensor for arg in problem.args if isinstance(arg, Descriptor)]


# CUtensorMapDataType of an element type as a device-made map has it.
_MAP_TYPES = {8: 10, 9: 8, 10: 9}


def _encode(descriptor: Descriptor, layout: dict[str, Any]) -> bytes:
    """The tensor map that Triton's launcher would make."""
    tensor, lib, context = descriptor.tensor, library(), ctypes.c_void_p()
    memory = (ctypes.c_uint8 * 256)()
    at = ctypes.addressof(memory) + -ctypes.addressof(memory) % 128
    lib.cuInit(0)
    capability, count = ctypes.c_int(), ctypes.c_int()
    lib.cuDeviceGetCount(ctypes.byref(count))
    for device in range(count.value):
        lib.cuDeviceGetAttribute(ctypes.byref(capability), 75, device)
        if capability.value == 9:
            assert lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    assert lib.cuCtxPushCurrent_v2(context) == 0
    status = lib.cuTensorMapEncodeTiled(
        ctypes.c_void_p(at),
        _MAP_TYPES.get(layout["elem_type"], layout["elem_type"]),
        tensor.dim(),
        ctypes.c_void_p(tensor.data_ptr()),
        (ctypes.c_uint64 * 2)(*reversed(tensor.shape)),
        (ctypes.c_uint64 * 1)(tensor.stride(0) * tensor.element_size()),
        (ctypes.c_uint32 * 2)(*reversed(layout["block_size"])),
        (ctypes.c_uint32 * 2)(1, 1),
        *(0, layout["swizzle"], 2, 0),
    )
    assert status == 0, lib.emu_last_report().decode()
    assert lib.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
    return ctypes.string_at(at, 128)


@cache
def compile_case(case: Case, capability: int) -> CompiledCase:
    """Compiles a case for a compute capability, specialised as Triton's launcher would do it.

    That is, pointers and sizes that are multiples of 16 are declared as such: only then does Triton
    emit vector loads and cp.async. Raises NotImplementedError if the kernel wants scratch memory.
    """
    args = case.problem(seed=0).args
    runtime_names = [name for name in case.kernel.arg_names if name not in case.constexprs]
    signature = dict.fromkeys(case.kernel.arg_names, "constexpr")
    attrs = {}
    for name, arg in zip(runtime_names, args, strict=True):
        is_tensor = isinstance(arg, torch.Tensor)
        if isinstance(arg, Descriptor):
            dtype, block = _TRITON_DTYPES[arg.tensor.dtype], list(arg.block)
            signature[name] = f"tensordesc<{dtype}{block}>"
            if case.is_gluon:
                element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
                layout = gl.NVMMASharedLayout.get_default_for(block, element)
                signature[name] = f"tensordesc<{dtype}{block},{layout!r}>"
            continue
        if is_tensor:
            signature[name] = "*" + _TRITON_DTYPES[arg.dtype]
        else:
            signature[name] = "i32" if isinstance(arg, int) else "fp32"
        address = arg.data_ptr() if is_tensor else arg
        if address % 16 == 0:
            attrs[(case.kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
    make_source = GluonASTSource if case.is_gluon else ASTSource
    source = make_source(case.kernel, signature, case.constexprs, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    meta, ptx = compiled.metadata, compiled.asm["ptx"]
    if meta.global_scratch_size or meta.profile_scratch_size:
        raise NotImplementedError(f"{case.id}: Triton asks for scratch memory, accepted is none")
    params = re.findall(r"^\s*\.param ", ptx.partition(".entry")[2].partition(")")[0], re.M)
    expected = sum(5 if isinstance(arg, Descriptor) else 1 for arg in args)
    return CompiledCase(
        ptx,
        meta.name,
        (32 * meta.num_warps, 1, 1),
        meta.shared,
        len(params) - expected,
        meta.tensordesc_meta,
    )
