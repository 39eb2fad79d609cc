"""The emulator runs kernels that Triton compiled and gives the right answers.

Every case of emulator/triton_cases.py runs for each capability it is compiled for, under several
interleavings of warps and CTAs: results are within the tolerance rule, the same bits each time.
The closing table names what was validated, with the largest error in units of what is allowed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch

from tests.emulator import Emulator, EmulatorError
from tests.emulator.triton_cases import (
    ALL_CAPABILITIES,
    CASES,
    Case,
    CompiledCase,
    Problem,
    compile_case,
)

SEEDS = range(6)


@dataclass
class Validated:
    cases: int = 0
    launches: int = 0
    worst: float = 0.0


@dataclass
class Table:
    rows: dict[str, dict[int, Validated]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(Validated))
    )

    def lines(self) -> Iterator[str]:
        yield "Triton kernels validated: cases / launches / largest error (1 is what is allowed)"
        yield f"{'':24}" + "".join(f"{f'sm_{c}':>18}" for c in ALL_CAPABILITIES)
        for family, row in self.rows.items():
            cells = [
                f"{row[c].cases} / {row[c].launches} / {row[c].worst:.2f}" if c in row else "-"
                for c in ALL_CAPABILITIES
            ]
            yield f"{family:24}" + "".join(f"{cell:>18}" for cell in cells)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    table = Table()
    yield table
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("", *table.lines(), sep="\n")


def launch(compiled: CompiledCase, problem: Problem, capability: int, seed: int) -> None:
    """Runs a case on fresh poison."""
    problem.reset()
    kernel = Emulator(f"sm_{capability}").load(compiled.ptx).kernel(compiled.name)
    kernel.launch(
        problem.grid, compiled.block, compiled.args(problem), smem=compiled.smem, seed=seed,
        regions=compiled.regions(problem),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "capability"),
    [
        pytest.param(
            case,
            capability,
            id=f"{case.id}-sm_{capability}",
            marks=[pytest.mark.slow] if case.slow else [],
        )
        for case in CASES
        for capability in case.capabilities
    ],
)
def test_triton_kernel_gives_the_right_answer(case: Case, capability: int, table: Table) -> None:
    compiled = compile_case(case, capability)
    instruction = case.tensor_core_instruction(capability)
    if instruction is not None:
        assert re.search(instruction, compiled.ptx), "not the tensor-core instruction meant"
    row = table.rows[case.table_row][capability]
    problem = case.problem(seed=1)
    first = None
    for seed in SEEDS:
        launch(compiled, problem, capability, seed)
        error, own = problem.error()
        assert error <= 1, f"seed {seed}: {error:.3g} times what is allowed (PyTorch: {own:.3g})"
        first = problem.out.clone() if first is None else first
        assert torch.equal(first, problem.out), f"seed {seed} gives other bits than {SEEDS[0]}"
        row.launches += 1
        row.worst = max(row.worst, error)
    row.cases += 1


# --------------------------------------------------------------------------------------------------
# The validation can fail: the same kernels with one thing wrong


def faulty(
    case_id: str, pattern: str, replacement: str, capability: int = 80
) -> tuple[Case, CompiledCase]:
    """A case with its PTX edited."""
    case = next(c for c in CASES if c.id == case_id)
    compiled = compile_case(case, capability)
    ptx, changed = re.subn(pattern, replacement, compiled.ptx, flags=re.M)
    assert changed
    return case, replace(compiled, ptx=ptx)


MATMUL = "matmul-bf16-64x64x32-w4-s3"


@pytest.mark.parametrize(
    ("case_id", "pattern", "replacement", "detector"),
    [
        # The second barrier is between reading the maxima and writing the sums to the same place.
        ("row_softmax-fp32-5-781-w4", r"(?s)(bar\.sync.*?)bar\.sync\s+0;", r"\1", "race"),
        (MATMUL, r"^\s*bar\.sync.*$", "", "asynchronous copy|race|uninitialised"),
        (MATMUL, r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 7", "asynchronous copy"),
        ("vector_add-fp32-3000-512-w4", r"setp\.lt\.s32", "setp.ge.s32", "bounds"),
    ],
    ids=["softmax-no-barrier", "matmul-no-barrier", "matmul-no-wait", "vector_add-mask"],
)
def test_a_detector_finds_the_fault(
    case_id: str, pattern: str, replacement: str, detector: str
) -> None:
    case, compiled = faulty(case_id, pattern, replacement)
    for seed in SEEDS:
        with pytest.raises(EmulatorError) as error:
            launch(compiled, case.problem(seed=1), 80, seed)
        assert re.search(detector, error.value.kind)


WGMMA, TMA = "matmul-bf16-128x128x32-w4-s3", "matmul_tma-bf16-64x64x64-w4-s3"
FLASH = "flash_tma-bf16-full-d64-64x64-w4-s3"
WAIT, EXPECT = r"wgmma\.wait_group\.sync\.aligned\s+", r"(arrive\.expect_tx.*\]), \d+"


@pytest.mark.parametrize(
    ("case_id", "pattern", "replacement", "detector"),
    [
        (WGMMA, r"^\s*fence\.proxy\.async.*$", "", "missing proxy fence"),
        (WGMMA, r"^\s*wgmma\.fence.*$", "", "missing wgmma.fence"),
        (WGMMA, WAIT + "0", "wgmma.wait_group.sync.aligned 5", "wgmma not waited for"),
        # The next cp.async overwrites what the wgmma before last still reads.
        (WGMMA, WAIT + "1", "wgmma.wait_group.sync.aligned 5", "shared-memory race"),
        (FLASH, WAIT + r"\d", "wgmma.wait_group.sync.aligned 5", "wgmma not waited for"),
        (TMA, EXPECT, r"\1, 4096", "mbarrier misuse"),
        (TMA, EXPECT, r"\1, 32768", "deadlock"),
        (TMA, r"^\s*fence\.proxy\.async.*$", "", "missing proxy fence"),
        (TMA, r"bulk\.wait_group\.read\s+0", "bulk.wait_group.read 5", "shared-memory race"),
        (TMA, r"mbarrier\.try_wait.*", "setp.eq.u32 complete, 0, 0;", "asynchronous copy|race"),
    ],
)
def test_a_detector_finds_the_fault_on_sm_90(
    case_id: str, pattern: str, replacement: str, detector: str
) -> None:
    case, compiled = faulty(case_id, pattern, replacement, 90)
    for seed in SEEDS:
        with pytest.raises(EmulatorError) as error:
            launch(compiled, case.problem(seed=1), 90, seed)
        assert re.search(detector, error.value.kind)


@pytest.mark.parametrize(
    ("case_id", "pattern", "replacement"),
    [
        (MATMUL, r"(mma\.sync.*?), \{ (%r\d+), (%r\d+) \}", r"\1, { \3, \2 }"),
        (MATMUL, r"ldmatrix(.*)\.trans", r"ldmatrix\1"),
        ("linear_recurrence-3-1000-w4", r"(shfl\.sync\.up\.b32.*), 4,", r"\1, 2,"),
    ],
    ids=["mma-operand-order", "ldmatrix-trans", "shfl-distance"],
)
def test_a_wrong_kernel_gives_a_wrong_answer(case_id: str, pattern: str, replacement: str) -> None:
    case, compiled = faulty(case_id, pattern, replacement)
    problem = case.problem(seed=1)
    launch(compiled, problem, 80, seed=0)
    assert problem.error()[0] > 1
