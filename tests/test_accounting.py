"""bench/accounting.py and the page that it writes: peaks, the SASS reader, scaling, the model."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from bench import accounting, cases, cases_quant, cases_triton, eager, megakernel, modelled, sass
from bench.accounting import Bar, Binary, Case, Ends, Epilogue, Plan
from bench.case_table import all_cases
from minitron_kernels import native
from minitron_kernels.architectures import ARCHITECTURES
from tests import native_abi as abi
from tests.emulator import Counters
from tests.native_emulator import ARCHS, BUILT

RESULTS = json.loads(modelled.RESULTS.read_text())
COMMITTED = {(row["case"], row["arch"]): row for row in RESULTS["rows"]}
CASES = {case.id: case for case in all_cases()}
needs_kernels = pytest.mark.skipif("80" not in BUILT, reason="sm_80 is not in this build")


# --------------------------------------------------------------------------------- architectures

PEAKS = {  # dense bf16 TFLOP/s, TB/s, SMs, as published
    "A100": (312, 2.04, 108),
    "L40S": (362, 0.864, 142),
    "RTX 4090": (165, 1.008, 128),
    "H100": (989, 3.35, 132),
    "H200": (989, 4.8, 132),
    "B200": (2250, 8.0, 148),
}


@pytest.mark.parametrize("name", PEAKS)
def test_published_peaks(name: str) -> None:
    gpu = ARCHITECTURES[name]
    tflop_s, tb_s, sms = PEAKS[name]
    assert gpu.tensor_tflop_s == pytest.approx(tflop_s, rel=0.003)
    assert (gpu.dram_tb_s, gpu.sms) == (tb_s, sms)


def test_architectures_agree_with_the_devices_of_the_plans() -> None:
    for arch, name in zip(abi.DEVICES, ("A100", "L40S", "H100", "B200"), strict=True):
        gpu = ARCHITECTURES[name]
        assert (gpu.arch, gpu.sms, gpu.smem_per_block) == (arch, *abi.DEVICES[arch][1:])


@pytest.mark.parametrize(
    "threads, registers, smem, blocks",
    [
        (256, 255, 96 << 10, 1),  # registers: 8 warps of 256 x 32
        (128, 168, 0, 3),
        (128, 128, 0, 4),
        (128, 127, 60 << 10, 2),  # 164 KB / 61 KB
        (1024, 32, 0, 2),  # threads
        (32, 16, 0, 32),  # blocks
    ],
)
def test_occupancy_of_an_a100(threads: int, registers: int, smem: int, blocks: int) -> None:
    assert ARCHITECTURES["A100"].occupancy(threads, registers, smem) == blocks


# ------------------------------------------------------------------------------------------ SASS

# A loop of 7 instructions, of which 2 are skipped unless P1 holds; 1 more stands behind the exit
# and jumps back into the loop. A longer, masked copy follows.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;       /* 0x0a00 */
                                                                /* 0x000fe400078e00ff */
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/              @!P1 BRA 0x60 ;
        /*0040*/                   FMUL R8, R8, R3 ;
        /*0050*/                   FMUL R9, R9, R3 ;
        /*0060*/               @P3 BRA 0x110 ;
        /*0070*/               @P0 BRA 0x10 ;
        /*0080*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0090*/                   FSEL R8, R8, R9, P4 ;
        /*00a0*/                   FSEL R9, R8, R9, P5 ;
        /*00b0*/                   FSEL R9, R8, R9, P5 ;
        /*00c0*/                   FSEL R9, R8, R9, P5 ;
        /*00d0*/                   FSEL R9, R8, R9, P5 ;
        /*00e0*/              @!P0 BRA 0x80 ;
        /*00f0*/                   EXIT ;
        /*0110*/                   FADD R1, R1, R2 ;
        /*0120*/                   BRA 0x70;
        /*0130*/                   BRA 0x130;
"""


def test_main_loop_of_a_listing() -> None:
    code = sass.parse(LISTING)
    assert len(code) == 19 and code[3].predicate == "@!P1" and code[3].target == 0x60
    loop = sass.main_loop(code)
    assert loop == sass.MainLoop(5, 4, 1, {"BRA": 3, "LDSM": 1, "HMMA": 1})


