"""The static gate: what the compiler made of the kernels, and what the sources may hold."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from minitron_kernels import native
from tests import native_abi as abi
from tests.native_emulator import ARCHS, kernel_file, ptx_of

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

pytestmark = pytest.mark.skipif(
    not native.build_info()["archs"], reason="built without kernels (MK_ARCHS=none)"
)
archs = pytest.mark.parametrize("arch", ARCHS)

# Registers per thread and bytes of static shared memory that each op may take: what the tile
# tables (rms_norm_tiles.h, ...) count on for the number of blocks that an SM holds.
CLAIMS = {
    "rms_norm": (96, 512),
    "add_rms_norm": (128, 512),
    "rms_norm_unaligned": (128, 512),
    "add_rms_norm_unaligned": (128, 512),
    "apply_rope": (96, 0),
    "apply_rope_unaligned": (128, 0),
    "rope_append": (96, 0),
    "rope_append_unaligned": (128, 0),
    "silu_and_mul": (64, 0),
    "silu_and_mul_unaligned": (64, 0),
    "embedding": (40, 0),
    "embedding_unaligned": (40, 0),
    "embedding_quant": (64, 0),
    "quant_prepare_x": (80, 9 << 10),
    "quant_gemm_rows128_m128": (255, 0),
    "quant_gemm_rows64_m128": (232, 0),
    "quant_gemm_rows128_m64": (255, 0),  # 168 on sm_90: the launch of its warpgroups
    "quant_gemm_rows32_m64": (128, 0),
    "argmax": (64, 256),
    "argmax_unaligned": (64, 256),
    "sample": (64, 25 << 10),
    "sample_unaligned": (64, 25 << 10),
    "attention_hd64": (255, 0),
    "attention_hd128": (255, 0),
    "attention_fp8_hd128": (168, 0),  # at launch: setmaxnreg gives 232
    "linear": (128, 0),
    "linear_swiglu": (128, 0),
    "qkv_rope_append": (128, 0),
    "linear_m128_n256": (255, 0),
    "linear_m128_n128": (255, 0),
    "linear_m64_n64": (144, 0),
    # sm_90a's, at launch: setmaxnreg gives 232.
    **{f"linear_m128_n{n}": (168, 0) for n in (192, 64)},
    **{f"linear_fp8_m128_n{n}": (168, 0) for n in (192, 128, 64)},
    "quantize_fp8": (64, 0),
    "quant_decode": (255, 0),
    "attention_decode_hd64_rows8": (168, 48 << 10),
    "attention_decode_hd64_rows32": (255, 36 << 10),
    "attention_decode_hd128_rows8": (168, 48 << 10),
    "attention_decode_hd128_rows32": (255, 40 << 10),
}
SHARED = ("quant_decode", "quant_gemm")  # kernels of all products with quantised weights
LINEAR = ("linear", "linear_swiglu", "qkv_rope_append", "linear_fp8", *SHARED)
# Widths of stores next to 16 bytes: a token, an index; a lane's four weights, or one where rows are
# not aligned; 8 elements of fp8, and a scale; attention's out (8 bytes a lane, a row a warp),
# statistics of partial results, lse and the counter.
NARROW_STORES = {
    "embedding_quant": {".64", ""},
    "quant_prepare_x": {".64", ""},
    "quantize_fp8": {".64", ""},
    "argmax": {".64"},
    "sample": {".64"},
    "attention_decode": {".64", ""},
    "attention": {""},
    "attention_fp8": {""},
}
ENTRY_NAME = re.compile(
    r"mk_(?P<op>[a-z_0-9]+)_sm(?P<sm>80|89|90|100)_(?P<dtype>bf16|f16|f32|b16|e4m3)"
    r"(?P<keys>(_[a-z]+\d+)*)(?P<flags>(_[a-z]+)*)"
)


def entries(arch: str) -> dict[str, dict[str, int]]:
    return native.build_info()["entries"][arch]


def tool(name: str) -> str:
    """A CUDA binary tool, of the PyPI wheel or the toolkit."""
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / name
    found = str(wheel) if wheel.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed (pip install nvidia-cuda-{name})")
    return found


@functools.cache
def sass(arch: str) -> dict[str, str]:
    """Kernel name -> SASS, of the file that ships."""
    text = subprocess.run(
        [tool("cuobjdump"), "-sass", kernel_file(arch)], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"\n\s*Function : (\w+)", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_architecture_is_built() -> None:
    """Unless the build was asked for fewer, which CI does not."""
    assert set(native.build_info()["archs"]) == set(ARCHS)


@archs
def test_entry_names_and_number(arch: str) -> None:
    for name in entries(arch):
        match = ENTRY_NAME.fullmatch(name)
        assert match, name
        assert match["op"] in (*abi.OPS, *SHARED) and match["sm"] == arch.rstrip("a"), name
    assert len(entries(arch)) <= 75


@archs
def test_resources_within_claims(arch: str) -> None:
    for name, use in entries(arch).items():
        assert use["spill_bytes"] == 0 and use["stack_bytes"] == 0, name
        match = ENTRY_NAME.fullmatch(name)
        key = match["op"] + match["keys"] + match["flags"]
        registers, smem = CLAIMS.get(key) or CLAIMS[match["op"] + match["flags"]]
        assert use["registers"] <= registers and use["smem_bytes"] <= smem, (name, use)


@archs
def test_sass_is_of_the_arch_and_has_no_local_memory(arch: str) -> None:
    code = sass(arch)
    assert set(code) == set(entries(arch))
    for name, text in code.items():
        assert not re.search(r"\b(LDL|STL)\b", text), f"{name} uses local memory"
        waits = re.findall(r"\b(ACQBULK|DEPBAR\.PDL|PREEXIT)\b", text)
        assert bool(waits) == (arch in ("90a", "100a")), f"{name}: griddepcontrol {waits}"


# Instructions that a kernel of an architecture is there for, by the start of its entries' names.
OWN_INSTRUCTIONS = {
    r"mk_attention_sm90": {"HGMMA", "UTMALDG", "USETMAXREG"},
    r"mk_attention_fp8_sm90": {"QGMMA", "UTMALDG", "USETMAXREG"},
    r"mk_attention_decode_sm90": {"UTMALDG", "UTMAPF"},
    r"mk_linear_sm90_\w+_m128_": {"HGMMA", "UTMALDG", "USETMAXREG"},
    r"mk_linear_fp8_sm90": {"QGMMA", "UTMALDG", "USETMAXREG"},
    r"mk_linear_sm90_\w+_m64_": {"HGMMA", "UTMALDG", "UTMAPF"},
    r"mk_quant_gemm_sm90_b16_rows128_": {"HGMMA", "UBLKCP", "USETMAXREG"},
}


@archs
def test_sass_has_the_instructions_of_its_arch(arch: str) -> None:
    for name, text in sass(arch).items():
        own = [found for entry, found in OWN_INSTRUCTIONS.items() if re.match(entry, name)]
        expected = own[0] if own else set()
        found = set(re.findall(r"\b(HGMMA|QGMMA|UTMALDG|UBLKCP|UTMAPF|USETMAXREG)\b", text))
        assert found == expected, name


@pytest.mark.slow
@archs
def test_cuxray_gate(arch: str, tmp_path: Path) -> None:
    """An independent reading of the cubins: no spill instruction, registers within the largest
    claim, for each entry file."""
    if not shutil.which("cuxray"):
        pytest.skip("cuxray is not installed")
    subprocess.run([tool("cuobjdump"), "-xelf", "all", kernel_file(arch)], cwd=tmp_path, check=True)
    cubins = sorted(tmp_path.glob("*.cubin"))
    assert len(cubins) == len({use["file"] for use in entries(arch).values()})
    env = {**os.environ, "PATH": f"{Path(tool('nvdisasm')).parent}:{os.environ['PATH']}"}
    for cubin in cubins:
        gate = ["cuxray", "gate", str(cubin), "spill_instrs==0, regs<=255"]
        done = subprocess.run(gate, capture_output=True, text=True, env=env)
        assert done.returncode == 0, f"{cubin.name}: {done.stdout}{done.stderr}"


@archs
def test_sass_moves_16_bytes_at_a_time(arch: str) -> None:
    """Aligned kernels read activations with 128-bit accesses, bulk copies or TMA, and write them
    with 128-bit accesses and no narrower store than NARROW_STORES tells (the linear kernels write
    what an MMA leaves in a thread: a pair of outputs, or one)."""
    for name, text in sass(arch).items():
        if "unaligned" in name:
            continue
        assert re.search(r"\b(UTMALDG|UBLKCP)\b|\b(LDG|LDGSTS)\.E(\.\w+)*\.128", text), name
        if ENTRY_NAME.fullmatch(name)["op"] in LINEAR:
            continue
        stores = re.findall(r"\bSTG\.E((?:\.\w+)*)", text)
        widths = {".128", *NARROW_STORES.get(ENTRY_NAME.fullmatch(name)["op"], ())}
        assert {(re.findall(r"\.\d+", s) or [""])[-1] for s in stores} <= widths, (name, stores)


@archs
def test_fatbin_holds_the_ptx_as_text(arch: str) -> None:
    """What the emulator runs is what ships: PTX for the arch, with source lines."""
    texts = ptx_of(arch)
    assert all(f".target sm_{arch}\n" in t.replace(", debug", "") for t in texts)
    assert all(".loc" in t for t in texts)
    defined = {name for t in texts for name in re.findall(r"\.entry (\w+)", t)}
    assert defined == set(entries(arch))


# ---------------------------------------------------------------------------------- the sources


def sources(*suffixes: str) -> list[Path]:
    return [p for p in [*CSRC.rglob("*"), *(ROOT / "include").rglob("*")] if p.suffix in suffixes]


def test_no_torch_and_no_cuda_header() -> None:
    """Host code compiles without CUDA, device code without anything but it."""
    for path in sources(".h", ".cpp", ".cuh", ".cu"):
        for header in re.findall(r'#include [<"](.+?)[>"]', path.read_text()):
            assert not re.search(r"torch|ATen|c10|cuda\w*\.h|cooperative_groups", header), path
            if path.suffix in (".cuh", ".cu") and "/" not in header:
                assert re.fullmatch(r"cstdint|minitron_kernels(_fp8)?\.h", header), path


def test_asm_stands_in_ptx_only() -> None:
    for path in sources(".h", ".cpp", ".cuh", ".cu"):
        has_asm = re.search(r"\basm\b", re.sub(r"//.*", "", path.read_text()))
        assert not has_asm or path.parent == CSRC / "ptx", path


def test_ptx_functions_are_named_as_their_mnemonics() -> None:
    for path in (CSRC / "ptx").glob("*.cuh"):
        functions = re.split(r"__device__ __forceinline__", path.read_text())[1:]
        assert "ISA#" in path.read_text()
        for text in functions:
            name = re.search(r"(\w+)\(", text)[1]
            text = re.sub(r'"\s*(#n)?\s*"', "", text)  # a literal over several lines, of macros
            # Past what only sets up a predicate; and what has no instruction at all.
            setup = r"(?:\{\.reg \.pred p; (?:setp[^;]+; )?)?"
            instructions = re.findall(rf'asm(?: volatile)?\(\s*"{setup}([^";]*)', text)
            if name == "pin":
                assert set(instructions) <= {""}
                continue
            assert len(instructions) == 1, f"{path.name}: {name}"
            words = set(re.findall(r"[a-z0-9]+", instructions[0].lower()))  # of immediates too
            assert set(name.split("_")) <= words, (name, instructions[0])


def test_file_sizes() -> None:
    for path in sources(".h", ".cpp", ".cuh", ".cu"):
        limit = 500 if path.suffix in (".cuh", ".cu") else 800
        assert len(path.read_text().splitlines()) <= limit, path


def test_readme_map_is_true() -> None:
    """Every path that csrc/README.md names exists; every op and entry file is in it, with the
    architectures that the build compiles it for."""
    sys.path.insert(0, str(ROOT / "build_tools"))
    try:
        from native import ENTRY_FILES
    finally:
        sys.path.pop(0)
    text = (CSRC / "README.md").read_text()
    for path in re.findall(r"`([\w/]+\.(?:cuh|cu|cpp|h))`", text):
        assert (CSRC / path).exists() or (ROOT / path).exists(), path
    rows = re.findall(r"^\| `(\S+entries/\S+)` \|(.*)\|$", text, re.MULTILINE)
    marked = {
        path: tuple(a for a, cell in zip(ARCHS, cells.split("|"), strict=True) if "x" in cell)
        for path, cells in rows
    }
    assert marked == dict(ENTRY_FILES)
    assert set(marked) == {str(p.relative_to(CSRC)) for p in CSRC.rglob("entries/*.cu")}
    named = re.findall(r"^\| ([a-z_0-9, ]+) \| `", text, re.MULTILINE)
    assert {op for row in named for op in row.split(", ")} == set(abi.OPS)


def test_header_is_c99(tmp_path: Path) -> None:
    source = tmp_path / "header.c"
    source.write_text('#include "minitron_kernels_fp8.h"\n')  # which includes the other
    command = ["gcc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    subprocess.run([*command, f"-I{native.get_include()}", source], check=True)


def test_library_exports_the_header_and_needs_no_cuda() -> None:
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", native.get_library()], capture_output=True, text=True
    ).stdout
    assert {line.split()[-1] for line in exported.splitlines()} == abi.functions()
    needed = subprocess.run(
        ["readelf", "-d", native.get_library()], capture_output=True, text=True
    ).stdout
    assert not re.search(r"NEEDED.*(cuda|torch|python)", needed)
