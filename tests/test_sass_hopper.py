"""What only a card would notice, read from SASS: memory touched before griddepcontrol.wait, fences
of a wider scope than meant in main loops, registers that setmaxnreg waits for in vain, descriptors
that are moved."""

from __future__ import annotations

import re

import pytest

from bench import sass
from minitron_kernels import native
from tests.native_emulator import BUILT, kernel_file, ptx_of

WITH_PDL = [arch for arch in ("90a", "100a") if arch in BUILT]
pytestmark = pytest.mark.skipif(not WITH_PDL, reason="built without sm_90a and sm_100a")

# Instructions that access global memory; CCTL asks for it in L2 or empties L1, UTMAPF asks.
GLOBAL = {
    "LD",
    "LDG",
    "ST",
    "STG",
    "LDGSTS",
    "ATOM",
    "ATOMG",
    "RED",
    "UBLKCP",
    "UTMALDG",
    "UTMASTG",
}
# By the start of an entry's name, what it may do before: read hints past L1 (attn_decode_sm90.cuh).
BEFORE_WAIT = {r"mk_attention_decode_sm90_": {"LDG.E.STRONG.GPU"}}


def functions(arch: str) -> dict[str, list[sass.Instruction]]:
    try:
        return sass.functions(kernel_file(arch))
    except FileNotFoundError as e:
        pytest.skip(str(e))


def before_wait(code: list[sass.Instruction]) -> set[str]:
    """Accesses of global memory that stand before the first griddepcontrol.wait."""
    waits = [n for n, i in enumerate(code) if i.name == "ACQBULK"]
    return {i.opcode for i in code[: waits[0] if waits else None] if i.name in GLOBAL}


@pytest.mark.parametrize("arch", WITH_PDL)
def test_memory_is_left_alone_before_griddepcontrol_wait(arch: str) -> None:
    """A launch that runs early would read what the one before it has not written yet. What the
    compiler moves is seen here, too."""
    for name, code in functions(arch).items():
        allowed = [found for entry, found in BEFORE_WAIT.items() if re.match(entry, name)]
        assert before_wait(code) <= (allowed[0] if allowed else set()), name


# With the scope of the GPU or the cluster a thread waits for all of its writes to arrive in L2, and
# L1 is emptied: some 500 clocks, in a loop whose turns take as long.
MMAS = ("HMMA", "IMMA", "HGMMA", "QGMMA")
WIDE = re.compile(r"MEMBAR\.\w+\.(GPU|SYS|VC)|CCTL\.IVALL|ERRBAR|CGAERRBAR")


def main_loops(code: list[sass.Instruction]) -> list[list[sass.Instruction]]:
    """The innermost loops with MMAs: all that a turn may come through."""
    blocks, successors = sass._basic_blocks(code)
    dominators = sass._dominators(successors)
    loops: dict[int, set[int]] = {}
    for latch, targets in enumerate(successors):
        for header in targets & dominators[latch]:
            body = sass._natural_loop(header, latch, successors)
            loops[header] = loops.get(header, set()) | body
    with_mma = [
        body for body in loops.values() if any(i.name in MMAS for b in body for i in blocks[b])
    ]
    innermost = [body for body in with_mma if not any(other < body for other in with_mma)]
    return [[i for b in sorted(body) for i in blocks[b]] for body in innermost]


def wide_fences(code: list[sass.Instruction]) -> list[str]:
    return [i.opcode for loop in main_loops(code) for i in loop if WIDE.match(i.opcode)]


@pytest.mark.skipif("90a" not in BUILT, reason="built without sm_90a")
def test_main_loops_fence_no_wider_than_the_block() -> None:
    seen = 0
    for name, code in functions("90a").items():
        assert wide_fences(code) == [], name
        seen += bool(main_loops(code))
    assert seen >= 32


@pytest.mark.skipif("90a" not in BUILT, reason="built without sm_90a")
def test_quantised_products_have_descriptors_in_uniform_registers() -> None:
    """Else each wgmma takes four instructions more: its descriptor is added up in ordinary
    registers and moved. It needs a switch between types that ptxas knows to be the warp's."""
    code = {
        name: c for name, c in functions("90a").items() if "quant_gemm_sm90_b16_rows128" in name
    }
    assert len(code) == 2
    for name, instructions in code.items():
        loops = main_loops(instructions)
        assert len(loops) == 10, name  # one for each type
        for loop in loops:
            found = [i.name for i in loop]
            assert found.count("HGMMA") >= 4 and found.count("R2UR") <= 1, name


@pytest.mark.skipif("90a" not in BUILT, reason="built without sm_90a")
def test_setmaxnreg_asks_for_what_the_launch_has() -> None:
    """setmaxnreg.inc waits until the block's registers suffice: with what the other warpgroups gave
    up, and no more than the launch allocated, they must. What a warpgroup keeps, its code needs."""
    threads = {
        name: int(bound)
        for text in ptx_of("90a")
        for name, bound in re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", text)
    }
    entries, seen = native.build_info()["entries"]["90a"], 0
    for name, code in functions("90a").items():
        asked = {
            kind: [int(i.operands.split(",")[-1], 16) for i in code if i.opcode.startswith(kind)]
            for kind in ("USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC")
        }
        (less, more) = asked.values()
        if not less and not more:
            continue
        assert len(less) == len(more) == 1 and less[0] % 8 == more[0] % 8 == 0, (name, asked)
        had = entries[name]["registers"] // 8 * 8
        groups = threads[name] // 128 - 1
        assert less[0] + groups * more[0] <= had * (groups + 1), (name, less, more, had)
        assert less[0] <= had <= more[0], (name, less, more, had)
        assert highest_register(code) < more[0], name
        seen += 1
    assert seen >= 18


def highest_register(code: list[sass.Instruction]) -> int:
    return max(int(r) for i in code for r in re.findall(r"\bR(\d+)\b", i.operands))


def test_the_tests_can_fail() -> None:
    early = sass.parse("/*0000*/ LDG.E R0, [R2] ;\n/*0010*/ ACQBULK ;\n/*0020*/ STG.E [R2], R0 ;")
    assert before_wait(early) == {"LDG.E"} and before_wait(early[1:]) == set()
    loop = sass.parse(
        "/*0000*/ CCTL.IVALL ;\n/*0010*/ HGMMA.64x48x16.F32.BF16 R24, gdesc[UR128], R24 ;\n"
        "/*0020*/ @P1 MEMBAR.ALL.GPU ;\n/*0030*/ @P0 BRA 0x10 ;\n/*0040*/ EXIT ;"
    )
    assert wide_fences(loop) == ["MEMBAR.ALL.GPU"]
    assert highest_register(loop) == 24