def test_an_hmma_that_some_turns_leave_out() -> None:
    """What counts is a turn with it."""
    loop = sass.main_loop(sass.parse(LISTING.replace("FMUL", "HMMA.16816.F32")))
    assert loop == sass.MainLoop(7, 2, 3, {"HMMA": 3, "BRA": 3, "LDSM": 1})


def test_a_loop_without_hmma_is_no_main_loop() -> None:
    assert sass.main_loop(sass.parse(LISTING.replace("HMMA", "FFMA"))) is None


def test_the_innermost_loop_counts() -> None:
    """With a loop around both, left by the compiler's other way to jump."""
    way_back = "@P2 CALL.REL.NOINC 0x130 ;\n        /*0100*/                   BRA 0x0 ;"
    loop = sass.main_loop(sass.parse(LISTING.replace("EXIT ;", way_back)))
    assert loop is not None and (loop.instructions, loop.hmma) == (5, 1)


# ------------------------------------------------------------------------------------- the model


def counters(**values: Any) -> Counters:
    zero = dict.fromkeys(("fp32", "mufu", "mma", "mov", "shared"), 0)
    issued = zero | values.pop("issued", {})
    lanes = {k: 32 * v for k, v in issued.items()}
    return Counters(issued, lanes, **values)


def case_of(plan: Plan, counts: Counters, binary: Binary, **options: Any) -> Case:
    return Case(
        "group", "kernel", "shape", 1, lambda *_: plan, lambda *_: counts, lambda *_: binary,
        **{"compulsory_bytes": 1 << 20, **options},
    )  # fmt: skip


