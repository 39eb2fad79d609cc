"""Every case of the accounting: the rows of docs/modelled.md, in its order."""

from __future__ import annotations

from bench.accounting import Case
from bench.cases import (
    MATRICES,
    apply_rope,
    decode,
    embedding,
    linear,
    prefill,
    prefill_chunks,
    prefill_fp8,
    rms_norm,
    silu_and_mul,
)
from bench.cases_fp8 import linear_fp8, quantize_fp8
from bench.cases_quant import linear_quant, quant_prepare_x
from bench.cases_triton import (
    triton_apply_rope,
    triton_attention,
    triton_attention_tma,
    triton_int4_matmul,
    triton_matmul,
    triton_matmul_tma,
    triton_rms_norm,
    triton_silu_and_mul,
)
from bench.shapes import KINDS


def all_cases() -> list[Case]:
    cases = []
    for rows in (1024, 2048, 8192):
        for causal in (False, True):
            cases += [prefill(rows, causal), triton_attention(rows, causal)]
            cases.append(triton_attention_tma(rows, causal))
            if rows <= 2048:
                cases.append(prefill_fp8(rows, causal))
    cases += [prefill(16384, causal) for causal in (False, True)]
    cases += [prefill(2048, True, paged=True), prefill(2048, True, rope=True), prefill_chunks()]
    cases += [decode(batch, context) for context in (1024, 8192, 32768) for batch in (1, 8, 64)]
    for m in (1, 8, 16, 64):
        cases += [linear(name, *shape, m) for name, shape in MATRICES.items()]
    cases.append(triton_matmul("o", *MATRICES["o"], 16, (16, 128, 64), 4, 4))
    for m in (512, 2048):
        cases += [linear(name, *shape, m) for name, shape in MATRICES.items()]
    cases.append(triton_matmul("gate_up", *MATRICES["gate_up"], 2048, (128, 256, 64), 8, 3))
    cases.append(triton_matmul_tma("o", *MATRICES["o"], 2048, (128, 256, 64), 8, 3))
    cases += [linear_fp8(name, *MATRICES[name], 1) for name in ("o", "gate_up")]
    cases += [linear_fp8(name, *shape, 2048) for name, shape in MATRICES.items()]
    cases += [linear_quant("down", kind, 1) for kind in KINDS]
    cases.append(linear_quant("gate_up", "Q4_K", 1))
    for m in (1, 16):
        cases.append(triton_int4_matmul("down", *MATRICES["down"], m, (16, 64, 128), 4, 4))
    cases += [linear_quant("down", kind, 16) for kind in ("Q4_0", "Q4_K", "Q6_K")]
    cases.append(linear_quant("down", "Q4_K", 512))
    for rows in (1, 64, 2048):
        cases += [rms_norm(rows, False), triton_rms_norm(rows), rms_norm(rows, True)]
        cases += [apply_rope(rows), triton_apply_rope(rows)]
        cases += [silu_and_mul(rows), triton_silu_and_mul(rows), embedding(rows)]
    cases += [quant_prepare_x(2048), quantize_fp8(2048)]
    return cases
