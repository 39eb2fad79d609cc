"""From counts to modelled times: what a launch on the emulator costs of each resource of a GPU.

A `Case` is a kernel at a shape. Its problem is made of equal units (heads, sequences, columns), and
every count is affine in their number: a + b * units. So a problem too large to emulate is counted
at two smaller numbers of units (`measure`), which fixes a and b exactly; each unit holds the same
numbers, so that branches on data do not break the rule. The kernel, block and shared memory must be
those that the plan takes for the whole problem.

Nothing here has run on a GPU: `times` gives for each resource the time that the counted work takes
at the published rate, and a kernel takes at least the largest of them.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from bench import sass
from minitron_kernels.architectures import (
    EXP2_PER_CLOCK,
    L2_BYTES_PER_CLOCK,
    WARP_SCHEDULERS,
    Architecture,
)
from tests.emulator import Counters

SECTOR = 32  # bytes
Dim3 = tuple[int, int, int]


@dataclass(frozen=True)
class Plan:
    """What would be launched."""

    entry: str
    grid: Dim3
    block: Dim3
    smem_bytes: int  # dynamic
    cluster: int = 1  # blocks of a cluster

    @property
    def kernel(self) -> tuple[str, Dim3, int]:
        """All but the grid."""
        return self.entry, self.block, self.smem_bytes


@dataclass(frozen=True)
class Binary:
    """What the compiler made of an entry."""

    registers: int
    smem_bytes: int  # static
    mma_flop: int  # of one mma.sync; 0: it has none
    loop: sass.MainLoop | None


@dataclass(frozen=True)
class Bar:
    """A metric that must not exceed a limit, or, with is_least, not fall below it."""

    metric: str  # a key of `ratios`
    limit: float
    arch: str = ""  # the one it is meant for; "": all
    entry: str = ""  # what an entry's name must hold
    is_least: bool = False

    def applies(self, arch: str, entry: str) -> bool:
        return self.arch in ("", arch) and self.entry in entry


@dataclass(frozen=True)
class Epilogue:
    """The ends of tiles in sm_90's products: one of a block's two warpgroups writes its half while
    the other one multiplies, as long as that has something left.

    run: (architecture, stages) -> counters of the problem with so few stages along k.
    tiles: launch -> those of `run`, and those of the problem's busiest block.
    lead: launch -> clocks that the tensor pipe has left to do when the first warpgroup is done.
    latency: clocks that it waits for L2 while it writes.
    reads: whether it reads then; else it has asked for all when the tile began.
    """

    run: Callable[[str, int], Counters]
    tiles: Callable[[Plan], tuple[int, int]]
    lead: Callable[[Plan], float]
    latency: float
    reads: bool


@dataclass(frozen=True)
class Ends:
    """What a launch does besides the stages of its tiles."""

    instructions: int  # of warps that multiply, from a tile's last MMA to the next one's first
    exp2_lanes: int
    write_requests: int
    write_sectors: int
    read_sectors: int


@dataclass(frozen=True)
class Case:
    """A kernel at a shape.

    plan, run: (architecture, units) -> what would be launched; its counters on the emulator.
    compulsory_bytes: what must be read and written however often it is reused on the chip.
    flop: of the matrix products, by definition (causal: visible pairs only).
    work: launch -> relative work of each block in launch order; None: all blocks have the same.
    exact_units: a problem of no more units is run whole.
    copies: plan -> blocks of a cluster, on average, that a byte from L2 goes to; None: all.
    mma_rate: FLOP per clock of its MMAs over those of bf16: 2 for FP8.
    epilogue: None: not looked at.
    """

    group: str
    kernel: str
    shape: str
    units: int
    plan: Callable[[str, int], Plan]
    run: Callable[[str, int], Counters]
    binary: Callable[[str, Plan], Binary]
    compulsory_bytes: int
    flop: int = 0
    archs: Sequence[str] = ("80", "89")
    bars: Sequence[Bar] = ()
    work: Callable[[Plan], Sequence[float]] | None = None
    exact_units: int = 2
    copies: Callable[[Plan], float] | None = None
    mma_rate: int = 1
    epilogue: Epilogue | None = None

    def tensor_clocks(self, counters: Counters, binary: Binary, gpu: Architecture) -> float:
        """Of one SM that does everything."""
        return counters.issued["mma"] * binary.mma_flop / (gpu.tensor_flop * self.mma_rate)

    @property
    def id(self) -> str:
        return f"{self.group}/{self.kernel}/{self.shape}"

    def cost(self, arch: str) -> float:
        """Warp-instructions that `measure` executes, roughly: 4 per MMA, 20 per KB."""
        share = sum(sample_units(self, arch)) / self.units
        return share * (self.flop / 1024 + self.compulsory_bytes / 50)


@dataclass(frozen=True)
class Measured:
    """Counts of the whole problem; `emulated_units` were executed, all if equal to case.units."""

    plan: Plan
    binary: Binary
    counters: Counters
    emulated_units: tuple[int, ...]
    ends: Ends | None = None  # where the case has an epilogue to look at


# ----------------------------------------------------------------------------------------- counting


def measure(case: Case, arch: str) -> Measured:
    whole = case.plan(arch, case.units)
    emulated = sample_units(case, arch)
    counters = [case.run(arch, n) for n in emulated]
    total = counters[0] if len(counters) == 1 else extrapolate(*counters, emulated, case.units)
    ends = case_ends(case.epilogue, arch) if case.epilogue and arch == "90a" else None
    return Measured(whole, case.binary(arch, whole), total, emulated, ends)


def case_ends(epilogue: Epilogue, arch: str) -> Ends:
    """By launches of one stage and of two."""
    one, two = (epilogue.run(arch, stages) for stages in (1, 2))

    def rest(count: Callable[[Counters], int]) -> int:
        return 2 * count(one) - count(two)

    return Ends(
        rest(lambda c: c.between_mmas),
        rest(lambda c: c.lanes["mufu"]),
        rest(lambda c: c.write_requests),
        rest(lambda c: c.write_sectors),
        rest(lambda c: c.read_sectors),
    )


def sample_units(case: Case, arch: str) -> tuple[int, ...]:
    """The two least numbers of units that are launched as case.units are, and whose line meets it;
    (case.units,) if the whole is small, or these would be no less work."""
    whole = case.plan(arch, case.units)
    same: dict[int, int] = {}  # units -> blocks
    for n in range(1, case.units if case.units > case.exact_units else 0):
        plan = case.plan(arch, n)
        if plan.kernel != whole.kernel:
            continue
        same[n] = math.prod(plan.grid)
        for first in same:
            steps, rest = divmod(case.units - first, n - first) if first < n else (0, 1)
            blocks = same[first] + (same[n] - same[first]) * steps
            if not rest and blocks == math.prod(whole.grid) and first + n < case.units:
                return first, n
    return (case.units,)


def extrapolate(first: Counters, second: Counters, n: tuple[int, ...], units: int) -> Counters:
    """Counters at `units` from those at n[0] and n[1], all being affine in the number of units."""

    def at(a: int, b: int) -> int:
        total, rest = divmod((b - a) * (units - n[0]), n[1] - n[0])
        if rest:
            raise ValueError(f"not affine: {a} for {n[0]} units, {b} for {n[1]}")
        return a + total

    def classes(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
        return {name: at(a[name], b[name]) for name in a}

    numbers = {
        f.name: at(getattr(first, f.name), getattr(second, f.name))
        for f in fields(Counters)
        if f.name not in ("issued", "lanes")
    }
    issued, lanes = classes(first.issued, second.issued), classes(first.lanes, second.lanes)
    return Counters(issued, lanes, **numbers)


def balance(work: Iterable[float], sms: int) -> float:
    """Work of the busiest SM over the mean, when each SM takes the next block as it gets free."""
    loads = [0.0] * sms
    total = 0.0
    for w in work:
        heapq.heapreplace(loads, loads[0] + w)
        total += w
    return max(loads) * sms / total if total else 1.0


def mma_flop(ptx: str) -> int:
    """A warp's FLOP of an MMA of a kernel, a quarter of the warpgroup's if it is wgmma; 0 if it has
    none. Of two kinds in equal numbers, as FP8's attention has them, the mean."""
    pattern = r"\b(mma\.sync|wgmma\.mma_async)\.\S*?\.m(\d+)n(\d+)k(\d+)\."
    counts = Counter(re.findall(pattern, ptx))
    if len(set(counts.values())) > 1:
        raise ValueError(f"MMAs of several shapes: {sorted(counts)}")
    flop = [
        2 * math.prod(map(int, sizes)) // (1 if kind == "mma.sync" else 4)
        for kind, *sizes in counts
    ]
    return sum(flop) // len(flop) if flop else 0


