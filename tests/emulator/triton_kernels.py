"""Device code that Triton compiles to validate the emulator on; triton_cases.py has the inputs."""

import triton
import triton.language as tl


@triton.jit
def vector_add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x + y, mask=mask)


@triton.jit
def row_softmax(x_ptr, out_ptr, stride, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < cols
    x = tl.load(x_ptr + row * stride + offs, mask=mask, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    y = e / tl.sum(e, axis=0)
    tl.store(out_ptr + row * stride + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm(x_ptr, weight_ptr, bias_ptr, out_ptr, stride, cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + row * stride + offs, mask=offs < cols, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / cols
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + offs, mask=offs < cols, other=0.0).to(tl.float32)
        centred = tl.where(offs < cols, x - mean, 0.0)
        squares += centred * centred
    inv_std = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / cols + eps)
    for start in range(0, cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < cols
        x = tl.load(x_ptr + row * stride + offs, mask=mask).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=mask).to(tl.float32)
        b = tl.load(bias_ptr + offs, mask=mask).to(tl.float32)
        y = (x - mean) * inv_std * w + b
        tl.store(out_ptr + row * stride + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def matmul(
    a_ptr, b_ptr, out_ptr, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        a_mask = (rows[:, None] < m) & (ks[None, :] < k)
        b_mask = (ks[:, None] < k) & (cols[None, :] < n)
        a = tl.load(a_ptr + rows[:, None] * k + ks[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + ks[:, None] * n + cols[None, :], mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    out_mask = (rows[:, None] < m) & (cols[None, :] < n)
    out_offs = rows[:, None] * n + cols[None, :]
    tl.store(out_ptr + out_offs, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def int4_matmul(
    a_ptr, packed_ptr, scale_ptr, out_ptr, m, n, k,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a[m, k] @ w[n, k]^T, w = scale * (nibble - 8); byte j: k = 2j (low nibble) and 2j + 1."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        a_mask = (rows[:, None] < m) & (ks[None, :] < k)
        a = tl.load(a_ptr + rows[:, None] * k + ks[None, :], mask=a_mask, other=0.0)
        bytes_at = start // 2 + tl.arange(0, BLOCK_K // 2)
        packed = tl.load(
            packed_ptr + cols[:, None] * (k // 2) + bytes_at[None, :],
            mask=(cols[:, None] < n) & (bytes_at[None, :] < k // 2),
            other=0x88,
        )
        low = (packed & 0xF).to(tl.int8) - 8
        high = (packed >> 4).to(tl.int8) - 8
        quants = tl.interleave(low, high)
        scale = tl.load(
            scale_ptr + cols[:, None] * (k // GROUP) + (ks // GROUP)[None, :],
            mask=(cols[:, None] < n) & (ks[None, :] < k),
            other=0.0,
        )
        w = quants.to(a.dtype) * scale
        acc = tl.dot(a, tl.trans(w), acc)
    out_mask = (rows[:, None] < m) & (cols[None, :] < n)
    out_offs = rows[:, None] * n + cols[None, :]
    tl.store(out_ptr + out_offs, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def flash_attention(
    q_ptr, k_ptr, v_ptr, out_ptr, seq, scale_log2,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M query rows of a head. Layout [head, seq, HEAD_DIM], softmax base 2."""
    base = tl.program_id(1) * seq * HEAD_DIM
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    row_mask = rows[:, None] < seq
    q = tl.load(q_ptr + base + rows[:, None] * HEAD_DIM + dims[None, :], mask=row_mask, other=0.0)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    end = tl.minimum(seq, (tl.program_id(0) + 1) * BLOCK_M) if CAUSAL else seq
    for start in range(0, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        offs = cols[:, None] * HEAD_DIM + dims[None, :]
        k = tl.load(k_ptr + base + offs, mask=cols[:, None] < seq, other=0.0)
        v = tl.load(v_ptr + base + offs, mask=cols[:, None] < seq, other=0.0)
        logits = tl.dot(q, tl.trans(k)) * scale_log2
        visible = cols[None, :] < seq
        if CAUSAL:
            visible = visible & (cols[None, :] <= rows[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        p = tl.exp2(logits - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None])
        row_max = new_max
    out = acc / row_sum[:, None]
    out_offs = rows[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + base + out_offs, out.to(out_ptr.dtype.element_ty), mask=row_mask)


@triton.jit
def _compose(decay_left, value_left, decay_right, value_right):
    return decay_left * decay_right, value_left * decay_right + value_right


@triton.jit
def linear_recurrence(decay_ptr, x_ptr, out_ptr, cols, BLOCK: tl.constexpr):
    """h[t] = decay[t] * h[t-1] + x[t] along each row, as an associative scan."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < cols
    decay = tl.load(decay_ptr + row * cols + offs, mask=mask, other=1.0)
    x = tl.load(x_ptr + row * cols + offs, mask=mask, other=0.0)
    _, h = tl.associative_scan((decay, x), 0, _compose)
    tl.store(out_ptr + row * cols + offs, h, mask=mask)


@triton.jit
def histogram(x_ptr, out_ptr, n, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """A histogram per program in shared memory, added to the global one with atomics."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0)
    counts = tl.histogram(x, BINS, mask=mask)
    tl.atomic_add(out_ptr + tl.arange(0, BINS), counts)


@triton.jit
def row_sort(x_ptr, sorted_ptr, BLOCK: tl.constexpr):
    """Bitonic sort: exchanges within lanes, warps and the whole CTA."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sorted_ptr + offs, tl.sort(tl.load(x_ptr + offs)))


@triton.jit
def philox(out_ptr, seed, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(seed, tl.program_id(0) * BLOCK + offs)
    base = out_ptr + tl.program_id(0) * 4 * BLOCK + offs
    tl.store(base, a)
    tl.store(base + BLOCK, b)
    tl.store(base + 2 * BLOCK, c)
    tl.store(base + 3 * BLOCK, d)


@triton.jit
def elementary_functions(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out[f, i] = f(x[i]) for positive x."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=1.0).to(tl.float32)
    y = out_ptr + offs
    tl.store(y, tl.exp(-x), mask=mask)
    tl.store(y + n, tl.log(x), mask=mask)
    tl.store(y + 2 * n, tl.sin(x), mask=mask)
    tl.store(y + 3 * n, tl.cos(x), mask=mask)
    tl.store(y + 4 * n, tl.sqrt(x), mask=mask)
    tl.store(y + 5 * n, tl.rsqrt(x), mask=mask)
    tl.store(y + 6 * n, tl.erf(x), mask=mask)
    tl.store(y + 7 * n, tl.sigmoid(x), mask=mask)


@triton.jit
def cast(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x.to(out_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def integer_division(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    """64-bit quotient, then remainder, of signed numbers; no machine instruction divides them."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    base = out_ptr + tl.program_id(0) * BLOCK + offs
    tl.store(base, x // y)
    tl.store(base + BLOCK, x % y)


@triton.jit
def atomics(index_ptr, x_ptr, out_ptr, bins, BLOCK: tl.constexpr):
    """Many lanes on few addresses: out[op, bin] over add, max, min, and, or, xor."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = out_ptr + tl.load(index_ptr + offs)
    x = tl.load(x_ptr + offs)
    tl.atomic_add(y, x)
    tl.atomic_max(y + bins, x)
    tl.atomic_min(y + 2 * bins, x)
    tl.atomic_and(y + 3 * bins, x)
    tl.atomic_or(y + 4 * bins, x)
    tl.atomic_xor(y + 5 * bins, x)


@triton.jit
def locked_sum(x_ptr, lock_ptr, sum_ptr, BLOCK: tl.constexpr):
    """Programs add to one row in turn, each while it holds a spin lock."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + offs)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(sum_ptr + offs, tl.load(sum_ptr + offs) + x)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def row_argmax(x_ptr, out_ptr, stride, cols, BLOCK: tl.constexpr):
    """Index of the first largest element."""
    offs = tl.arange(0, BLOCK)
    mask = offs < cols
    x = tl.load(x_ptr + tl.program_id(0) * stride + offs, mask=mask, other=float("-inf"))
    tl.store(out_ptr + tl.program_id(0), tl.argmax(x, axis=0, tie_break_left=True))


@triton.jit
def matmul_descriptors(
    a_desc, b_desc, out_desc, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """a[m, k] @ b[n, k]^T through tensor maps; programs take turns at the tiles (persistent).

    SPECIALIZE: warps of their own for the copies.
    """
    across = tl.cdiv(n, BLOCK_N)
    tiles = tl.cdiv(m, BLOCK_M) * across
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row = tile // across * BLOCK_M
        col = tile % across * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
        for start in tl.range(0, k, BLOCK_K, warp_specialize=SPECIALIZE):
            a = a_desc.load([row, start])
            b = b_desc.load([col, start])
            acc = tl.dot(a, b.T, acc, out_dtype=ACC)
        out_desc.store([row, col], acc.to(out_desc.dtype))


@triton.jit
def flash_attention_descriptors(
    q_desc, k_desc, v_desc, out_desc, seq, scale_log2,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """flash_attention through tensor maps of [head * seq, HEAD_DIM]; blocks divide seq."""
    base = tl.program_id(1) * seq
    first = tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q = q_desc.load([base + first, 0])
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    end = tl.minimum(seq, first + BLOCK_M) if CAUSAL else seq
    for start in range(0, end, BLOCK_N):
        k = k_desc.load([base + start, 0])
        logits = tl.dot(q, k.T) * scale_log2
        if CAUSAL:
            cols = start + tl.arange(0, BLOCK_N)
            logits = tl.where(cols[None, :] <= rows[:, None], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        p = tl.exp2(logits - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(p, axis=1)
        v = v_desc.load([base + start, 0])
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None])
        row_max = new_max
    out = acc / row_sum[:, None]
    out_desc.store([base + first, 0], out.to(out_desc.dtype))
