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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from bench import sass
from bench.architectures import EXP2_PER_CLOCK, L2_BYTES_PER_CLOCK, WARP_SCHEDULERS, Architecture
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
    """A metric that must not exceed a limit."""

    metric: str  # a key of `ratios`
    limit: float
    arch: str = ""  # the one it is meant for; "": all


@dataclass(frozen=True)
class Case:
    """A kernel at a shape.

    plan, run: (architecture, units) -> what would be launched; its counters on the emulator.
    compulsory_bytes: what must be read and written however often it is reused on the chip.
    flop: of the matrix products, by definition (causal: visible pairs only).
    work: launch -> relative work of each block in launch order; None: all blocks have the same.
    min_units: fewest units to emulate when the whole is larger than `exact_units`.
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
    min_units: int = 1
    exact_units: int = 2

    @property
    def id(self) -> str:
        return f"{self.group}/{self.kernel}/{self.shape}"

    def cost(self, arch: str) -> float:
        """Warp-instructions that `measure` executes, roughly: 4 per MMA, 20 per KB."""
        sample = sample_units(self, arch)
        share = 1.0 if sample is None else 3 * sample / self.units
        return share * (self.flop / 1024 + self.compulsory_bytes / 50)


@dataclass(frozen=True)
class Measured:
    """Counts of the whole problem; `emulated_units` were executed, all if equal to case.units."""

    plan: Plan
    binary: Binary
    counters: Counters
    emulated_units: tuple[int, ...]


# ----------------------------------------------------------------------------------------- counting


def measure(case: Case, arch: str) -> Measured:
    """Raises ValueError if no two smaller problems are launched as the whole one is."""
    whole = case.plan(arch, case.units)
    sample = sample_units(case, arch)
    if sample is None:
        counters, emulated = case.run(arch, case.units), (case.units,)
    else:
        emulated = (sample, 2 * sample)
        counters = extrapolate(*(case.run(arch, n) for n in emulated), sample, case.units)
    return Measured(whole, case.binary(arch, whole), counters, emulated)


def sample_units(case: Case, arch: str) -> int | None:
    """The fewest units n such that n and 2 n are launched as case.units are; None: run it whole."""
    if case.units <= case.exact_units:
        return None
    whole = case.plan(arch, case.units)
    for n in range(case.min_units, case.units // 3 + 1):
        if case.units % n:
            continue
        small, double = (case.plan(arch, k) for k in (n, 2 * n))
        grids = [math.prod(p.grid) for p in (small, double, whole)]
        straight = grids[2] == grids[0] + (grids[1] - grids[0]) * (case.units - n) // n
        if small.kernel == double.kernel == whole.kernel and straight:
            return n
    return None


def extrapolate(small: Counters, double: Counters, n: int, units: int) -> Counters:
    """Counters at `units` from those at n and 2 n, all being affine in the number of units."""

    def at(a: int, b: int) -> int:
        total, rest = divmod((b - a) * (units - n), n)
        if rest:
            raise ValueError(f"not affine: {a} for {n} units, {b} for {2 * n}, no integer {units}")
        return a + total

    def classes(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
        return {name: at(a[name], b[name]) for name in a}

    numbers = {
        f.name: at(getattr(small, f.name), getattr(double, f.name))
        for f in fields(Counters)
        if f.name not in ("issued", "lanes")
    }
    return Counters(
        classes(small.issued, double.issued), classes(small.lanes, double.lanes), **numbers
    )


def balance(work: Iterable[float], sms: int) -> float:
    """Work of the busiest SM over the mean, when each SM takes the next block as it gets free."""
    loads = [0.0] * sms
    total = 0.0
    for w in work:
        heapq.heapreplace(loads, loads[0] + w)
        total += w
    return max(loads) * sms / total if total else 1.0


def mma_flop(ptx: str) -> int:
    """FLOP of the one mma.sync shape that a kernel uses; 0 if it has none."""
    shapes = set(re.findall(r"\bmma\.sync\.\S*?\.m(\d+)n(\d+)k(\d+)\.", ptx))
    if len(shapes) > 1:
        raise ValueError(f"mma.sync of several shapes: {sorted(shapes)}")
    return 2 * math.prod(map(int, shapes.pop())) if shapes else 0


# ---------------------------------------------------------------------------------------- modelling

RESOURCES = ("tensor pipe", "exp2 unit", "issue slots", "shared memory", "L2", "DRAM")


def issued(c: Counters) -> int:
    """Warp-instructions, PTX mov (with parameter loads) left out: ptxas deletes most of them."""
    return c.instructions - c.issued["mov"]


def times(m: Measured, case: Case, gpu: Architecture) -> dict[str, float]:
    """Microseconds that each resource is busy; of those that an SM has, on the busiest SM."""
    c = m.counters
    work = [1.0] * math.prod(m.plan.grid) if case.work is None else case.work(m.plan)
    busiest = balance(work, gpu.sms) / gpu.sms
    clocks = {
        "tensor pipe": c.issued["mma"] * m.binary.mma_flop / gpu.tensor_flop,
        "exp2 unit": c.lanes["mufu"] / EXP2_PER_CLOCK,
        "issue slots": issued(c) / WARP_SCHEDULERS,
        "shared memory": c.shared_wavefronts,
    }
    result = {k: v * busiest / (gpu.clock_ghz * 1e3) for k, v in clocks.items()}
    requested = (c.read_sectors + c.write_sectors) * SECTOR
    moved = (c.unique_read_sectors + c.unique_write_sectors) * SECTOR
    port = requested * busiest / (L2_BYTES_PER_CLOCK * gpu.clock_ghz * 1e3)
    result["L2"] = max(requested / (gpu.l2_tb_s * 1e6), port)
    result["DRAM"] = moved / (gpu.dram_tb_s * 1e6)
    return result


def ratios(m: Measured, case: Case, gpu: Architecture) -> dict[str, float | None]:
    """The metrics that bars are about. None: the kernel does not use the resource."""
    c = m.counters
    tensor = c.issued["mma"] * m.binary.mma_flop / gpu.tensor_flop  # clocks of one SM
    moved = (c.unique_read_sectors + c.unique_write_sectors) * SECTOR
    requests, sectors = c.read_requests + c.write_requests, c.read_sectors + c.write_sectors
    per_hmma = m.binary.loop.instructions / m.binary.loop.hmma if m.binary.loop else None
    hmma_clocks = m.binary.mma_flop / gpu.tensor_flop
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
    }


def compiled(name: str, ptx: str, registers: int, smem_bytes: int, binary: Path) -> Binary:
    """`ptx`: of this entry alone. `binary`: the cubin or fatbin that holds it."""
    code = sass.functions(binary)[name] if sass.find_tool("cuobjdump") else []
    return Binary(registers, smem_bytes, mma_flop(ptx), sass.main_loop(code) if code else None)
