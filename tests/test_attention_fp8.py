"""mk_attention_fp8, on the emulator and a GPU, against attention in fp64 of the numbers that the
bytes and scales stand for.

The bar is what eager PyTorch gets which sums logits in as few bits as wgmma does, and rounds P to
e4m3 in the same range: twice its error, plus one unit of the output's dtype; relative to sum over
keys of weight * |v|, as in test_attention_prefill.py. Sums of P v are fp32 there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels import cuda_ops, ops, reference
from minitron_kernels.flash_attn import flash_attn_func, flash_attn_varlen_func
from tests import native_abi as abi
from tests.cuda_device import PARAMS, cuda_device, on_device
from tests.emulator import Counters
from tests.native_emulator import BUILT, DEVICES, dtype_id, faulty_library, run
from tests.test_attention_prefill import MIXED, Call, heads_of, hidden_keys, launch_call, starts
from tests.test_kernels_memory import HALVES, assert_close, dtypes, poisoned, values

Tensor = torch.Tensor
E4M3 = torch.float8_e4m3fn
NAN_BYTE = 0x7F
HEAD_DIM = 128
TOP = 64.0  # what the kernel makes a row's largest weight, at the least

needs_hopper = pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")
HOPPERS = [d for d in DEVICES if d in ("90a", "gpu")]
hoppers = pytest.mark.parametrize(
    "arch",
    [
        pytest.param(d, marks=pytest.mark.gpu) if d == "gpu" else pytest.param(d, id=f"emu-sm_{d}")
        for d in HOPPERS
    ],
)


@dataclass(frozen=True)
class Case:
    """Options of one call; everything random is drawn from `seed`."""

    lengths: Sequence[tuple[int, int]]  # queries and keys of each sequence
    heads: tuple[int, int] = (2, 1)
    dtype: torch.dtype = torch.bfloat16  # of the output
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    padding: int = 0  # bytes between rows, a multiple of 16
    descales: str = "batch"  # or "head": of all sequences; "query": q's of each query head; "none"
    mean: float = 0.0  # of v
    seed: int = 0

    @property
    def softmax_scale(self) -> float:
        return HEAD_DIM**-0.5 if self.scale is None else self.scale


@dataclass
class Inputs:
    """Bytes, and descales [batch, heads] (query heads for q)."""

    case: Case
    q: list[Tensor]  # of each sequence
    k: list[Tensor]
    v: list[Tensor]
    q_descale: Tensor
    k_descale: Tensor
    v_descale: Tensor


def quantised(x: Tensor, shared: int, spread: float) -> tuple[Tensor, Tensor]:
    """x [T, H, D] as e4m3, and its descales [H], one for each `shared` neighbouring heads. Their
    product with `spread` is what the bytes are scaled by: not the range's full use."""
    groups = x.unflatten(1, (-1, shared))
    top = groups.abs().amax((0, 2, 3)) if len(x) else torch.ones(groups.shape[1])
    descale = (top.clamp(min=1e-3) / 448 * spread).repeat_interleave(shared)
    return (x / descale[:, None]).clamp(-448, 448).to(E4M3), descale


def make_inputs(case: Case) -> Inputs:
    """A sequence's data depend on its own number and lengths only, not on the others'."""
    hq, hk = case.heads
    tensors: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    scales: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    for b, (lq, lk) in enumerate(case.lengths):
        seed = case.seed + 7919 * (b + 1)
        for i, (name, length, heads) in enumerate((("q", lq, hq), ("k", lk, hk), ("v", lk, hk))):
            x = values(length, heads, HEAD_DIM, dtype=torch.float32, seed=seed + i)
            if name == "v":
                x += case.mean
            shared = hq // hk if name == "q" and case.descales != "query" else 1
            number = 0 if case.descales == "head" else b
            data, descale = quantised(x, shared, 1 + 0.3 * ((number + i) % 3))
            if case.descales == "none":
                data, descale = x.to(E4M3), torch.ones(heads)
            elif case.descales == "head" and scales[name]:
                descale = scales[name][0]
                data = (x / descale[:, None]).clamp(-448, 448).to(E4M3)
            tensors[name].append(data)
            scales[name].append(descale)
    stacked = {name: torch.stack(s) for name, s in scales.items()}
    return Inputs(case, *tensors.values(), *stacked.values())


