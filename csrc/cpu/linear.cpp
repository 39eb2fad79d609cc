// mk_cpu_linear: checks, choice of the instruction set, and division of the work among threads.
#include "cpu/linear.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/pool.h"
#include "launch/op.h"

namespace mk::cpu {
namespace {

// Below this many multiply-adds, waking a thread takes longer than the work.
constexpr int64_t kMinParallelMacs = 20000;
// Multiply-adds of a chunk (per row of x): a few microseconds.
constexpr int64_t kStreamChunkMacs = 64 << 10;
// Floats of packed x at a time (32 MiB); more rows than that are done in several passes over w.
constexpr int64_t kMaxPackedX = 8 << 20;

Scratch* thread_scratch() {
    thread_local Buffer buffer;
    return static_cast<Scratch*>(buffer.reserve(sizeof(Scratch)));
}

float* thread_packed_x(int64_t floats) {
    thread_local Buffer buffer;
    return static_cast<float*>(buffer.reserve(std::max<int64_t>(floats, 1) * sizeof(float)));
}

constexpr IsaTable<LinearKernels> kLinear = MK_ISA_TABLE(kLinear);

const LinearKernels& kernels_of(int isa) {
#if defined(__x86_64__)
    if (isa == MK_CPU_AVX512BF16) return kLinearAvx512Bf16;
#endif
    return kLinear[isa];
}

// Whether subnormals count as zeros, as they do in products of bfloat16.
bool flushes(const mk_cpu_linear_params& p) { return p.dtype == MK_BF16; }

// ---- division of the work ----

// Runs f(chunk, scratch) for every chunk. The caller's scratch is there already.
template <class F>
void for_chunks(const LinearTask& task, int num_threads, int64_t num_chunks, const F& f) {
    struct Context {
        const F& f;
        bool flush;
    } context{f, flushes(task.p)};
    parallel(
        num_threads, num_chunks,
        [](void* opaque, Chunks& chunks) {
            Scratch* const scratch = thread_scratch();
            if (!scratch) return;  // a worker without memory: the others do its share
            const Context& own = *static_cast<Context*>(opaque);
            const DefaultFloatMode mode(own.flush);
            for (int64_t c; (c = chunks.next()) >= 0;) own.f(c, *scratch);
        },
        &context);
}

// At most kBlockM rows that all fit into packed x.
void run_stream(const LinearKernels& kernels, const LinearTask& task, int num_threads) {
    const int64_t n = task.p.n;
    kernels.pack_x(task, 0, task.p.m);
    constexpr int64_t kGrain = 24;  // a multiple of every tile_n
    static_assert(kStreamMaxN % kGrain == 0);
    const int64_t wanted =
        std::min(kStreamChunkMacs / std::max(task.p.k, 1), ceil_div<int64_t>(n, 8 * num_threads));
    const int64_t rows =
        std::min<int64_t>(ceil_div(std::max<int64_t>(wanted, 1), kGrain) * kGrain, kStreamMaxN);
    for_chunks(task, num_threads, ceil_div(n, rows), [&](int64_t chunk, Scratch& scratch) {
        kernels.stream(task, chunk * rows, std::min(n, (chunk + 1) * rows), scratch);
    });
}

void run_blocks(const LinearKernels& kernels, const LinearTask& task, int num_threads) {
    const int64_t m = task.p.m, n = task.p.n;
    constexpr int64_t kPackRows = 12;  // a multiple of every tile_m
    static_assert(kBlockM % kPackRows == 0);
    // Blocks of equal size: the last one would convert all of w for a few rows.
    const int64_t even = ceil_div<int64_t>(m, ceil_div<int64_t>(m, kBlockM));
    const int64_t block_m = ceil_div(even, kPackRows) * kPackRows;
    const int64_t m_blocks = ceil_div(m, block_m), n_blocks = ceil_div<int64_t>(n, kBlockN);
    for_chunks(task, num_threads, ceil_div(m, kPackRows), [&](int64_t chunk, Scratch&) {
        kernels.pack_x(task, chunk * kPackRows, std::min(m, (chunk + 1) * kPackRows));
    });
    for_chunks(task, num_threads, n_blocks * m_blocks, [&](int64_t chunk, Scratch& scratch) {
        const int64_t i = chunk / n_blocks * block_m, j = chunk % n_blocks * kBlockN;
        kernels.block(task, i, std::min(m, i + block_m), j, std::min(n, j + kBlockN), scratch);
    });
}

int32_t out_dtype(const mk_cpu_linear_params& p) { return p.out_dtype ? p.out_dtype : p.dtype; }

mk_status run(const mk_cpu_linear_params& p, const LinearKernels& kernels) {
    const int64_t columns = p.dtype == MK_BF16 ? 2 * kLanes : kLanes;  // of a step
    const bool in_pairs = p.dtype == MK_BF16 && kernels.multiplies_bf16;
    LinearTask task{p, nullptr, ceil_div<int64_t>(p.k, columns) * (in_pairs ? kLanes : columns)};
    const int64_t most = kMaxPackedX / std::max<int64_t>(task.packed_k, 1) / kBlockM * kBlockM;
    const int64_t slab = std::min<int64_t>(p.m, std::max<int64_t>(most, kBlockM));
    task.packed_x = thread_packed_x(slab * task.packed_k);
    MK_REQUIRE(task.packed_x && thread_scratch(), MK_ERR_MEMORY,
               "no memory for %lld x %lld floats of packed x", static_cast<long long>(slab),
               static_cast<long long>(task.packed_k));
    const DefaultFloatMode mode(flushes(p));
    const int32_t bytes = dtype_bytes(p.dtype), out_bytes = dtype_bytes(out_dtype(p));
    const auto skip_rows = [&](const void* base, int64_t stride, int64_t rows) {
        return base ? static_cast<const char*>(base) + rows * stride * bytes : nullptr;
    };
    for (int64_t i = 0; i < p.m; i += slab) {
        task.p.x = skip_rows(p.x, p.x_stride, i);
        task.p.other = skip_rows(p.other, p.other_stride, i);
        task.p.out = static_cast<char*>(p.out) + i * p.out_stride * out_bytes;
        task.p.m = static_cast<int32_t>(std::min(slab, p.m - i));
        const double macs = static_cast<double>(task.p.m) * p.n * p.k;
        const int threads = macs < kMinParallelMacs ? 1 : p.num_threads;
        if (task.p.m <= kStreamMaxM) {
            run_stream(kernels, task, threads);
        } else {
            run_blocks(kernels, task, threads);
        }
    }
    return MK_OK;
}

mk_status check(const mk_cpu_linear_params& p) {
    MK_REQUIRE(p.dtype == MK_BF16 || p.dtype == MK_F16 || p.dtype == MK_F32, MK_ERR_DTYPE,
               "dtype must be MK_BF16 (1), MK_F16 (2) or MK_F32 (3), got %d", p.dtype);
    MK_REQUIRE(out_dtype(p) == p.dtype || p.out_dtype == MK_F32, MK_ERR_DTYPE,
               "out_dtype must be dtype (%d) or MK_F32 (3), got %d", p.dtype, p.out_dtype);
    MK_TRY(check_size("m", p.m, 0, INT32_MAX));
    MK_TRY(check_size("n", p.n, 0, INT32_MAX));
    MK_TRY(check_size("k", p.k, 0, INT32_MAX));
    MK_REQUIRE(MK_EPILOGUE_NONE <= p.epilogue && p.epilogue <= MK_EPILOGUE_SWIGLU, MK_ERR_VALUE,
               "epilogue must be MK_EPILOGUE_NONE (0) ... MK_EPILOGUE_SWIGLU (4), got %d",
               p.epilogue);
    MK_REQUIRE(1 <= p.num_threads && p.num_threads <= 256, MK_ERR_VALUE,
               "num_threads must be 1 ... 256, got %d", p.num_threads);
    const bool has_up = p.epilogue == MK_EPILOGUE_SWIGLU;
    const bool has_other = p.epilogue == MK_EPILOGUE_MUL || p.epilogue == MK_EPILOGUE_ADD;
    MK_REQUIRE(has_up || !p.w_up, MK_ERR_VALUE, "w_up must be NULL for epilogue %d", p.epilogue);
    MK_REQUIRE(has_other || !p.other, MK_ERR_VALUE, "other must be NULL for epilogue %d",
               p.epilogue);
    if (p.m == 0 || p.n == 0) return MK_OK;
    if (p.k > 0) {
        MK_TRY(check_rows("x", p.x, p.x_stride, p.m, p.k, p.dtype));
        MK_TRY(check_rows("w", p.w, p.w_stride, p.n, p.k, p.dtype));
        if (has_up) MK_TRY(check_rows("w_up", p.w_up, p.w_up_stride, p.n, p.k, p.dtype));
    }
    if (has_other) MK_TRY(check_rows("other", p.other, p.other_stride, p.m, p.n, p.dtype));
    return check_rows("out", p.out, p.out_stride, p.m, p.n, out_dtype(p));
}

}  // namespace
}  // namespace mk::cpu

extern "C" mk_status mk_cpu_linear(const mk_cpu_linear_params* params) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(mk::cpu::check(*params));
    int isa = 0;
    MK_TRY(mk::cpu::find_isa(params->isa, &isa));
    if (params->m == 0 || params->n == 0) return MK_OK;
    return mk::cpu::run(*params, mk::cpu::kernels_of(isa));
}
