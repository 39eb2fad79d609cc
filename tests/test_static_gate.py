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
from bench.architectures import ARCHITECTURES
from bench.cases import all_cases, is_peer, ptx_by_entry, supported
from minitron_kernels import native
from tests import native_abi as abi
from tests.native_emulator import ARCHS, BUILT, kernel_file

pytestmark = pytest.mark.skipif(not BUILT, reason="built without kernels (MK_ARCHS=none)")
archs = pytest.mark.parametrize("arch", [pytest.param(a, id=f"sm_{a}") for a in ARCHS])

GPUS = dict(zip(ARCHS, (ARCHITECTURES[n] for n in ("A100", "L40S", "H100", "B200")), strict=True))


def mma_entries(arch: str) -> list[str]:
    if arch not in BUILT:
        pytest.skip(f"sm_{arch} is not in this build")
    return [name for name, ptx in ptx_by_entry(arch).items() if mma_flop(ptx)]


def code(arch: str) -> dict[str, list[sass.Instruction]]:
    try:
        return sass.functions(kernel_file(arch))
    except FileNotFoundError as e:
        pytest.skip(str(e))


def plans(arch: str) -> Iterator[tuple[Case, Plan]]:
    """Of every case of this project's kernels at Minitron-8B's shapes."""
    if arch not in BUILT:
        pytest.skip(f"sm_{arch} is not in this build")
    for case in all_cases():
        if not is_peer(case) and supported(case, arch):
            yield case, case.plan(arch, case.units)


@archs
def test_plans_fit_the_architecture(arch: str) -> None:
    """Shared memory, threads and registers of one block at least; and the entry exists."""
    gpu = GPUS[arch]
    for case, plan in plans(arch):
        use = native.build_info()["entries"][arch][plan.entry]
        smem, threads = plan.smem_bytes + use["smem_bytes"], math.prod(plan.block)
        assert smem <= gpu.smem_per_block and threads <= 1024, case.id
        assert gpu.occupancy(threads, use["registers"], smem) >= 1, (case.id, plan, use)
        assert plan.grid[0] < 2**31 and max(plan.grid[1:]) < 2**16, (case.id, plan)


@archs
def test_mma_entries_use_the_tensor_core_in_their_main_loop(arch: str) -> None:
    """m16n8k16 with fp32 sums of the entry's own dtype; nothing is converted on the way."""
    for name in mma_entries(arch):
        loop = sass.main_loop(code(arch)[name])
        assert loop is not None and loop.hmma >= 2, name
        opcodes = {i.opcode for i in code(arch)[name] if i.name == "HMMA"}
        kind = r"HMMA\.16816\.F32\.BF16" if "_bf16" in name else r"HMMA\.16816\.F32"
        assert all(re.fullmatch(kind, opcode) for opcode in opcodes), (name, opcodes)


@archs
def test_operands_come_by_16_byte_copies_and_ldmatrix(arch: str) -> None:
    """cp.async of 16 bytes past L1, ldmatrix, and no bank-conflicting scalar loads in the loop."""
    for name in mma_entries(arch):
        if "unaligned" in name:
            continue
        loop = sass.main_loop(code(arch)[name])
        assert loop is not None and "LDSM" in loop.opcodes, name
        copies = [i.opcode for i in code(arch)[name] if i.name == "LDGSTS"]
        assert copies and all(".128" in c for c in copies if ".BYPASS" in c), (name, copies)


def test_the_gate_can_fail() -> None:
    """The checks above see an entry without tensor core, and one whose loop has none."""
    assert mma_flop("fma.rn.f32 %f1, %f2, %f3, %f4;") == 0
    assert sass.main_loop(sass.parse("/*0000*/ HMMA.16816.F32 R0, R1, R2, R0 ;")) is None
    with pytest.raises(abi.StatusError):
        abi.plan("rms_norm", abi.params_type("rms_norm")(), "80")