# ------------------------------------------------------------------------------- what is expected


def exponents(x: Tensor) -> Tensor:
    """Of e4m3 numbers; 0 has one below all."""
    return torch.where(x == 0, -512, (torch.frexp(x)[1] - 1).clamp(min=-6))


def wgmma_sums(a: Tensor, b: Tensor, total: Tensor | None = None) -> Tensor:
    """a b^T + total of e4m3 numbers [M, K], [N, K], as Hopper's tensor cores sum 32 products and
    the sum before: each cut 13 bits below the largest exponent, and so is the result (Xie et al.,
    "MMA-Sim", arXiv:2511.10909)."""
    total = torch.zeros(len(a), len(b)) if total is None else total
    for first in range(0, a.shape[1] if total.numel() else 0, 32):
        x, y = (t[:, first : first + 32] for t in (a, b))
        products = x[:, None] * y
        largest = (exponents(x)[:, None] + exponents(y)).amax(-1)
        own = torch.where(total == 0, -512, torch.frexp(total)[1] - 1)
        unit = torch.exp2((torch.maximum(largest, own) - 13).clamp(min=-140).float())
        total = (products / unit[..., None]).trunc().sum(-1) + (total / unit).trunc()
        bits = torch.exp2((torch.frexp(total)[1] - 14).clamp(min=0).float())
        total = (total / bits).trunc() * bits * unit
    return total


def wgmma_logits(q: Tensor, k: Tensor) -> Tensor:
    """q k^T of e4m3 numbers [T, H, D] -> [H, Tq, Tk]."""
    return torch.stack([wgmma_sums(q[:, head], k[:, head]) for head in range(q.shape[1])])