def test_times_by_hand() -> None:
    """108 blocks on 108 SMs: 1000 MMAs of 2 clocks, 500 warps of exp2 (2 clocks), ... each."""
    counts = counters(
        issued={"mma": 108_000, "mufu": 54_000, "fp32": 108_000, "mov": 999_999},
        shared_wavefronts=108 * 700, shared_wavefronts_min=108 * 700,
        read_requests=1 << 10, read_sectors=1 << 16, read_bytes=1 << 21,
        write_requests=1, write_sectors=1 << 4, write_bytes=1 << 9, unique_read_sectors=1 << 15,
        unique_write_sectors=1 << 4,
    )  # fmt: skip
    plan, binary = Plan("entry", (108, 1, 1), (128, 1, 1), 0), Binary(128, 0, 4096, None)
    case = case_of(plan, counts, binary)
    gpu = ARCHITECTURES["A100"]
    measured = accounting.measure(case, "80")
    clock = gpu.clock_ghz * 1e3
    assert accounting.times(measured, case, gpu) == pytest.approx(
        {
            "tensor pipe": 2000 / clock,
            "exp2 unit": 1000 / clock,
            "issue slots": 2500 / 4 / clock,
            "shared memory": 700 / clock,
            "L2": max((2**16 + 16) * 32 / 7.2e6, (2**16 + 16) * 32 / 108 / 64 / clock),
            "DRAM": (2**15 + 16) * 32 / 2.04e6,
        }
    )
    metrics = accounting.ratios(measured, case, gpu)
    assert metrics["issue"] == pytest.approx(2500 / 4 / 2000)
    assert metrics["dram"] == pytest.approx((2**15 + 16) * 32 / 2**20)
    assert metrics["sectors"] == 1 and metrics["wavefronts"] == 1
    # Of others, exp2 takes longest; and of MMAs of 4096 FLOP each, half were asked for.
    useful = replace(case, flop=108_000 * 4096 // 2)
    metrics = accounting.ratios(measured, useful, gpu)
    assert metrics["others"] == pytest.approx(1000 / 2000)
    assert metrics["peak"] == pytest.approx(0.5)
    # One block more: some SM has two.
    more = case_of(replace(plan, grid=(109, 1, 1)), counts, binary)
    longer = accounting.times(accounting.measure(more, "80"), more, gpu)
    assert longer["tensor pipe"] == pytest.approx(2 * 108 / 109 * 2000 / clock)
    assert longer["DRAM"] == (2**15 + 16) * 32 / 2.04e6


def test_epilogues_by_hand() -> None:
    """Two tiles a block: 600 instructions of each of 8 warps, 1200 clocks, and 100 of waiting. The
    other warpgroup covers 1000 of the first tile's, nothing the last one's."""

    def run(_arch: str, stages: int) -> Counters:
        return counters(
            issued={"fp32": 264 * 8 * (900 + 50 * stages)}, between_mmas=264 * 8 * 600,
            read_sectors=264 * (400 + 48 * stages), write_sectors=264 * 2 * 300,
            write_requests=264 * 2 * 150,
        )  # fmt: skip

    epilogue = Epilogue(run, lambda _: (264, 2), lambda _: 1000.0, 100.0, reads=False)
    plan, binary = Plan("entry", (132, 1, 1), (384, 1, 1), 0), Binary(168, 0, 4096, None)
    case = case_of(plan, run("90a", 64), binary, epilogue=epilogue)
    gpu = ARCHITECTURES["H100"]
    measured = accounting.measure(case, "90a")
    assert measured.ends == Ends(264 * 8 * 600, 0, 264 * 2 * 150, 264 * 2 * 300, 264 * 400)
    assert accounting.epilogue_clocks(measured, case) == 1300
    assert accounting.uncovered_clocks(measured, case) == 300 + 1300
    told = accounting.times(measured, case, gpu)["tensor pipe"]
    assert told == pytest.approx(1600 / (gpu.clock_ghz * 1e3))
    covered = replace(case, epilogue=replace(epilogue, lead=lambda _: 1400.0))
    assert accounting.uncovered_clocks(measured, covered) == 1300
    assert accounting.measure(case, "80").ends is None

    def clocks(reads: bool = False, **ends: int) -> float:
        """Where something takes longer than instructions do."""
        longer = replace(measured, ends=replace(measured.ends, **ends))
        return accounting.epilogue_clocks(
            longer, replace(case, epilogue=replace(epilogue, reads=reads))
        )

    assert clocks(exp2_lanes=264 * 2 * 16 * 1400) == 1500
    assert clocks(write_requests=264 * 2 * 175) == 1500
    assert clocks(write_sectors=264 * 2 * 2800) == 1500
    assert clocks(read_sectors=264 * 2 * 2500) == 1300
    assert clocks(read_sectors=264 * 2 * 2500, reads=True) == 1500


def test_balance() -> None:
    assert accounting.balance([1.0] * 216, 108) == 1
    assert accounting.balance([1.0] * 32, 108) == pytest.approx(108 / 32)
    assert accounting.balance([4, 3, 2, 1], 2) == 1
    assert accounting.balance([1, 2, 3, 4], 2) == pytest.approx(6 / 5)  # shortest first is worse


def test_a_missed_bar_is_shown() -> None:
    metrics = {"issue": 0.45, "peak": 0.79}
    row = {"group": "g", "kernel": "k", "shape": "s", "device": "A100", "metrics": metrics}
    low, high = (asdict(Bar("issue", limit)) for limit in (0.44, 0.46))
    share = asdict(Bar("peak", 0.80, is_least=True))
    row["bars"] = [low, high, share]
    assert modelled.missed(row) == [low, share]
    assert modelled.verdict(row, share) == "0.790 (bar 0.8: missed by 0.010)"
    assert modelled.verdict(row, low) == "0.450 (bar 0.44: missed by 0.010)"
    assert modelled.verdict(row, high) == "0.450 (bar 0.46: met)"
    assert len(modelled.missed_lines([row])) == 4


def test_a_reason_holds_for_a_miss_of_its_size_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelled, "NOTES", {("g/k", "issue"): (0.02, "why")})
    row = {"group": "g", "kernel": "k", "shape": "s", "metrics": {"issue": 0.45}}
    assert modelled.note(row, asdict(Bar("issue", 0.44))) == "why"
    assert modelled.note(row, asdict(Bar("issue", 0.42))) == ""


# --------------------------------------------------------------------------------------- scaling


def test_counts_that_are_not_affine_are_refused() -> None:
    a, b = counters(read_bytes=10), counters(read_bytes=17)
    assert accounting.extrapolate(a, b, (2, 4), 8).read_bytes == 10 + 7 * 3
    with pytest.raises(ValueError, match="not affine"):
        accounting.extrapolate(a, b, (2, 4), 5)


def skip_unless_supported(case: Case, arch: str = "80") -> None:
    if not cases.supported(case, arch):
        pytest.skip(f"{case.kernel}: not in this build")


