// mk_cpu_linear_quant and mk_cpu_dequantize: checks, and division of the work among threads.
#include <algorithm>
#include <string>

#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/pool.h"
#include "cpu/quant.h"
#include "quant/quant_plan.h"

namespace mk::cpu {
namespace {

// Below this many multiply-adds, waking a thread takes longer than the work.
constexpr int64_t kMinParallelMacs = 64 << 10;
// Multiply-adds of a chunk, at least: a few microseconds.
constexpr int64_t kChunkMacs = 96 << 10;
// Rows of integers of x from which on products by pairs are faster: they take longer to unpack w.
constexpr int64_t kPairsRows = 12;
// Groups of rounded x at a time (32 MiB); more are done in several passes over w.
constexpr int64_t kMaxGroups = (32 << 20) / sizeof(XGroup);

constexpr IsaTable<QuantKernels> kQuant = MK_ISA_TABLE(kQuant);

mk_status find_kernels(int32_t isa, const QuantKernels** kernels) {
    int level = 0;
    MK_TRY(find_isa(isa, &level));
#if defined(__x86_64__)
    // The results are the same.
    if (level >= MK_CPU_AVX512 && !__builtin_cpu_supports("avx512vnni")) level = MK_CPU_AVX2;
#endif
    *kernels = &kQuant[level];
    return MK_OK;
}

// Whether a processor adds vectors while it multiplies others (quant_pairs.h).
bool adds_beside_products(const QuantKernels& kernels) {
#if defined(__x86_64__)
    static const bool amd = __builtin_cpu_is("amd");
    return amd && &kernels == &kQuantAvx512;
#else
    return false;
#endif
}

QuantScratch* thread_scratch() {
    thread_local Buffer buffer;
    return static_cast<QuantScratch*>(buffer.reserve(sizeof(QuantScratch)));
}

XGroup* thread_groups(int64_t count) {
    thread_local Buffer buffer;
    return static_cast<XGroup*>(buffer.reserve(std::max<int64_t>(count, 1) * sizeof(XGroup)));
}

// Runs f(chunk, scratch) for every chunk. The caller's scratch is there already.
template <class F>
void for_chunks(int num_threads, int64_t num_chunks, const F& f) {
    parallel(
        num_threads, num_chunks,
        [](void* context, Chunks& chunks) {
            QuantScratch* const scratch = thread_scratch();
            if (!scratch) return;  // a worker without memory: the others do its share
            const DefaultFloatMode mode;
            for (int64_t c; (c = chunks.next()) >= 0;)
                (*static_cast<const F*>(context))(c, *scratch);
        },
        const_cast<F*>(&f));
}

// ---- products ----

int32_t out_dtype(const mk_cpu_linear_quant_params& p, const mk_cpu_quant_product& product) {
    return product.out_dtype ? product.out_dtype : p.dtype;
}

// Rows of x that fit into the rounded groups.
void run_slab(const QuantProducts& kernels, const QuantTask& task, int64_t first_row) {
    const mk_cpu_linear_quant_params& p = task.p;
    int64_t tiles = 0, most_rows = 0;
    for (int i = 0; i < p.num_products; ++i) {
        tiles += ceil_div(p.products[i].n, kTileRows);
        most_rows = std::max<int64_t>(most_rows, p.products[i].n);
    }
    const double macs = static_cast<double>(p.m) * p.k * tiles * kTileRows;
    const int threads = macs < kMinParallelMacs ? 1 : p.num_threads;
    if (p.m == 1 || threads == 1) {
        kernels.round_x(task, 0, p.m);
    } else {
        constexpr int64_t kRoundRows = 4;
        for_chunks(threads, ceil_div<int64_t>(p.m, kRoundRows), [&](int64_t c, QuantScratch&) {
            kernels.round_x(task, c * kRoundRows, std::min<int64_t>(p.m, (c + 1) * kRoundRows));
        });
    }
    // Blocks of rows of equal size: the last one would unpack all of w for a few rows.
    const int64_t most_m = kBlockRows / task.limbs, m_blocks = ceil_div<int64_t>(p.m, most_m);
    const int64_t block_m = ceil_div<int64_t>(p.m, m_blocks);
    // Few rows read w as it comes; more can wait for each other (kTurns).
    const int64_t turns = block_m * task.limbs >= kPairsRows ? kTurns : 1;
    const int64_t wanted = kChunkMacs / (std::max<int64_t>(p.k, 1) * kTileRows * block_m);
    const int64_t tiles_each =
        std::max<int64_t>(1, std::min(std::max(wanted, turns), tiles / (4 * int64_t{threads})));
    const int64_t chunks_each = ceil_div(tiles, tiles_each);  // of a block of rows
    for_chunks(threads, m_blocks * chunks_each, [&](int64_t chunk, QuantScratch& scratch) {
        const int64_t m = chunk / chunks_each * block_m;
        const int64_t m_end = std::min<int64_t>(p.m, m + block_m);
        int64_t tile = chunk % chunks_each * tiles_each;
        const int64_t tile_end = std::min(tiles, tile + tiles_each);
        for (int64_t first = 0, i = 0; i < p.num_products && first < tile_end; ++i) {
            mk_cpu_quant_product product = p.products[i];
            const int64_t end = first + ceil_div(product.n, kTileRows);
            const auto skip = [&](const void* base, int64_t stride, int32_t dtype) {
                return base ? static_cast<const char*>(base) +
                                  first_row * stride * dtype_bytes(dtype)
                            : nullptr;
            };
            product.out_dtype = out_dtype(p, product);
            product.other = skip(product.other, product.other_stride, p.dtype);
            product.out =
                const_cast<char*>(skip(product.out, product.out_stride, product.out_dtype));
            const int64_t most = product.epilogue == MK_EPILOGUE_SWIGLU ? turns / 2 : turns;
            for (int64_t taken; tile < std::min(end, tile_end); tile += taken) {
                taken = std::clamp<int64_t>(std::min(end, tile_end) - tile, 1,
                                            std::max<int64_t>(most, 1));
                const int64_t n = (tile - first) * kTileRows;
                kernels.product(task, product, m, m_end, n,
                                std::min<int64_t>(product.n, n + taken * kTileRows), scratch);
            }
            first = end;
        }
    });
}

mk_status run(const mk_cpu_linear_quant_params& p, const QuantKernels& kernels) {
    const int limbs = p.dtype == MK_BF16 || p.x_bits ? 1 : 2;
    const int64_t groups = std::max(ceil_div(p.k, kGroup), 1) * int64_t{limbs};  // of a row
    const int64_t slab =
        std::min<int64_t>(p.m, std::max<int64_t>(kMaxGroups / groups, kBlockRows / limbs));
    QuantTask task{p, thread_groups(slab * groups), slab * limbs, limbs};
    const QuantProducts& products =
        adds_beside_products(kernels) && !p.x_bits && slab * limbs >= kPairsRows ? kQuantPairsAvx512
                                                                                 : kernels.products;
    MK_REQUIRE(task.x && thread_scratch(), MK_ERR_MEMORY, "no memory for %lld rows of rounded x",
               static_cast<long long>(slab));
    const DefaultFloatMode mode;
    for (int64_t m = 0; m < p.m; m += slab) {
        task.p.x = static_cast<const char*>(p.x) + m * p.x_stride * dtype_bytes(p.dtype);
        task.p.m = static_cast<int32_t>(std::min(slab, p.m - m));
        run_slab(products, task, m);
    }
    return MK_OK;
}

mk_status check_dtype(int32_t dtype) {
    MK_REQUIRE(dtype == MK_BF16 || dtype == MK_F16 || dtype == MK_F32, MK_ERR_DTYPE,
               "dtype must be MK_BF16 (1), MK_F16 (2) or MK_F32 (3), got %d", dtype);
    return MK_OK;
}

mk_status check_blocks(const std::string& name, const void* w, int64_t row_bytes, int32_t rows,
                       int32_t type, int32_t k) {
    const QuantFormat format = quant_format(type);
    const int64_t least = int64_t{k} / format.block_k * format.block_bytes;
    MK_REQUIRE(w || least == 0, MK_ERR_NULL, "%s is NULL", name.c_str());
    MK_REQUIRE(rows <= 1 || row_bytes >= least, MK_ERR_STRIDE,
               "%s_row_bytes must be at least the %lld bytes of a row, got %lld", name.c_str(),
               static_cast<long long>(least), static_cast<long long>(row_bytes));
    return MK_OK;
}

mk_status check_product(const mk_cpu_linear_quant_params& p, const mk_cpu_quant_product& product,
                        const std::string& name) {
    const auto field = [&](const char* what) { return name + what; };
    MK_TRY(check_size(field("n").c_str(), product.n, 0, INT32_MAX));
    MK_TRY(check_quant_type(field("type").c_str(), product.type, "k", p.k));
    MK_REQUIRE(MK_EPILOGUE_NONE <= product.epilogue && product.epilogue <= MK_EPILOGUE_SWIGLU,
               MK_ERR_VALUE,
               "%sepilogue must be MK_EPILOGUE_NONE (0) ... MK_EPILOGUE_SWIGLU (4), got %d",
               name.c_str(), product.epilogue);
    const int32_t out = out_dtype(p, product);
    MK_REQUIRE(out == p.dtype || out == MK_F32, MK_ERR_DTYPE,
               "%sout_dtype must be dtype (%d) or MK_F32 (3), got %d", name.c_str(), p.dtype, out);
    const bool has_up = product.epilogue == MK_EPILOGUE_SWIGLU;
    const bool has_other =
        product.epilogue == MK_EPILOGUE_MUL || product.epilogue == MK_EPILOGUE_ADD;
    MK_REQUIRE(has_up || !product.w_up, MK_ERR_VALUE, "%sw_up must be NULL for epilogue %d",
               name.c_str(), product.epilogue);
    MK_REQUIRE(has_other || !product.other, MK_ERR_VALUE, "%sother must be NULL for epilogue %d",
               name.c_str(), product.epilogue);
    if (has_up) MK_TRY(check_quant_type(field("up_type").c_str(), product.up_type, "k", p.k));
    if (p.m == 0 || product.n == 0) return MK_OK;
    MK_TRY(check_blocks(field("w"), product.w, product.w_row_bytes, product.n, product.type, p.k));
    if (has_up) {
        MK_TRY(check_blocks(field("w_up"), product.w_up, product.w_up_row_bytes, product.n,
                            product.up_type, p.k));
    }
    if (has_other) {
        MK_TRY(check_rows(field("other").c_str(), product.other, product.other_stride, p.m,
                          product.n, p.dtype));
    }
    return check_rows(field("out").c_str(), product.out, product.out_stride, p.m, product.n, out);
}

mk_status check(const mk_cpu_linear_quant_params& p) {
    MK_TRY(check_dtype(p.dtype));
    MK_TRY(check_size("m", p.m, 0, INT32_MAX));
    MK_TRY(check_size("k", p.k, 0, 1 << 20));
    MK_TRY(check_size("num_threads", p.num_threads, 1, 256));
    MK_TRY(check_size("num_products", p.num_products, 0, 64));
    MK_REQUIRE(p.x_bits == 0 || p.x_bits == 8, MK_ERR_VALUE, "x_bits must be 0 or 8, got %d",
               p.x_bits);
    if (p.m > 0 && p.k > 0) MK_TRY(check_rows("x", p.x, p.x_stride, p.m, p.k, p.dtype));
    if (p.num_products == 0) return MK_OK;
    MK_REQUIRE(p.products, MK_ERR_NULL, "products is NULL");
    for (int i = 0; i < p.num_products; ++i) {
        MK_TRY(check_product(p, p.products[i], "products[" + std::to_string(i) + "]."));
    }
    return MK_OK;
}

// ---- rows of w ----

mk_status check(const mk_cpu_dequantize_params& p) {
    MK_TRY(check_dtype(p.dtype));
    MK_TRY(check_size("tokens", p.tokens, 0, INT32_MAX));
    MK_TRY(check_size("rows", p.rows, 0, INT32_MAX));
    MK_TRY(check_size("k", p.k, 0, 1 << 20));
    MK_TRY(check_size("num_threads", p.num_threads, 1, 256));
    MK_TRY(check_quant_type("type", p.type, "k", p.k));
    if (p.tokens == 0 || p.k == 0) return MK_OK;
    if (p.ids) MK_TRY(check_indices("ids", p.ids, p.tokens, p.ids_dtype));
    MK_REQUIRE(p.ids || p.tokens <= p.rows, MK_ERR_SHAPE,
               "tokens must be at most rows (%d) when ids is NULL, got %d", p.rows, p.tokens);
    MK_REQUIRE(p.rows > 0, MK_ERR_SHAPE, "rows must be at least 1, got %d", p.rows);
    MK_TRY(check_blocks("w", p.w, p.w_row_bytes, p.rows, p.type, p.k));
    return check_rows("out", p.out, p.out_stride, p.tokens, p.k, p.dtype);
}

mk_status run(const mk_cpu_dequantize_params& p, const QuantKernels& kernels) {
    MK_REQUIRE(thread_scratch(), MK_ERR_MEMORY, "no memory for %zu bytes of scratch",
               sizeof(QuantScratch));
    const int threads = static_cast<double>(p.tokens) * p.k < kMinParallelMacs ? 1 : p.num_threads;
    constexpr int64_t kEach = 16;  // rows
    for_chunks(threads, ceil_div<int64_t>(p.tokens, kEach), [&](int64_t c, QuantScratch& scratch) {
        kernels.dequantize(p, c * kEach, std::min<int64_t>(p.tokens, (c + 1) * kEach),
                           scratch.panel);
    });
    return MK_OK;
}

}  // namespace
}  // namespace mk::cpu

extern "C" mk_status mk_cpu_linear_quant(const mk_cpu_linear_quant_params* params) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(mk::cpu::check(*params));
    const mk::cpu::QuantKernels* kernels = nullptr;
    MK_TRY(mk::cpu::find_kernels(params->isa, &kernels));
    if (params->m == 0 || params->num_products == 0) return MK_OK;
    return mk::cpu::run(*params, *kernels);
}

extern "C" mk_status mk_cpu_dequantize(const mk_cpu_dequantize_params* params) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(mk::cpu::check(*params));
    const mk::cpu::QuantKernels* kernels = nullptr;
    MK_TRY(mk::cpu::find_kernels(params->isa, &kernels));
    if (params->tokens == 0 || params->k == 0) return MK_OK;
    return mk::cpu::run(*params, *kernels);
}