def eager(logits: Tensor, v: Tensor, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and lse of logits [H, Tq, Tk] and v [Tk, H, D] in fp32, but for P, which is rounded to
    e4m3 where a row's largest weight is TOP, also for its sum; out in the dtype."""
    logits = logits.masked_fill(hidden, -math.inf)
    top = logits.amax(-1, keepdim=True) if logits.shape[-1] else logits.sum(-1, keepdim=True)
    weights = (torch.exp(logits - top).nan_to_num(0.0) * TOP).to(E4M3).float()
    sums = weights.sum(-1)
    out = torch.einsum("hqk,khd->qhd", weights, v) / sums.T[..., None]
    return out.nan_to_num(0.0).to(dtype), top[..., 0] + torch.log(sums / TOP)


# Of few queries PyTorch's error of lse may be small by luck: it is the largest of this many.
MIN_ROWS = 64


def more_queries(inputs: Inputs, b: int) -> Iterator[Tensor]:
    """Others like those of sequence b."""
    length, heads, _ = inputs.q[b].shape
    if not length or not len(inputs.k[b]):
        return
    for i in range(1, -(-MIN_ROWS // length)):
        x = values(length, heads, HEAD_DIM, dtype=torch.float32, seed=104729 * i + b)
        yield (x / inputs.q_descale[b][:, None]).clamp(-448, 448).to(E4M3).float()


def largest_error(lse: Tensor, exact: Tensor) -> float:
    """NaN where one is, infinite where only one of both sees no key."""
    error = (lse.double() - exact).abs().masked_fill(lse.isneginf() & exact.isneginf(), 0.0)
    return error.max().item() if error.numel() else 0.0


def expected(inputs: Inputs, b: int, raw_q: Tensor) -> tuple[Tensor, ...]:
    """out and lse of queries of sequence b, exact and PyTorch's; and the exact out for |v|."""
    case, lk = inputs.case, len(inputs.k[b])
    group = case.heads[0] // case.heads[1]
    q = raw_q.double() * inputs.q_descale[b][:, None]
    k, v = (t[b].double() for t in (inputs.k, inputs.v))
    k, v = k * inputs.k_descale[b][:, None], v * inputs.v_descale[b][:, None]
    masks = case.causal, case.softmax_scale, case.window
    logits = wgmma_logits(raw_q, inputs.k[b].float().repeat_interleave(group, 1))
    factor = inputs.q_descale[b] * inputs.k_descale[b].repeat_interleave(group)
    logits *= factor[:, None, None] * case.softmax_scale
    hidden = hidden_keys(case, len(raw_q), lk)
    return (
        *reference.attend(q, k, v, *masks),
        *eager(logits, v.float().repeat_interleave(group, 1), hidden, case.dtype),
        reference.attend(q, k, v.abs(), *masks)[0],
    )


def check(inputs: Inputs, out: Tensor, lse: Tensor) -> None:
    """Every element of every sequence; and their errors' mean, which a few large ones hide."""
    case = inputs.case
    outs = []
    q_starts = starts([n for n, _ in case.lengths])
    for b in range(len(case.lengths)):
        exact, exact_lse, eager_out, eager_lse, scale = expected(inputs, b, inputs.q[b].float())
        outs.append((exact, eager_out, scale))
        rows = slice(q_starts[b], q_starts[b + 1])
        error, rounding = (largest_error(t, exact_lse) for t in (lse[:, rows], eager_lse))
        for other in more_queries(inputs, b):
            _, exact_of_other, _, eager_of_other, _ = expected(inputs, b, other)
            rounding = max(rounding, largest_error(eager_of_other, exact_of_other))
        size = max(exact_lse[~exact_lse.isneginf()].abs().tolist(), default=0.0)
        assert error <= 2 * rounding + 1e-5 * (size + 8), (
            f"lse is {error:.1e} off, eager PyTorch's {rounding:.1e}"
        )
    exact, eager_out, scale = map(torch.cat, zip(*outs, strict=True))
    assert_close(out, exact, eager_out, "out", scale)
    scale = scale.clamp(min=torch.finfo(case.dtype).tiny)
    error, rounding = (((t.double() - exact).abs() / scale).mean() for t in (out, eager_out))
    assert not out.numel() or error <= 1.5 * rounding + 2**-9, (
        f"mean error {error:.1e}, {rounding:.1e}"
    )


# ------------------------------------------------------------------------------------ the kernel


def strided_bytes(x: Tensor, padding: int, tail: int = 0) -> Tensor:
    """x [T, H, D] of e4m3 with heads `padding` bytes further apart, and `tail` more rows: all that
    is not x is NaN."""
    tokens, heads, dim = x.shape
    storage = torch.full((tokens + tail, heads, dim + padding), NAN_BYTE, dtype=torch.uint8)
    storage[:tokens, :, :dim] = x.view(torch.uint8)
    return storage.view(E4M3)[:, :, :dim]


def make_call(inputs: Inputs) -> Call:
    case = inputs.case
    hq, hk = case.heads
    q = strided_bytes(torch.cat(inputs.q), case.padding)
    k, v = (strided_bytes(torch.cat(t), case.padding, tail=70) for t in (inputs.k, inputs.v))
    out = poisoned(torch.zeros(len(q), hq, HEAD_DIM, dtype=case.dtype), case.padding)
    lse = torch.full((hq, len(q) + case.padding), float("nan"))
    lq, lk = ([n[i] for n in case.lengths] for i in (0, 1))
    cu_q, cu_k = (torch.tensor(starts(n), dtype=torch.int32) for n in (lq, lk))
    fields: dict[str, int] = {}
    tensors = [q, k, v, out, lse, cu_q, cu_k]
    if case.descales != "none":
        per_q = inputs.q_descale if case.descales == "query" else inputs.q_descale[:, :: hq // hk]
        fields["num_q_descales"] = per_q.shape[1]
        for name, t in (("q", per_q), ("k", inputs.k_descale), ("v", inputs.v_descale)):
            t = (t[:1] if case.descales == "head" else t).contiguous()
            fields[f"{name}_descale"] = t.data_ptr()
            fields[f"{name}_descale_stride"] = 0 if case.descales == "head" else t.stride(0)
            tensors.append(t)
    params = abi.structs()["mk_attention_fp8_params"](
        **heads_of(q=q, k=k, v=v, out=out),
        lse=lse.data_ptr(),
        cu_seqlens_q=cu_q.data_ptr(),
        cu_seqlens_k=cu_k.data_ptr(),
        lse_stride=lse.stride(0),
        tokens_q=len(q),
        tokens_k=sum(lk),
        batch=len(case.lengths),
        num_q_heads=hq,
        num_kv_heads=hk,
        head_dim=HEAD_DIM,
        max_seqlen_q=max(lq, default=0),
        causal=case.causal,
        window=case.window or 0,
        softmax_scale=case.softmax_scale,
        out_dtype=dtype_id(out),
        **fields,
    )
    return Call(params, tensors, out, lse)


def launch(inputs: Inputs, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    if device == "gpu" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the GPU is not a Hopper")
    return launch_call("attention_fp8", make_call(inputs), device, seed)


def run_and_check(case: Case, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    inputs = make_inputs(case)
    out, lse = launch(inputs, device, seed)
    check(inputs, out, lse)
    return out, lse


# --------------------------------------------------------------------------------- against PyTorch


@hoppers
@dtypes
def test_attention_fp8(arch: str, dtype: torch.dtype) -> None:
    """A mixed batch: empty sequences, one query, no key, more queries than keys, several tiles."""
    run_and_check(Case(MIXED, dtype=dtype, padding=16), arch)


SHAPES = {
    "minitron": Case([(150, 150)], (32, 8)),
    "full": Case([(130, 190), (64, 64)], (4, 4), causal=False, descales="head"),
    "one head": Case([(256, 700)], (1, 1), causal=False, descales="none"),
    "group of three": Case([(140, 300)], (3, 1), descales="query"),
    "window": Case([(200, 500)], (2, 2), window=70, descales="query"),
    "window of one": Case([(66, 200)], (2, 1), window=1),
    "window, full": Case([(100, 390)], (2, 1), window=33, causal=False),
    "lengths around tiles": Case([(n, n + m) for n in (1, 7, 33, 127, 129) for m in (0, 1, 128)]),
    "sharp": Case([(70, 400)], scale=1.0),
    "flat": Case([(70, 400)], dtype=torch.float16, scale=1e-4, causal=False),
    "v of one sign": Case([(40, 1500)], dtype=torch.float16, scale=0.01, causal=False, mean=3.0),
}


@hoppers
@pytest.mark.parametrize("name", SHAPES)
def test_attention_fp8_shapes(arch: str, name: str) -> None:
    run_and_check(SHAPES[name], arch, seed=len(name))


@settings(max_examples=25, deadline=None)
@given(
    arch=st.sampled_from(HOPPERS or ["90a"]),
    lengths=st.lists(st.tuples(st.integers(0, 140), st.integers(0, 300)), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (5, 1)]),
    dtype=st.sampled_from(HALVES),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 320)),
    padding=st.sampled_from([0, 16, 48]),
    scale=st.one_of(st.none(), st.floats(0.01, 0.5)),
    descales=st.sampled_from(["batch", "head", "query", "none"]),
    mean=st.sampled_from([0.0, 0.0, 1.0]),
    seed=st.integers(0, 1000),
)
@needs_hopper
def test_attention_fp8_anything(
    arch: str, lengths: list[tuple[int, int]], seed: int, **options: ...
) -> None:
    run_and_check(Case(lengths, seed=seed, **options), arch, seed=seed)


@hoppers
def test_a_growing_maximum_is_rescaled(arch: str) -> None:
    """Logits that climb from tile to tile, or fall, in one row of a warp only or in all."""
    for direction in (1.0, -1.0):
        inputs = make_inputs(Case([(64, 640)], causal=False, descales="none", scale=0.25))
        ramp = torch.linspace(0, 4, 640)[:, None] * direction
        k = inputs.k[0].float() / 8
        k[:, 0, :8] += ramp
        q = inputs.q[0].float() / 8
        q[1:, :, :8] = q[1:, :, :8].clamp(-0.1, 0.1)
        q[0, :, :8] = 8.0
        inputs.k, inputs.q = [k.to(E4M3)], [q.to(E4M3)]
        check(inputs, *launch(inputs, arch))


@hoppers
def test_each_byte_of_v_is_found(arch: str) -> None:
    """Each query attends to one key: its row of v, bit for bit, of all bytes but NaN."""
    case = Case([(256, 256)], (2, 1), torch.float16, causal=False, scale=1.0, descales="none")
    inputs = make_inputs(case)
    finite = torch.arange(256)
    finite = finite[finite % 128 != NAN_BYTE]
    bytes_of_v = (torch.arange(256)[:, None] * 37 + torch.arange(HEAD_DIM) * 11) % len(finite)
    inputs.v = [finite[bytes_of_v].to(torch.uint8).view(E4M3)[:, None]]
    # Keys as codes that only their own query matches: signs of a number's bits, 16 times 8.
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    code = (2.0 * bits - 1).repeat(1, 16)[:, None]
    inputs.k, inputs.q = [(8 * code).to(E4M3)], [code.repeat(1, 2, 1).to(E4M3)]
    out, _ = launch(inputs, arch)
    assert torch.equal(out.float(), inputs.v[0].float().expand(256, 2, HEAD_DIM))


@pytest.mark.parametrize("keys", [1024, 8192])
def test_parts_of_o_have_to_be_added_in_fp32(keys: int) -> None:
    """A model of the second product, where v has one sign: what is lost of O if all keys are summed
    by wgmma, and if it is 128 at a time, as the kernel does it."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(4, keys, generator=generator)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True)) * TOP
    p = weights.to(E4M3).float()
    v = (1 + 0.1 * torch.randn(16, keys, generator=generator)).to(E4M3).float()
    exact = p.double() @ v.double().T
    parts = sum(wgmma_sums(p[:, n : n + 128], v[:, n : n + 128]) for n in range(0, keys, 128))
    lost, kept = (((t - exact).abs() / exact).mean() for t in (wgmma_sums(p, v), parts))
    mean = weights.double() @ v.double().T / weights.double().sum(-1, keepdim=True)
    unrounded, rounded = (
        ((exact / w.double().sum(-1, keepdim=True) - mean).abs() / mean).mean()
        for w in (weights, p)
    )
    print(
        f"{keys} keys: {lost:.2%} is lost at once, {kept:.2%} in parts; error of P's rounding "
        f"{unrounded:.3%} over the sum before it, {rounded:.3%} over that after"
    )
    assert rounded < unrounded / 4
    assert kept < 0.003 and lost > keys / 128 * kept / 2


# ----------------------------------------------------------------------------------- same numbers


@hoppers
def test_a_row_does_not_depend_on_the_batch(arch: str) -> None:
    """The first sequence alone, with others, with others whose K and V are NaN, and with another
    interleaving of warps: the same bits."""
    first = (150, 270)
    alone = launch(make_inputs(Case([first])), arch)
    many = make_inputs(Case([first, (70, 20), (300, 300)]))
    for poison in (False, True):
        if poison:
            for t in (*many.k[1:], *many.v[1:]):
                t.view(torch.uint8).fill_(NAN_BYTE)
        got = launch(many, arch, seed=5)
        assert torch.equal(got[0][: first[0]], alone[0])
        assert torch.equal(got[1][:, : first[0]], alone[1])


MANY = [(20 + i % 9, 100 + 2 * i) for i in range(80)]  # more than an H100 has clusters


@needs_hopper
@pytest.mark.parametrize("heads", [(2, 1), (3, 1)], ids=["pairs of heads", "pairs of tiles"])
def test_many_items_of_a_block(heads: tuple[int, int]) -> None:
    """Blocks take one item after another, and tiles go on in their rings."""
    case = Case(MANY, heads)
    plan = abi.plan("attention_fp8", make_call(make_inputs(case)).params, "90a")
    assert plan.grid[:] == [132, 1, 1] and plan.cluster[:] == [2, 1, 1]
    out, lse = run_and_check(case, "90a")
    assert all(map(torch.equal, launch(make_inputs(case), "90a", seed=1), (out, lse)))
    few_out, few_lse = launch(make_inputs(replace(case, lengths=MANY[:5])), "90a")
    assert torch.equal(few_out, out[: len(few_out)])
    assert torch.equal(few_lse, lse[:, : len(few_out)])


@needs_hopper
def test_optional_lse_and_empty_inputs() -> None:
    inputs = make_inputs(Case([(20, 40)]))
    call = make_call(inputs)
    call.params.lse, call.params.lse_stride = None, 0
    run("attention_fp8", "90a", call.params, call.tensors)
    assert torch.equal(call.out, launch(inputs, "90a")[0]) and call.lse.isnan().all()
    for field in ("tokens_q", "batch", "max_seqlen_q"):
        call = make_call(inputs)
        setattr(call.params, field, 0)
        run("attention_fp8", "90a", call.params, call.tensors)
        assert call.out.isnan().all()
    out, lse = launch(make_inputs(Case([(20, 0)])), "90a")
    assert not out.any() and lse.isneginf().all()


# ---------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("arch", ["80", "89", "100a"])
def test_other_architectures_name_the_one(arch: str) -> None:
    params = make_call(make_inputs(Case([(20, 40)]))).params
    with pytest.raises(abi.StatusError, match=r"MK_ERR_UNSUPPORTED.*sm_90a"):
        abi.plan("attention_fp8", params, arch)


@needs_hopper
def test_elements_that_share_memory_are_refused() -> None:
    call = make_call(make_inputs(Case([(140, 140)], (2, 2))))
    call.params.k_head_stride = call.params.k_stride
    with pytest.raises(abi.StatusError, match=r"k_stride.*share memory"):
        run("attention_fp8", "90a", call.params, call.tensors)


# ------------------------------------------------------------------------------------------ Python


@pytest.fixture(params=["cpu", *(p for p in PARAMS if "90" in str(p.id) or p.values == ("gpu",))])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "cpu":
        yield "cpu"
        return
    if request.param == "gpu" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the GPU is not a Hopper")
    with cuda_device(request.param, monkeypatch) as name:
        yield name


def to(device: str, *tensors: Tensor) -> list[Tensor]:
    return [on_device(t, device) if cuda_ops.emulate or device == "cuda" else t for t in tensors]


def test_op(device: str) -> None:
    """Every option, lse, all forms of descales; strides that are taken, or must be copied."""
    for case in (
        Case([(33, 40), (0, 3), (20, 150)], (4, 2), torch.float16, window=70, descales="query"),
        Case([(40, 140), (5, 5)], (2, 2), causal=False, scale=0.05, descales="head"),
        Case([(9, 9)], (2, 1), descales="none"),
    ):
        inputs = make_inputs(case)
        lq, lk = ([n[i] for n in case.lengths] for i in (0, 1))
        q, k, v = (torch.cat(t) for t in (inputs.q, inputs.k, inputs.v))
        k = k.transpose(0, 1).contiguous().transpose(0, 1)  # head by head
        v = v.transpose(1, 2).contiguous().transpose(1, 2)  # features apart
        named = {"q_descale": inputs.q_descale, "k_descale": inputs.k_descale}
        named |= {"v_descale": inputs.v_descale}
        if case.descales == "head":
            named = {name: t[0] for name, t in named.items()}
        if case.descales == "none":
            named = {}
        cu = [torch.tensor(starts(n), dtype=torch.int64) for n in (lq, lk)]
        arguments = to(device, q, k, v, *cu)
        out, lse = ops.attention_fp8(
            *arguments,
            **{name: to(device, t)[0] for name, t in named.items()},
            out_dtype=case.dtype,
            max_seqlen_q=max(lq),
            causal=case.causal,
            softmax_scale=case.softmax_scale,
            window=case.window,
            return_lse=True,
        )
        assert out.dtype is case.dtype and lse.dtype is torch.float32
        check(inputs, out.cpu(), lse.cpu())


def test_flash_attention_3_takes_e4m3_so(device: str) -> None:
    inputs = make_inputs(Case([(70, 70)] * 2, (4, 2)))
    q, k, v = to(device, *(torch.stack(t) for t in (inputs.q, inputs.k, inputs.v)))
    descales = to(device, inputs.q_descale[:, ::2], inputs.k_descale, inputs.v_descale)
    named = dict(zip(("q_descale", "k_descale", "v_descale"), descales, strict=True))
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True, **named)
    check(inputs, out.flatten(0, 1).cpu(), lse.transpose(0, 1).flatten(1).cpu())
    cu = to(device, torch.tensor([0, 70, 140], dtype=torch.int32))[0]
    rows = (t.flatten(0, 1) for t in (q, k, v))
    packed = flash_attn_varlen_func(*rows, cu, cu, 70, 70, causal=True, **named)
    assert torch.equal(packed.cpu(), out.flatten(0, 1).cpu())
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn_varlen_func(q[0], k, v, cu, cu, 70, 70, block_table=cu[None], **named)
    with pytest.raises(ValueError, match="k_descale goes with"):
        flash_attn_func(*(t.to(torch.bfloat16) for t in (q, k, v)), k_descale=descales[1])


def test_bad_tensors_are_named() -> None:
    q = torch.zeros(5, 4, 128, dtype=E4M3)
    k = torch.zeros(5, 2, 128, dtype=E4M3)
    cu = torch.tensor([0, 5])
    ones = torch.ones(2)
    for error, match, arguments, options in (
        (TypeError, "k must be a float8_e4m3fn tensor", (q, k.bfloat16(), k), {}),
        (ValueError, "multiple of", (q[:, :3], k, k), {}),
        (TypeError, "out_dtype", (q, k, k), {"out_dtype": torch.float32}),
        (ValueError, r"q_descale must be \[2\] or \[1, 2\] or \[4\]", (q, k, k),
         {"q_descale": torch.ones(3)}),
        (TypeError, "k_descale must be a float32", (q, k, k), {"k_descale": ones.double()}),
        (ValueError, r"v_descale must be \[2\] or \[1, 2\]", (q, k, k),
         {"v_descale": torch.ones(2, 2)}),
        (ValueError, "window", (q, k, k), {"window": 0}),
        (ValueError, "cu_seqlens_k must ascend", (q, k[:4], k[:4]), {}),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            ops.attention_fp8(*arguments, cu, cu, **options)


@pytest.mark.parametrize("arch", [p for p in PARAMS if p.values == ("sm_80",)])
def test_other_gpus_and_head_dims_are_refused(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with cuda_device(arch, monkeypatch) as name:
        for head_dim, match in ((128, "sm_90a"), (64, "head_dim 128")):
            q, cu = torch.zeros(5, 2, head_dim), torch.tensor([0, 5])
            q, cu = on_device(q.to(E4M3), name), on_device(cu, name)
            with pytest.raises(NotImplementedError, match=match):
                ops.attention_fp8(q, q, q, cu, cu)


# -------------------------------------------------------------------------------------- counters


def count(causal: bool, tokens: int, hq: int) -> Counters:
    case = Case([(tokens, tokens)], (hq, max(hq // 4, 1)), causal=causal, descales="none")
    inputs = make_inputs(case)
    for t in (*inputs.q, *inputs.k):  # normal, without outliers: references move as in real models
        t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(0)).to(E4M3))
    call = make_call(inputs)
    call.params.lse = None
    counters = run("attention_fp8", "90a", call.params, call.tensors)
    assert counters is not None
    return counters


@needs_hopper
def test_memory_accesses_are_full_and_free_of_conflicts() -> None:
    counters = count(causal=True, tokens=300, hq=4)
    assert counters.shared_wavefronts == counters.shared_wavefronts_min
    assert counters.write_sectors == counters.unique_write_sectors
    # Q once; K and V of two heads' blocks together, but for the keys after the last whole tile.
    keys = 2 * (128 + 256 + 256) + 4 * 44
    tensors = (300 * 4 + 2 * keys) * HEAD_DIM // 32
    assert tensors <= counters.read_sectors <= tensors + 12 * 8 * 6


# --------------------------------------------------------------------------------- planted faults

SEVERAL_TILES = Case([(64, 700)], causal=False, scale=0.3)
MANY_ITEMS = Case(MANY)
WAIT = r"mbarrier\.try_wait\.parity[^;]*\+ {}\][^;]*; selp\.b32 (%r\d+), 1, 0, p;"
# Events of the ring, 8 bytes each: Q full 0, empty 8; K full 16, V full 48, V^T full 64; K empty
# 80, V empty 112, V^T empty 128.
FAULTS = {
    # References follow at 7, not at 8: all the same; at 16: weights beyond e4m3's 448.
    "nothing": (r"0f41000000", "0f40E00000", SEVERAL_TILES),
    "rescaled too late": (r"0f41000000", "0f41800000", SEVERAL_TILES),
    "V^T not waited for": (WAIT.format(64), r"mov.u32 \1, 1;", SEVERAL_TILES),
    "V not waited for": (WAIT.format(48), r"mov.u32 \1, 1;", SEVERAL_TILES),
    "V^T under wgmma": (WAIT.format(128), r"mov.u32 \1, 1;", SEVERAL_TILES),
    "V under ldmatrix": (WAIT.format(112), r"mov.u32 \1, 1;", SEVERAL_TILES),
    "K under wgmma": (WAIT.format(80), r"mov.u32 \1, 1;", SEVERAL_TILES),
    "V^T of another phase": (r"(mbarrier\.try_wait[^;]*\+ 64\]), %r\d+;", r"\1, 0;", SEVERAL_TILES),
    "no proxy fence": (r"fence\.proxy\.async[^;]*;", "", SEVERAL_TILES),
    "no wgmma fence": (r"wgmma\.fence[^;]*;", "", SEVERAL_TILES),
    "wgmma not waited for": (
        r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;", SEVERAL_TILES
    ),
    "V^T freed before it is read": (r"(mbarrier\.arrive\.shared::cta[^;]*\+ )128\]", r"\g<1>64]",
                                    SEVERAL_TILES),
    "keys in another order": (r"25632", "25920", SEVERAL_TILES),  # 0x6420, 0x6540
    "features changed over": (r"\b25632, 30001\b", "30001, 25632", SEVERAL_TILES),
    "a part not added": (r"add\.f32 (%f\d+), (%f\d+), %f\d+;", r"mov.f32 \1, \2;", SEVERAL_TILES),
    "no multicast": (r"\.multicast::cluster (.*), %rs\d+;", r" \1;", SEVERAL_TILES),
    "output overwritten under its store": (
        r"cp\.async\.bulk\.wait_group\.read 0;", "", MANY_ITEMS
    ),
    "an item's Q over the last one's": (
        r"mbarrier\.try_wait\.parity\.shared::cta\.b64 p, "
        r"\[%r\d+ \+ 8\][^;]*; selp\.b32 (%r\d+), 1, 0, p;", r"mov.u32 \1, 1;", MANY_ITEMS,
    ),
}  # fmt: skip


@needs_hopper
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    """Changes in the kernel's PTX: the emulator or the comparison objects."""
    old, new, case = FAULTS[fault]
    inputs = make_inputs(case)
    call = make_call(inputs)
    entry = abi.plan("attention_fp8", call.params, "90a").entry.decode()
    lib = faulty_library(tmp_path, "90a", entry, old, new)

    with nullcontext() if fault == "nothing" else pytest.raises(AssertionError) as found:
        run("attention_fp8", "90a", call.params, call.tensors, lib=lib)
        check(inputs, call.out, call.lse[:, : len(call.out)])
    if found:
        print(str(found.value).splitlines()[0])
