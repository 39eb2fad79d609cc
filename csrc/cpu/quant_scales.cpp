// mk_cpu_nonfinite_scales: a look at the scales of GGUF blocks, at the speed of memory.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "cpu/chunks.h"
#include "quant/quant_plan.h"

namespace mk::cpu {
namespace {

// Where the half-precision numbers of a block begin. Where there is one, both are it.
struct ScaleOffsets {
    int first, second;
};

ScaleOffsets scale_offsets(int32_t type) {
    switch (type) {
        case MK_Q4_1:
        case MK_Q5_1:
        case MK_Q4_K:
        case MK_Q5_K:
            return {0, 2};
        case MK_Q2_K:
            return {80, 82};
        case MK_Q3_K:
            return {108, 108};
        case MK_Q6_K:
            return {208, 208};
        default:
            return {0, 0};
    }
}

bool has_nonfinite_scale(const uint8_t* block, int64_t blocks, int bytes, ScaleOffsets at) {
    constexpr uint32_t kExponent = 0x7c00;  // all ones: infinite or NaN
    bool found = false;
    for (int64_t b = 0; b < blocks; ++b, block += bytes) {
        uint16_t first, second;
        std::memcpy(&first, block + at.first, 2);
        std::memcpy(&second, block + at.second, 2);
        found |= (first & kExponent) == kExponent || (second & kExponent) == kExponent;
    }
    return found;
}

mk_status check(const mk_cpu_quant_blocks& m, const std::string& name) {
    const auto field = [&](const char* what) { return name + what; };
    MK_TRY(check_size(field("rows").c_str(), m.rows, 0, INT32_MAX));
    MK_TRY(check_size(field("k").c_str(), m.k, 0, 1 << 20));
    MK_TRY(check_quant_type(field("type").c_str(), m.type, "k", m.k));
    const QuantFormat format = quant_format(m.type);
    const int64_t least = int64_t{m.k} / format.block_k * format.block_bytes;
    MK_REQUIRE(m.w || m.rows == 0 || least == 0, MK_ERR_NULL, "%sw is NULL", name.c_str());
    MK_REQUIRE(m.rows <= 1 || m.w_row_bytes >= least, MK_ERR_STRIDE,
               "%sw_row_bytes must be at least the %lld bytes of a row, got %lld", name.c_str(),
               static_cast<long long>(least), static_cast<long long>(m.w_row_bytes));
    return MK_OK;
}

// The first row with such a scale, or -1.
mk_status find_row(const mk_cpu_quant_blocks& m, int num_threads, int32_t* row) {
    constexpr int64_t kChunkBytes = 256 << 10;
    const QuantFormat format = quant_format(m.type);
    const int64_t blocks = m.k / format.block_k, row_bytes = blocks * format.block_bytes;
    const int64_t each = std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, row_bytes));
    const ScaleOffsets at = scale_offsets(m.type);
    std::atomic<int32_t> least{m.rows};
    const auto look = [&](int64_t chunk, void*) {
        const int64_t end = std::min<int64_t>(m.rows, (chunk + 1) * each);
        for (int64_t r = chunk * each; r < end; ++r) {
            const auto* const start = static_cast<const uint8_t*>(m.w) + r * m.w_row_bytes;
            if (!has_nonfinite_scale(start, blocks, format.block_bytes, at)) continue;
            const auto found = static_cast<int32_t>(r);
            for (int32_t seen = least; found < seen;) {
                if (least.compare_exchange_weak(seen, found)) break;
            }
            return;
        }
    };
    MK_REQUIRE(for_chunks(num_threads, ceil_div<int64_t>(m.rows, each), 0, look), MK_ERR_MEMORY,
               "no memory for a thread's scratch");
    *row = least < m.rows ? least.load() : -1;
    return MK_OK;
}

}  // namespace
}  // namespace mk::cpu

extern "C" mk_status mk_cpu_nonfinite_scales(const mk_cpu_quant_blocks* matrices, int32_t count,
                                             int32_t num_threads, int32_t* found) {
    using namespace mk;
    MK_TRY(check_size("count", count, 0, INT32_MAX));
    MK_TRY(check_size("num_threads", num_threads, 1, cpu::kMaxThreads));
    if (count == 0) return MK_OK;
    MK_REQUIRE(matrices, MK_ERR_NULL, "matrices is NULL");
    MK_REQUIRE(found, MK_ERR_NULL, "found is NULL");
    for (int i = 0; i < count; ++i) {
        MK_TRY(cpu::check(matrices[i], "matrices[" + std::to_string(i) + "]."));
    }
    for (int i = 0; i < count; ++i) {
        MK_TRY(cpu::find_row(matrices[i], num_threads, found + i));
    }
    return MK_OK;
}
