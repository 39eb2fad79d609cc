"""The static gate of the tensor-core kernels: what plans claim, and the SASS of main loops.

What holds for every kernel (spills, local memory, names, registers) is in test_ptx.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import pytest

from bench import sass
from bench.accounting import Case, Plan, mma_flop
from bench.case_table import all_cases
from bench.cases import is_peer, linear, ptx_by_entry, supported
from minitron_kernels import native
from minitron_kernels.architectures import ARCHITECTURES
from tests.native_emulator import ARCHS, BUILT, kernel_file

pytestmark = pytest.mark.skipif(not BUILT, reason="built without kernels (MK_ARCHS=none)")
archs = pytest.mark.parametrize("arch", [pytest.param(a, id=f"sm_{a}") for a in ARCHS])

GPUS = dict(zip(ARCHS, (ARCHITECTURES[n] for n in ("A100", "L40S", "H100", "B200")), strict=True))


# Blocks that an SM holds at once, on sm_80, 89, 90 and 100: what the tile tables count on
# (linear_tiles.h, linear_skinny_tiles.h, attn_tiles.h, attn_decode_tiles.h). None: the arch
# has no such kernel.
CLAIMED_BLOCKS = {
    r"linear.*_m128_n256": (1, 1, 1, 1),
    r"linear.*_m128_n128": (2, 2, 1, 2),
    r"linear.*_m128_n(64|192)": (None, None, 1, None),
    r"linear.*_m64_n64": (2, 2, None, 2),
    r"linear.*_m64_n(32|48|96)": (None, None, 2, None),
    r"attention_sm\d+_\w+_hd128": (2, 1, 1, 1),
    r"attention_decode.*_rows8": (3, 2, 2, 3),
}


def entries_with(instruction: str, arch: str) -> list[str]:
    if arch not in BUILT:
        pytest.skip(f"sm_{arch} is not in this build")
    found = re.compile(rf"\b{instruction}\.")
    return [name for name, ptx in ptx_by_entry(arch).items() if found.search(ptx)]


def mma_entries(arch: str) -> list[str]:
    return entries_with(r"mma\.sync", arch)


def code(arch: str) -> dict[str, list[sass.Instruction]]:
    try:
        return sass.functions(kernel_file(arch))
    except FileNotFoundError as e:
        pytest.skip(str(e))


def plans(arch: str) -> Iterator[tuple[Case, Plan]]:
    """Of every case of this project's kernels at Minitron-8B's shapes."""
    if arch not in BUILT:
        pytest.skip(f"sm_{arch} is not in this build")
    for case in [*all_cases(), linear("o", 4096, 4096, 64), linear("o", 4096, 4096, 128)]:
        if not is_peer(case) and supported(case, arch):
            yield case, case.plan(arch, case.units)


@archs
def test_plans_fit_the_architecture(arch: str) -> None:
    """Shared memory, threads, and registers for as many blocks as the tile tables claim; and each
    claim is about some plan."""
    of_arch = {pattern: blocks[ARCHS.index(arch)] for pattern, blocks in CLAIMED_BLOCKS.items()}
    claims = {pattern: blocks for pattern, blocks in of_arch.items() if blocks is not None}
    met = set()
    gpu = GPUS[arch]
    for case, plan in plans(arch):
        use = native.build_info()["entries"][arch][plan.entry]
        smem, threads = plan.smem_bytes + use["smem_bytes"], math.prod(plan.block)
        assert smem <= gpu.smem_per_block and threads <= 1024, case.id
        occupancy = gpu.occupancy(threads, use["registers"], smem)
        assert occupancy >= 1, (case.id, plan, use)
        # skinny_sm90_smem_bytes: where half of the SMs have no block, one takes a whole SM.
        is_alone = "linear_sm90" in plan.entry and 2 * math.prod(plan.grid) <= gpu.sms
        for pattern in (p for p in claims if re.search(p, plan.entry)):
            assert occupancy >= (1 if is_alone else claims[pattern]), (case.id, plan, use)
            met.add(pattern)
        assert plan.grid[0] < 2**31 and max(plan.grid[1:]) < 2**16, (case.id, plan)
    assert met == {pattern for pattern, blocks in claims.items() if blocks}


@archs
def test_mma_entries_use_the_tensor_core_in_their_main_loop(arch: str) -> None:
    """m16n8k16 with fp32 sums of the entry's own dtype; nothing is converted on the way. Quantised
    weights, and x for them, are f16 (csrc/quant/quant_x.cuh); sums of x alone are in its dtype."""
    for name in mma_entries(arch):
        opcodes = {i.opcode for i in code(arch)[name] if i.name == "HMMA"}
        kinds = {"HMMA.16816.F32.BF16"} if "_bf16" in name else {"HMMA.16816.F32"}
        if "quant" in name:  # a loop for each of the ten types, behind a switch
            kinds |= {"HMMA.16816.F32.BF16"} if "quant_decode" in name else set()
            assert "HMMA.16816.F32" in opcodes <= {"HMMA.16816.F32", *kinds}, (name, opcodes)
            if "quant_gemm" in name:  # of 16 or 32 rows of w and two times 8 of x, 32 k
                loop = sass.main_loop(code(arch)[name])
                assert loop is not None and loop.hmma >= 4, (name, loop)
            continue
        assert opcodes == kinds, (name, opcodes)
        loop = sass.main_loop(code(arch)[name])
        assert loop is not None and loop.hmma >= 2, name


# By the start of an entry's name: wgmma's opcode, and how many a turn of the main loop has at least
# (64 or 128 k of a product; of attention, of both products).
WGMMAS = {
    r"linear_sm90_(?P<dtype>\w+?)_m\d+_n(?P<n>\d+)": (r"HGMMA.64x{n}x16.F32{dtype}", 4),
    r"linear_fp8_sm90_e4m3_m128_n(?P<n>\d+)": (r"QGMMA.64x{n}x32.F32.E4M3.E4M3", 4),
    r"quant_gemm_sm90_b16_rows128": (r"HGMMA.64x64x16.F32", 4),
    r"attention_sm90_(?P<dtype>\w+?)_hd128": (r"HGMMA.64x128x16.F32{dtype}", 16),
    r"attention_sm90_(?P<dtype>\w+?)_hd64": (r"HGMMA.64x(64|128)x16.F32{dtype}", 12),
    # Eight columns of V more, of ones: the sums of P.
    r"attention_fp8_sm90_\w+_hd128": (r"QGMMA.64x(128|136)x32.F32.E4M3.E4M3", 8),
}  # fmt: skip


def wgmma_fault(name: str, code: list[sass.Instruction]) -> str | None:
    """What is not as WGMMAS tells."""
    (match, (opcode, count)), *others = (
        (found, row) for entry, row in WGMMAS.items() if (found := re.match("mk_" + entry, name))
    )
    assert not others, name
    words = match.groupdict()
    words["dtype"] = ".BF16" if words.get("dtype") == "bf16" else ""  # F16 is not written
    opcode = opcode.replace(".", r"\.").format(**words)
    wrong = {i.opcode for i in code if "MMA" in i.name and not re.fullmatch(opcode, i.opcode)}
    if wrong:
        return f"other MMAs: {wrong}"
    loop = sass.main_loop(code)
    if loop is None or loop.hmma < count:
        return f"main loop: {loop}"
    return None


@pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")
def test_wgmma_entries_use_the_tensor_core_in_their_main_loop() -> None:
    """Of the entry's own dtype and tile, with fp32 sums, and no mma.sync beside it; of quantised
    weights f16."""
    names = entries_with(r"wgmma\.mma_async", "90a")
    faults = {name: fault for name in names if (fault := wgmma_fault(name, code("90a")[name]))}
    assert not faults
    for entry in WGMMAS:
        assert any(re.match("mk_" + entry, name) for name in names), entry


@archs
def test_operands_come_by_16_byte_copies_and_ldmatrix(arch: str) -> None:
    """cp.async of 16 bytes past L1, ldmatrix, and no bank-conflicting scalar loads in the loop."""
    for name in mma_entries(arch):
        if "unaligned" in name or "quant" in name:
            continue  # quantised weights lie in memory as fragments, and are loaded as such
        loop = sass.main_loop(code(arch)[name])
        assert loop is not None and "LDSM" in loop.opcodes, name
        copies = [i.opcode for i in code(arch)[name] if i.name == "LDGSTS"]
        assert copies and all(".128" in c for c in copies if ".BYPASS" in c), (name, copies)


def test_the_gate_can_fail() -> None:
    """It sees an entry without tensor core, a main loop without it, a block too large."""
    assert mma_flop("fma.rn.f32 %f1, %f2, %f3, %f4;") == 0
    wgmma = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1, %f2}, %rd1, %rd2, p;"
    assert mma_flop(wgmma) == 64 * 128 * 16 * 2 // 4
    assert sass.main_loop(sass.parse("/*0000*/ HMMA.16816.F32 R0, R1, R2, R0 ;")) is None
    turn = [f"HGMMA.64x64x16.F32.BF16 R24, gdesc[UR{i}], R24 ;" for i in range(4)] + ["BRA 0x0 ;"]
    good = "\n".join(f"/*{16 * i:04x}*/ {line}" for i, line in enumerate(turn))
    fault = {
        name: wgmma_fault(f"mk_linear_sm90_{name}", sass.parse(text))
        for name, text in {
            "bf16_m128_n64": good,
            "f16_m128_n64": good,
            "bf16_m128_n128": good,
            "bf16_m64_n64": good.replace("HGMMA", "IMAD", 1),
            "bf16_m256_n64": good.replace("BRA 0x0", "EXIT"),
        }.items()
    }
    assert [name for name, found in fault.items() if not found] == ["bf16_m128_n64"]
    assert GPUS["89"].occupancy(256, 255, 99 << 10) == 1
    assert GPUS["89"].occupancy(256, 255, 100 << 10) == 0
    assert GPUS["80"].occupancy(512, 255, 0) == 0