# ---------------------------------------------------------------------------------------- modelling

RESOURCES = ("tensor pipe", "exp2 unit", "issue slots", "shared memory", "L2", "DRAM")


def issued(c: Counters) -> int:
    """Warp-instructions, PTX mov (with parameter loads) left out: ptxas deletes most of them."""
    return c.instructions - c.issued["mov"]


ALONE = 2  # clocks that an instruction of the only warp of a scheduler takes
ROWS = 8  # that a request of an epilogue goes to, one at a time


def epilogue_clocks(m: Measured, case: Case) -> float:
    """A warpgroup's for the end of a tile, each of its four warps on a scheduler of its own."""
    if case.epilogue is None or m.ends is None:
        return 0.0
    sectors = m.ends.write_sectors + m.ends.read_sectors * case.epilogue.reads
    work = (
        ALONE * m.ends.instructions / WARP_SCHEDULERS,
        m.ends.exp2_lanes / EXP2_PER_CLOCK,
        ROWS * m.ends.write_requests,
        sectors * SECTOR / L2_BYTES_PER_CLOCK,
    )
    return max(work) / (2 * case.epilogue.tiles(m.plan)[0]) + case.epilogue.latency


def uncovered_clocks(m: Measured, case: Case) -> float:
    """Of the busiest block's epilogues: those in which its tensor cores have nothing to do."""
    if case.epilogue is None or m.ends is None:
        return 0.0
    clocks = epilogue_clocks(m, case)
    between = case.epilogue.tiles(m.plan)[1] - 1  # tiles; nothing follows the last one
    return between * max(0.0, clocks - case.epilogue.lead(m.plan)) + clocks


