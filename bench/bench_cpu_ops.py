"""The CPU kernels of norm, RoPE with append and attention against the same in PyTorch.

    OMP_NUM_THREADS=2 python bench/bench_cpu_ops.py --threads 2

Least times of one call, in turns with PyTorch's, so that a change of the machine's speed meets
both. What Python costs is in them: `ops` is the call that a model makes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F

from minitron_kernels import _native, ops

Tensor = torch.Tensor

MODELS = {"smollm2-135m": (9, 3, 64, 576), "minitron-8b": (32, 8, 128, 4096)}


def least(runs: list[Callable[[], object]], seconds: float) -> list[float]:
    """The least time of a call of each, in microseconds."""
    best = [float("inf")] * len(runs)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 20 or time.perf_counter() < deadline:
        for i, run in enumerate(runs):
            started = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - started)
        rounds += 1
    return [1e6 * t for t in best]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence, causal, keys [L, Hk, D] as they lie."""
    (lq, hq, d), hk = q.shape, k.shape[1]
    kt, vt = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if lq == 1:  # the queries of a group as the rows of one matrix: the faster way
        return F.scaled_dot_product_attention(q.view(1, hk, hq // hk, d), kt, vt)
    qt = q.transpose(0, 1)[None]
    return F.scaled_dot_product_attention(qt, kt, vt, is_causal=True, enable_gqa=hq != hk)


def hf_norm(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


@click.command(help=__doc__)
@click.option("--threads", default=2, show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="per line")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--context", "contexts", multiple=True, type=int, default=(128, 600, 2048))
@click.option("--prompt", "prompts", multiple=True, type=int, default=(128, 512))
def main(
    threads: int,
    seconds: float,
    dtype: str,
    contexts: tuple[int, ...],
    prompts: tuple[int, ...],
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    print(f"torch {torch.__version__}, {_native.cpu_isa()}, {threads} threads; least times")
    print(f"{'op':44} {'us':>9} {'GFLOP/s':>8} {'GB/s':>6} {'PyTorch us':>11} {'x':>6}")

    def line(name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], flops: float,
             num_bytes: float) -> None:  # fmt: skip
        torch.testing.assert_close(
            ours().float().flatten(), theirs().float().flatten(), rtol=0.05, atol=0.05
        )
        a, b = least([ours, theirs], seconds)
        print(
            f"{name:44} {a:9.1f} {flops / a * 1e-3:8.1f} {num_bytes / a * 1e-3:6.1f} "
            f"{b:11.1f} {b / a:6.2f}",
            flush=True,
        )

    for model, (hq, hk, d, hidden) in MODELS.items():
        for rows in (1, 512):
            x, w = torch.randn(rows, hidden).to(kind), torch.randn(hidden).to(kind)
            line(
                f"rms_norm {model} {rows} x {hidden}",
                lambda x=x, w=w: ops.rms_norm(x, w, 1e-5),
                lambda x=x, w=w: hf_norm(x, w),
                4.0 * x.numel(),
                2.0 * x.numel() * x.element_size(),
            )
        for queries, keys in [*((1, n) for n in contexts), *((n, n) for n in prompts)]:
            pages = -(-keys // 16)
            k, v = (torch.randn(pages, 16, hk, d).to(kind) for _ in range(2))
            q = torch.randn(queries, hq, d).to(kind)
            table = torch.arange(pages, dtype=torch.int32)[None]
            lengths = torch.tensor([keys], dtype=torch.int32)
            starts = torch.tensor([0, queries], dtype=torch.int32)
            flat_k, flat_v = (t.view(-1, hk, d)[:keys] for t in (k, v))

            def ours(
                q: Tensor = q, k: Tensor = k, v: Tensor = v, table: Tensor = table,
                lengths: Tensor = lengths, starts: Tensor = starts,
            ) -> Tensor:  # fmt: skip
                out = ops.attention_kvcache(
                    q, None, None, k, v, table, lengths, cu_seqlens_q=starts
                )
                assert isinstance(out, Tensor)
                return out

            def theirs(q: Tensor = q, k: Tensor = flat_k, v: Tensor = flat_v) -> Tensor:
                out = sdpa(q, k, v)[0]
                return out if q.shape[0] == 1 else out.transpose(0, 1)

            pairs = queries * (keys - queries) + queries * (queries + 1) / 2
            line(
                f"attention {model} {queries} of {keys}",
                ours,
                theirs,
                4.0 * pairs * hq * d,
                2.0 * keys * hk * d * k.element_size(),
            )


if __name__ == "__main__":
    main()
