"""The tables of docs/megakernel.md: what a decode step on an H100 loses between its kernels.

    python -m bench.megakernel

The emulator executes the sm_90 kernels and counts; bytes over bandwidth is the time of the stream,
instructions outside it and the latencies of `Assumed` are what DRAM may stand still for. Nothing
here has run on a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import click

from bench.accounting import Case, issued
from bench.cases import MATRICES, decode, linear, native_binary
from bench.cases_quant import linear_quant
from bench.shapes import MINITRON
from minitron_kernels import native
from minitron_kernels.architectures import ARCHITECTURES, SMEM_RESERVED, Architecture

ARCH = "90a"
GPU = ARCHITECTURES["H100"]
CONTEXT = 1024
LAYERS = MINITRON.num_hidden_layers


@dataclass(frozen=True)
class Assumed:
    """Latencies, us. That of a graph is reported by others for an H100, the rest is believed."""

    graph: float = 1.3  # from one kernel of a graph to the next
    pdl: float = 0.7  # from the end of a kernel to griddepcontrol.wait's return in the next
    barrier: float = 1.0  # of all blocks of a persistent kernel
    dram: float = 0.7  # of a load from DRAM
    l2: float = 0.25
    clocks: float = 6  # of an instruction outside the stream: few warps, each waits for itself
    efficiency: float = 0.93  # of DRAM's bandwidth that a long stream reaches


@dataclass(frozen=True)
class Kernel:
    """A launch of the step."""

    name: str
    bytes: float  # from and to DRAM
    once: float  # instructions of a warp outside its stream
    smem: int  # of a block
    threads: int
    registers: int
    blocks: int

    def per_sm(self, gpu: Architecture) -> int:
        """Blocks on the fullest SM when the kernel runs alone."""
        fit = gpu.occupancy(self.threads, self.registers, self.smem)
        return min(fit, -(-self.blocks // gpu.sms))


# ---- counts


def per_warp(case: Case) -> tuple[float, float]:
    """Instructions and MMAs of a warp, on average."""
    plan = case.plan(ARCH, case.units)
    warps = math.prod(plan.grid) * math.prod(plan.block) // 32
    counters = case.run(ARCH, case.units)
    return issued(counters) / warps, counters.issued["mma"] / warps


def per_mma(short: Case, long: Case) -> float:
    """Instructions for each MMA of the stream, from two lengths of it."""
    (a, m), (b, n) = per_warp(short), per_warp(long)
    return (b - a) / (n - m)


def kernel(name: str, case: Case, slope: float) -> Kernel:
    count, mmas = per_warp(case)
    plan = case.plan(ARCH, case.units)
    binary = native_binary(ARCH, plan)
    smem = plan.smem_bytes + binary.smem_bytes
    return Kernel(
        name, case.compulsory_bytes, max(count - slope * mmas, 0), smem, math.prod(plan.block),
        binary.registers, math.prod(plan.grid),
    )  # fmt: skip


def attention() -> Kernel:
    """The stream is counted in 32 splits of a sequence, at two lengths."""
    slope = per_mma(decode(1, 32 * 288, False), decode(1, 32 * 576, False))
    return kernel("attention_decode", decode(1, CONTEXT, False), slope)


def layer_of(products: Sequence[Kernel]) -> list[Kernel]:
    """The launches of a layer, then the LM head; products: qkv, o, gate_up, down, lm_head."""
    return [products[0], attention(), *products[1:]]


def dense() -> list[Kernel]:
    """What grows with k is the stream, a norm in it too. The head has the kernel of o: only its
    bytes matter, once a token."""
    found = []
    for name in ("qkv", "o", "gate_up", "down"):
        n, k = MATRICES[name]
        case = linear(name, n, k, 1)
        found.append(kernel(name, case, per_mma(case, linear(name, n, 2 * k, 1))))
    qkv, o, gate_up, down = found
    head = replace(o, name="lm_head", bytes=2 * math.prod(MATRICES["lm_head"]))
    return layer_of([qkv, o, gate_up, down, head])


def quantised() -> list[Kernel]:
    """Q4_K, and a head of Q6_K. qkv, too, has the kernel of o here, and its own bytes."""
    cases = {name: linear_quant(name, "Q4_K", 1) for name in ("o", "gate_up", "down")}
    slope = per_mma(cases["o"], cases["down"])
    o, gate_up, down = (kernel(name, case, slope) for name, case in cases.items())
    qkv = replace(o, name="qkv", bytes=o.bytes * MATRICES["qkv"][0] / MATRICES["o"][0])
    head = replace(o, name="lm_head", bytes=math.prod(MATRICES["lm_head"]) * 210 / 256)
    return layer_of([qkv, o, gate_up, down, head])


# ---- time


def idle(now: Kernel, after: Kernel, how: str, assumed: Assumed) -> float:
    """How long DRAM has nothing to do from the last byte of a kernel to the first of the next, us.

    Half of what a kernel executes outside its stream comes before, half after it. The last loads
    of a kernel end one by one: half a latency is lost.
    """
    clock = GPU.clock_ghz * 1e3
    tail = assumed.dram / 2 + now.once / 2 * assumed.clocks / clock
    head = assumed.l2 + after.once / 2 * assumed.clocks / clock  # x, and what is made of it
    rate = GPU.dram_tb_s * assumed.efficiency * 1e6  # bytes per us
    ring = after.per_sm(GPU) * after.smem * GPU.sms
    if how in ("graph", "PDL"):
        gap = assumed.graph if how == "graph" else assumed.pdl
        # The ring fills while x is made ready.
        return tail + gap + assumed.dram + max(0.0, head - ring / rate)
    if how == "PDL, prefetch":
        # What a block may ask for before it waits: its ring, where there is room beside the last
        # blocks of the kernel before.
        room = GPU.smem_per_sm - now.per_sm(GPU) * (now.smem + SMEM_RESERVED)
        beside = min(after.per_sm(GPU), max(0, room // (after.smem + SMEM_RESERVED)))
        if beside == 0:
            return idle(now, after, "PDL", assumed)
        early = min(beside * after.smem * GPU.sms, after.bytes)
        return max(0.0, tail + assumed.pdl + head - early / rate)
    early = min(160e3 * GPU.sms, after.bytes)  # "one kernel": all of the SM is its ring
    return max(0.0, tail + assumed.barrier + head - early / rate)


HOW = ("graph", "PDL", "PDL, prefetch", "one kernel")


def step(layer: Sequence[Kernel], how: str, assumed: Assumed) -> tuple[float, float]:
    """Time of a token and, of it, that in which DRAM stands still, us."""
    *repeated, head = layer
    kernels = [*LAYERS * repeated, head]
    rate = GPU.dram_tb_s * assumed.efficiency * 1e6
    busy = sum(k.bytes for k in kernels) / rate
    lost = sum(idle(a, b, how, assumed) for a, b in itertools.pairwise(kernels))
    # The embedding, the first layer's start and the sampling: three boundaries more.
    lost += 3 * idle(head, repeated[0], how, assumed)
    return busy + lost, lost


def kernel_lines(layer: Sequence[Kernel]) -> Iterator[str]:
    yield "| launch | DRAM, MB | stream, us | instructions of a warp outside it | rings, MB |"
    yield "|---|---|---|---|---|"
    for k in layer:
        ring = k.per_sm(GPU) * k.smem * GPU.sms
        yield (
            f"| {k.name} | {k.bytes / 1e6:.1f} | {k.bytes / GPU.dram_tb_s / 1e6:.1f} | "
            f"{k.once:.0f} | {ring / 1e6:.1f} |"
        )


def step_lines(layer: Sequence[Kernel], assumed: Assumed) -> Iterator[str]:
    yield "| how | DRAM idle, us a boundary | us a token | ms a token | share of bandwidth |"
    yield "|---|---|---|---|---|"
    *repeated, head = layer
    boundaries = LAYERS * len(repeated) + 3
    total = LAYERS * sum(k.bytes for k in repeated) + head.bytes
    for how in HOW:
        time, lost = step(layer, how, assumed)
        share = total / time / (GPU.dram_tb_s * 1e6)
        yield (
            f"| {how} | {lost / boundaries:.2f} | {lost:.0f} | {time / 1e3:.2f} | "
            f"{100 * share:.0f} % |"
        )


def sensitivity_lines(layers: dict[str, Sequence[Kernel]]) -> Iterator[str]:
    savings = " | ".join(f"{name}: one kernel saves" for name in layers)
    yield f"| barrier, us | PDL, us | {savings} |"
    yield "|---|---" + "|---" * len(layers) + "|"
    for barrier in (0.7, 1.0, 2.0):
        for pdl in (0.4, 0.7, 1.2):
            assumed = Assumed(barrier=barrier, pdl=pdl)
            cells = []
            for layer in layers.values():
                two, one = (step(layer, how, assumed)[0] for how in HOW[-2:])
                cells.append(f"{two - one:.0f} us, {100 * (two - one) / two:.1f} %")
            yield f"| {barrier} | {pdl} | {' | '.join(cells)} |"


# What a block of attention_decode has in flight, and blocks of an SM (attn_decode_tiles.h): with
# the rings of sm_80 (cp.async), and those of sm_90 (TMA). KB of 1024 bytes.
RINGS = {"cp.async": (32, 3), "TMA": (80, 2)}


def attention_lines() -> Iterator[str]:
    """What a sequence's bytes in flight admit at a latency of 0.7 and 1 us, and the time."""
    yield (
        "| context, batch 1 | blocks | "
        + " | ".join(f"{name}: MB in flight | TB/s | us" for name in RINGS)
        + " |"
    )
    yield "|---|---" + "|---" * 3 * len(RINGS) + "|"
    for context in (1024, 2048, 4096, 8192, 32768):
        case = decode(1, context, False)
        blocks = math.prod(case.plan(ARCH, 1).grid)
        cells = []
        for kilobytes, per_sm in RINGS.values():
            flying = min(blocks, per_sm * GPU.sms) * kilobytes * 1024
            rates = [min(flying / us / 1e6, GPU.dram_tb_s) for us in (0.7, 1.0)]
            times = [case.compulsory_bytes / rate / 1e6 for rate in rates]
            cells.append(f"{flying / 1e6:.1f}")
            cells += [" ... ".join(f"{x:.2f}" for x in pair) for pair in (rates, times)]
        yield f"| {context} | {blocks} | {' | '.join(cells)} |"


@click.command(help=__doc__)
def main() -> None:
    if ARCH not in native.build_info()["archs"]:
        raise click.ClickException(f"sm_{ARCH} is not in this build")
    layers = {"bfloat16": dense(), "Q4_K": quantised()}
    for name, layer in layers.items():
        click.echo(f"{name}, batch 1, {CONTEXT} keys:\n")
        click.echo("\n".join([*kernel_lines(layer), "", *step_lines(layer, Assumed()), ""]))
    click.echo("\n".join([*sensitivity_lines(layers), "", *attention_lines()]))


if __name__ == "__main__":
    main()