def times(m: Measured, case: Case, gpu: Architecture) -> dict[str, float]:
    """Microseconds that each resource is busy; of those that an SM has, on the busiest SM. The
    tensor pipe's with the epilogues in which it has nothing to do."""
    c = m.counters
    work = [1.0] * math.prod(m.plan.grid) if case.work is None else case.work(m.plan)
    busiest = balance(work, gpu.sms) / gpu.sms
    clocks = {
        "tensor pipe": case.tensor_clocks(c, m.binary, gpu),
        "exp2 unit": c.lanes["mufu"] / EXP2_PER_CLOCK,
        "issue slots": issued(c) / WARP_SCHEDULERS,
        "shared memory": c.shared_wavefronts,
    }
    result = {k: v * busiest / (gpu.clock_ghz * 1e3) for k, v in clocks.items()}
    result["tensor pipe"] += uncovered_clocks(m, case) / (gpu.clock_ghz * 1e3)
    requested = (c.read_sectors + c.write_sectors) * SECTOR
    moved = (c.unique_read_sectors + c.unique_write_sectors) * SECTOR
    # What L2 gives once to several blocks of a cluster passes the port of each.
    copies = case.copies(m.plan) if case.copies else m.plan.cluster
    port = requested * copies * busiest / (L2_BYTES_PER_CLOCK * gpu.clock_ghz * 1e3)
    result["L2"] = max(requested / (gpu.l2_tb_s * 1e6), port)
    result["DRAM"] = moved / (gpu.dram_tb_s * 1e6)
    return result


def ratios(m: Measured, case: Case, gpu: Architecture) -> dict[str, float | None]:
    """The metrics that bars are about. None: the kernel does not use the resource."""
    c = m.counters
    tensor = case.tensor_clocks(c, m.binary, gpu)
    moved = (c.unique_read_sectors + c.unique_write_sectors) * SECTOR
    requests, sectors = c.read_requests + c.write_requests, c.read_sectors + c.write_sectors
    per_hmma = m.binary.loop.instructions / m.binary.loop.hmma if m.binary.loop else None
    hmma_clocks = m.binary.mma_flop / (gpu.tensor_flop * case.mma_rate)
    return {
        "dram": moved / case.compulsory_bytes,
        # 1: every byte of a sector was asked for; below: lanes share bytes (broadcast).
        "sectors": sectors * SECTOR / (c.read_bytes + c.write_bytes),
        "sectors_per_request": sectors / requests,
        "wavefronts": c.shared_wavefronts / c.shared_wavefronts_min
        if c.shared_wavefronts_min
        else None,
        "issue": issued(c) / WARP_SCHEDULERS / tensor if tensor else None,
        "issue_sass": per_hmma / WARP_SCHEDULERS / hmma_clocks if per_hmma else None,
        "sass_per_hmma": per_hmma,
        "exp2": c.lanes["mufu"] / EXP2_PER_CLOCK / tensor if tensor else None,
        "shared": c.shared_wavefronts / tensor if tensor else None,
        **bound_ratios(m, case, gpu),
    }


def bound_ratios(m: Measured, case: Case, gpu: Architecture) -> dict[str, float | None]:
    """The slowest of the other resources over the tensor pipe, and the share of the tensor pipe's
    peak that useful work has at the bound."""
    clocks = times(m, case, gpu)
    tensor = clocks.pop("tensor pipe")
    if not tensor:
        return {"others": None, "peak": None}
    others = max(clocks.values())
    useful = case.flop / (gpu.tensor_tflop_s * case.mma_rate * 1e6)
    return {"others": others / tensor, "peak": useful / max(others, tensor)}


def compiled(
    name: str,
    ptx: str,
    registers: int,
    smem_bytes: int,
    binary: Path,
    loop: Callable[[sass.MainLoop], bool] | None = None,
) -> Binary:
    """`ptx`: of this entry alone. `binary`: the cubin or fatbin that holds it. `loop`: as
    sass.main_loop's `which`."""
    code = sass.functions(binary)[name] if sass.find_tool("cuobjdump") else []
    found = sass.main_loop(code, loop) if code else None
    return Binary(registers, smem_bytes, mma_flop(ptx), found)