SCALED = [
    cases.rms_norm(8, True),
    cases.apply_rope(8),
    replace(cases_triton.triton_attention(256, True), units=4),
    replace(cases_triton.triton_matmul("o", 1024, 256, 128, (128, 256, 64), 8, 3), units=4),
    replace(cases.prefill(256, True), units=4),
    cases.prefill(512, False),
    cases.decode(4, 300),
    replace(cases.linear("gate_up", 2048, 256, 130), units=8),
    replace(cases.linear("qkv", 6144, 256, 40), units=8),
    replace(cases_quant.linear_quant("o", "Q4_K", 72), units=4),
    cases_quant.linear_quant("o", "Q4_K", 512),
]


@needs_kernels
@pytest.mark.parametrize("case", SCALED, ids=lambda c: f"{c.kernel.split(',')[0]}-{c.shape}")
def test_scaled_counts_are_those_of_a_whole_run(case: Case) -> None:
    """All counters, to the last one."""
    skip_unless_supported(case)
    scaled = accounting.measure(replace(case, exact_units=1), "80")
    assert len(scaled.emulated_units) == 2
    assert scaled.counters == case.run("80", case.units)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_peer_is_right(causal: bool) -> None:
    """Triton's attention computes attention: what it is compared by is the whole job."""
    case = cases_triton.triton_attention(256, causal)
    kernel = case.run.__self__  # type: ignore[attr-defined]
    problem = kernel.build(2)
    object.__setattr__(kernel, "build", lambda units: problem)
    problem.out.fill_(float("nan"))
    case.run("80", 2)
    q, k, v = (t.transpose(0, 1).double() for t in problem.args[:3])
    k, v = (t.repeat_interleave(cases.GROUP, 0) for t in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(problem.out.transpose(0, 1).double(), expected, atol=0.01, rtol=0.02)


@pytest.mark.parametrize("arch", ["80", "100a"])
@pytest.mark.parametrize("name", ["rms_norm", "silu_and_mul", "apply_rope"])
def test_row_wise_peers_are_right(name: str, arch: str) -> None:
    kernel = getattr(cases_triton, f"triton_{name}")(3).run.__self__
    problem = kernel.build(3)
    object.__setattr__(kernel, "build", lambda units: problem)
    generator = torch.Generator().manual_seed(1)
    tensors = [a for a in problem.args if isinstance(a, torch.Tensor)]
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    before = [t.clone() for t in tensors]
    kernel.run(arch, 3)
    if name == "rms_norm":
        expected = [eager.rms_norm(*before[:2])]
        got = tensors[2:]
    elif name == "silu_and_mul":
        expected = [eager.silu_and_mul(torch.cat(before[:2], -1))]
        got = tensors[2:]
    else:
        q, k, cos, sin = before
        expected = list(eager.apply_rope(q, k, cos.repeat(1, 2), sin.repeat(1, 2)))
        got = tensors[:2]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


# --------------------------------------------------------------------------------------- the page


def test_page_is_what_the_script_makes_of_the_results() -> None:
    assert modelled.PAGE.read_text() == modelled.page(RESULTS)


def test_results_are_kept_as_they_are() -> None:
    for row in RESULTS["rows"]:
        assert modelled.stored(CASES[row["case"]], row["arch"], modelled.loaded(row)) == row
    assert modelled.dump(RESULTS) == modelled.RESULTS.read_text()
    assert json.loads(modelled.dump(RESULTS)) == RESULTS


def test_page_says_modelled_on_each_line() -> None:
    rows = modelled.rows_of(RESULTS, modelled.DEVICES)
    assert {row["device"] for row in rows} == set(ARCHITECTURES)
    for line in modelled.time_lines(rows)[2:]:
        assert "| modelled " in line


def test_each_missed_bar_has_its_reason() -> None:
    for row in modelled.rows_of(RESULTS, modelled.DETAILED):
        for bar in modelled.missed(row):
            assert modelled.note(row, bar), (row["kernel"], row["shape"], bar, row["metrics"])


def test_each_reason_is_of_a_bar_that_is_missed() -> None:
    """And is not broader than it must be: by no more than 0.02."""
    rows = {f"{r['group']}/{r['kernel']}/{r['shape']}": r for r in
            modelled.rows_of(RESULTS, modelled.DETAILED) if r["device"] == "H100"}  # fmt: skip
    for (case, metric), (most, _) in modelled.NOTES.items():
        (bar,) = (bar for bar in rows[case]["bars"] if bar["metric"] == metric)
        assert (
            0 < modelled.excess(rows[case], bar) <= most <= modelled.excess(rows[case], bar) + 0.02
        )


@pytest.mark.skipif(set(ARCHS) != set(BUILT), reason="not all architectures are in this build")
def test_results_hold_every_case() -> None:
    """Of kernels that exist; and no other."""
    wanted = {
        (case.id, arch)
        for case in all_cases()
        for arch in case.archs
        if cases.supported(case, arch)
    }
    assert set(COMMITTED) == wanted


CHEAP = [
    (case, arch)
    for arch, shapes in {
        "80": ("64 x 4096", "context 1024, batch 1", "1024 x 1024 causal", "o 4096 x 4096, M 1",
               "qkv 6144 x 4096, M 8"),
        "90a": ("context 1024, batch 1", "1024 x 1024 causal"),
    }.items()
    for case in all_cases()
    if arch in case.archs and case.shape in shapes and (arch == "80" or not cases.is_peer(case))
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize(
    "case, arch",
    [pytest.param(c, a, id=f"{a}-{c.kernel.split(',')[0]}-{c.shape}") for c, a in CHEAP],
)
def test_committed_results_are_those_of_this_build(case: Case, arch: str) -> None:
    """Within 2 %, by the same compiler: else the page is to be written again. And no bar is missed
    for which nobody has given a reason."""
    if arch not in BUILT:
        pytest.skip(f"sm_{arch} is not in this build")
    skip_unless_supported(case, arch)
    committed = COMMITTED[case.id, arch]
    peer = cases.is_peer(case)
    version = importlib.metadata.version("triton") if peer else native.build_info()["nvcc"]
    if version != RESULTS["triton" if peer else "nvcc"]:
        pytest.skip(f"the page was written with another compiler than {version}")
    gpu = ARCHITECTURES[modelled.DEVICES[arch][0]]
    now, then = (
        modelled.derived(case, arch, m, gpu)
        for m in (accounting.measure(case, arch), modelled.loaded(committed))
    )
    for name, value in now["metrics"].items():
        if value is not None and then["metrics"][name] is not None:
            assert value == pytest.approx(then["metrics"][name], rel=0.02), modelled.USE
        else:  # of SASS: without cuobjdump
            assert value == then["metrics"][name] or "sass" in name
    assert now["times_us"] == pytest.approx(then["times_us"], rel=0.02), modelled.USE
    for bar in modelled.missed(now):
        assert modelled.note(now, bar), bar


def test_idle_time_between_kernels() -> None:
    """What is asked for early hides a boundary, as far as there is room for it and it is enough."""
    small = megakernel.Kernel("small", 1e9, 0, 20 << 10, 128, 64, 132)
    large = replace(small, smem=200 << 10)
    assumed = megakernel.Assumed()

    def idle(now: megakernel.Kernel, after: megakernel.Kernel, how: str) -> float:
        return megakernel.idle(now, after, how, assumed)

    boundary = assumed.dram / 2 + assumed.pdl + assumed.l2
    rate = megakernel.GPU.dram_tb_s * assumed.efficiency * 1e6
    assert idle(small, small, "PDL") == pytest.approx(boundary - assumed.l2 + assumed.dram)
    assert idle(small, small, "graph") > idle(small, small, "PDL")
    # 132 rings of 20 KB are two thirds of the 4 MB that could stream meanwhile.
    partly = idle(small, small, "PDL, prefetch")
    assert partly == pytest.approx(boundary - (132 * 20 << 10) / rate) and partly > 0.1
    few = replace(small, bytes=1e6)
    assert idle(small, few, "PDL, prefetch") == pytest.approx(boundary - 1e6 / rate)
    assert idle(large, large, "PDL, prefetch") == idle(large, large, "PDL")  # no room
    assert idle(small, small, "one kernel") == 0
    whole = [small, large, few]
    times = [megakernel.step(whole, how, assumed) for how in megakernel.HOW]
    assert [lost for _, lost in times] == sorted((lost for _, lost in times), reverse=True)
    assert len({round(time - lost, 6) for time, lost in times}) == 1
