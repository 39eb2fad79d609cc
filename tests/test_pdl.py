"""Kernels that start early, by programmatic dependent launch, leave memory alone until they waited:
the emulator sees it, whichever lane, path or instruction it is."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from tests import native_abi as abi
from tests.native_emulator import BUILT, dtype_id, faulty_library, run

pytestmark = pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")
EARLY = "access before griddepcontrol.wait"


def row(library: ctypes.CDLL | None = None, rows: int = 3) -> None:
    x = torch.randn(rows, 64).bfloat16()
    weight, out = torch.ones(64).bfloat16(), torch.empty_like(x)
    params = abi.params_type("rms_norm")(
        x=x.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(), x_stride=64, out_stride=64,
        rows=rows, hidden=64, eps=1e-5, dtype=dtype_id(x),
    )  # fmt: skip
    run("rms_norm", "90a", params, [x, weight, out], lib=library)


def product(library: ctypes.CDLL | None = None, m: int = 70) -> None:
    x, w = torch.randn(m, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    out = torch.empty(m, 64, dtype=torch.bfloat16)
    params = abi.params_type("linear")(
        x=x.data_ptr(), w=w.data_ptr(), out=out.data_ptr(), x_stride=64, w_stride=64,
        out_stride=64, m=m, n=64, k=64, dtype=dtype_id(x), out_dtype=dtype_id(x),
    )  # fmt: skip
    run("linear", "90a", params, [x, w, out], lib=library)


def test_no_wait(tmp_path: Path) -> None:
    row()
    lib = faulty_library(tmp_path, "90a", "mk_rms_norm_sm90_bf16", r"griddepcontrol\.wait;", "")
    with pytest.raises(AssertionError, match=EARLY):
        row(lib)


def test_no_wait_before_tma(tmp_path: Path) -> None:
    product()
    entry = "mk_linear_sm90_bf16_m128_n64"
    lib = faulty_library(tmp_path, "90a", entry, r"griddepcontrol\.wait;", "")
    with pytest.raises(AssertionError, match=rf"{EARLY}(.|\n)*cp\.async\.bulk\.tensor"):
        product(lib)
