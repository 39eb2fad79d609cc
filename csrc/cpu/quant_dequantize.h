// The kernel of mk_cpu_dequantize over Vec, Ints and Order, as quant_kernels.h.
#pragma once

#include "cpu/quant_formats.h"
#include "cpu/tile.h"

namespace mk::cpu {
namespace {

// Row index t of a gather; -1 when it is out of range.
int64_t gathered_row(const mk_cpu_dequantize_params& p, int64_t t) {
    const int64_t id = !p.ids                  ? t
                       : p.ids_dtype == MK_I64 ? static_cast<const int64_t*>(p.ids)[t]
                                               : static_cast<const int32_t*>(p.ids)[t];
    return 0 <= id && id < p.rows ? id : -1;
}

// A group of rows[0 ... 15], `columns` columns, in fp32.
template <class Type>
void decode_group(const uint8_t* const* rows, int columns, QuantPanel& panel,
                  float (&values)[kLanes][kGroup]) {
    constexpr int kBias = Type::kHasMin ? 0 : 1 << Type::kBias;
    unpack_to_panel<Type>(rows, columns, panel, 0);
    for (int r = 0; r < kLanes; ++r) {
        for (int i = 0; i < columns; ++i) {
            values[r][i] = static_cast<float>(Order::column(panel, i, r) - kBias);
        }
        for (int i = 0; i < columns; i += kLanes) {
            const int b = i / Type::kBlock;
            const Vec q = Vec::load(values[r] + i), scale = Vec::set(panel.scale[b][r]);
            if constexpr (Type::kHasMin) {
                Vec::fma(q, scale, Vec::set(panel.minimum[b][r])).store(values[r] + i);
            } else {
                (q * scale).store(values[r] + i);
            }
        }
    }
}

void dequantize(const mk_cpu_dequantize_params& p, int64_t t, int64_t t_end, QuantPanel& panel) {
    for (; t < t_end; t += kLanes) {
        const int count = static_cast<int>(t_end - t < kLanes ? t_end - t : kLanes);
        const uint8_t* rows[kLanes];  // past the last the first one again
        bool valid[kLanes];
        for (int r = 0; r < kLanes; ++r) {
            const int64_t id = gathered_row(p, r < count ? t + r : t);
            valid[r] = id >= 0;
            rows[r] = row<uint8_t>(p.w, p.w_row_bytes, id >= 0 ? id : 0);
        }
        for (int64_t column = 0; column < p.k; column += kGroup) {
            const int columns = static_cast<int>(p.k - column < kGroup ? p.k - column : kGroup);
            alignas(64) float values[kLanes][kGroup];
            with_quant_type(p.type, [&](auto type) {
                using Type = decltype(type);
                decode_group<Type>(rows, columns, panel, values);
                for (const uint8_t*& at : rows) at += columns / Type::kColumns * Type::kBytes;
            });
            with_dtype(p.dtype, [&](auto out) {
                for (int r = 0; r < count; ++r) {
                    auto* to = static_cast<decltype(out)*>(p.out) + p.out_stride * (t + r) + column;
                    for (int i = 0; i < columns; i += kLanes) {
                        const Vec nan = Vec::set(__builtin_nanf(""));
                        (valid[r] ? Vec::load(values[r] + i) : nan).store(to + i, kLanes);
                    }
                }
            });
        }
    }
}

}  // namespace
}  // namespace mk::cpu
