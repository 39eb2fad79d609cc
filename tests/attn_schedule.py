"""Which items the clusters of sm_90's attention for prompts take, by the kernel's own header,
csrc/attention/attn_schedule.cuh, compiled for the CPU (attn_schedule_host.cpp)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests import native_abi as abi
from tests.emulator.build import run

SOURCE = Path(__file__).parent / "attn_schedule_host.cpp"
ROOT = SOURCE.parent.parent
Items = list[list[tuple[int, int, int]]]  # of each cluster: sequence, unit, head or pair of heads


@functools.cache
def library(changed: tuple[str, str] | None = None) -> ctypes.CDLL:
    """`changed`: a text of the header, and what stands there instead."""
    with tempfile.TemporaryDirectory() as folder:
        name = "attention/attn_schedule.cuh"
        text = (ROOT / "csrc" / name).read_text()
        if changed:
            assert text.count(changed[0]) == 1, changed[0]
            text = text.replace(*changed)
        (Path(folder) / "attention").mkdir()
        (Path(folder) / name).write_text(text)
        path = Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.so"
        include = [f"-I{p}" for p in (folder, ROOT / "csrc", ROOT / "include")]
        flags = [
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            "-Wall",
            "-Wextra",
            "-Wno-unknown-pragmas",
        ]
        run([os.environ.get("CXX", "g++"), *flags, *include, "-o", str(path), str(SOURCE)])
        return ctypes.CDLL(str(path))


def items(
    lengths: Sequence[tuple[int, int]],
    *,
    causal: bool,
    heads: tuple[int, int] = (32, 8),
    window: int = 0,
    clusters: int = 66,
    skip: int = 0,
    changed: tuple[str, str] | None = None,
) -> Items:
    """lengths: queries and keys of each sequence. heads: of queries, of keys."""
    cu = [np.cumsum([0, *n], dtype=np.int32) for n in zip(*lengths, strict=True)]
    params = abi.structs()["mk_attention_params"](
        cu_seqlens_q=cu[0].ctypes.data, cu_seqlens_k=cu[1].ctypes.data, batch=len(lengths),
        num_q_heads=heads[0], num_kv_heads=heads[1], causal=causal, window=window,
        max_seqlen_q=max(q for q, _ in lengths), skip_seqlen_q=skip,
    )  # fmt: skip
    most = sum(-(-q // 128) for q, _ in lengths) * heads[0] + 1
    found = np.empty((most, 3), np.int32)
    deal = library(changed).attn_schedule
    result: Items = []
    for cluster in range(clusters):
        count = deal(ctypes.byref(params), cluster, clusters, found.ctypes.data_as(ctypes.c_void_p),
                     most)  # fmt: skip
        assert count < most
        result.append([(int(s), int(u), int(h)) for s, u, h in found[:count]])
    return result


def tiles(
    queries: int, keys: int, unit: int, causal: bool, window: int = 0, rows: int = 128
) -> int:
    """Tiles of 128 keys that some query of a unit of `rows` sees, by the masks' definition."""
    first, last = unit * rows, min((unit + 1) * rows, queries) - 1
    offset, behind = keys - queries, (window or 1 << 30) - 1
    begin = max(first + offset - behind, 0)
    end = min(last + offset + (0 if causal else behind) + 1, keys)
    return -(-end // 128) - begin // 128 if end > begin else 0


@functools.cache
def tiles_by_cluster(
    lengths: tuple[tuple[int, int], ...], causal: bool, heads: tuple[int, int], clusters: int
) -> list[list[int]]:
    """Of each item of each cluster, in its order. A group of heads must be of an even number."""
    dealt = items(lengths, causal=causal, heads=heads, clusters=clusters)
    return [[tiles(*lengths[s], unit, causal) for s, unit, _ in mine] for mine in dealt]
