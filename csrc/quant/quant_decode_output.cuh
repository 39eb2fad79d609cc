// What a decode kernel does with the sums of its tiles: it adds those of a row of tiles in
// ascending order of k, and runs the epilogue. Gate and up that are two matrices meet here: a
// thread has the sums of the same two rows of both.
#pragma once

#include "common/f32_pair.cuh"
#include "linear/linear_epilogue.cuh"
#include "quant/quant_decode_x.cuh"

namespace mk {

// Which of the matrices has a row of tiles.
__device__ __forceinline__ const QuantDecodeMatrix& matrix_of(const QuantDecodeMatrix* w, int row) {
    while (row >= w->end) ++w;
    return *w;
}

// Rows of tiles and groups that a block multiplies before it adds.
struct QuantRound {
    int first_row, num_rows;  // every gridDim.x'th; of gate and up: of each
    int num_tiles;            // rows of tiles of all of w
    int first_group, num_groups;
    int num_quarters;    // of all of w
    uint32_t row_bytes;  // of sums, from one row of tiles to the next one
};

// Of a tile.
template <int kTokenTiles>
constexpr int quant_sums_bytes = quant_slot_bytes(kTokenTiles * kQuantTokens);

__device__ __forceinline__ float4 as_float4(const uint4& v) {
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

__device__ __forceinline__ uint4 as_uint4(const float4& v) {
    return {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
}

// total += the sums of a tile's groups, in ascending order; kStep bytes from one to the next.
template <int kStep>
__device__ __forceinline__ void add_groups(float4& total, int num_groups, uint32_t smem_y) {
    const auto add = [&](const float4& y) {
        const float2 low = add_pair({total.x, total.y}, {y.x, y.y});
        const float2 high = add_pair({total.z, total.w}, {y.z, y.w});
        total = {low.x, low.y, high.x, high.y};
    };
    MK_NO_UNROLL
    for (; num_groups >= 8; num_groups -= 8) {
        static_for<8>([&](auto i) { add(as_float4(ptx::ld_shared_v4<i * kStep>(smem_y))); });
        smem_y += 8 * kStep;
    }
    MK_NO_UNROLL
    for (; num_groups > 0; --num_groups) {
        add(as_float4(ptx::ld_shared_v4(smem_y)));
        smem_y += kStep;
    }
}

// Totals of two rows of gate and of up, times their units, to those of gate's and up's first row,
// and of their second one.
__device__ __forceinline__ void pair_rows(float4 (&totals)[2], float unit, float unit_up) {
    const float4 gate = totals[0], up = totals[1];
    totals[0] = {gate.x * unit, up.x * unit_up, gate.z * unit, up.z * unit_up};
    totals[1] = {gate.y * unit, up.y * unit_up, gate.w * unit, up.w * unit_up};
}

// Tiles that a thread adds at a time.
constexpr int kQuantAddedTiles = 2;

// Sums of the round's tiles to outputs: a thread has those of two rows and two tokens; kIsPair:
// of a tile of gate and one of up, which it orders as if their rows came by turns. With chunks of k
// it keeps the totals behind the sums until the last one.
template <int kTokenTiles, bool kIsPair>
__device__ __forceinline__ void add_round(const QuantDecodeArgs& args, const QuantRound& round,
                                          const QuantSmem& smem, uint32_t smem_sums, bool is_first,
                                          bool is_last) {
    constexpr int kTileThreads = 32 * kTokenTiles;
    constexpr int kAtOnce = kQuantThreads / kTileThreads;  // tiles
    static_assert(!kIsPair || kQuantAddedTiles == 2);
    const int m = part_of<kTokenTiles>(args).m;
    const uint32_t thread = ptx::mov_u32_tid_x();
    const int token = thread % kTileThreads / 32 * kQuantTokens + thread % 4 * 2;
    if (token >= m) return;
    const int num_tiles = kIsPair ? 2 * round.num_rows : round.num_rows;
    const int step = kIsPair ? round.num_rows : kAtOnce;  // to a thread's next tile
    for (int first = thread / kTileThreads; first < round.num_rows;
         first += kIsPair ? kAtOnce : kQuantAddedTiles * kAtOnce) {
        const uint32_t first_y = smem_sums + first * round.row_bytes + thread % kTileThreads * 16;
        const auto kept = [&](int i) {
            return smem_sums + ptx::mov_b32(args.shape.totals_at) +
                   ((first + i * step) * kTileThreads + thread % kTileThreads) * 16;
        };
        float4 totals[kQuantAddedTiles]{};
        static_for<kQuantAddedTiles>([&](auto i) {
            if (first + i * step >= num_tiles) return;
            if (!is_first) totals[i] = as_float4(ptx::ld_shared_v4(kept(i)));
            add_groups<quant_sums_bytes<kTokenTiles>>(totals[i], round.num_groups,
                                                      first_y + i * step * round.row_bytes);
        });
        if (!is_last) {
            static_for<kQuantAddedTiles>([&](auto i) {
                if (first + i * step >= num_tiles) return;
                ptx::st_shared_v4(kept(i), as_uint4(totals[i]));
            });
            continue;
        }
        if constexpr (kIsPair) pair_rows(totals, args.w[0].unit, args.w[1].unit);
        with_epilogue(args.to, [&](auto epilogue) {
            using Epilogue = decltype(epilogue);
            using Row = typename Epilogue::Row;
            if constexpr (kIsPair && !Epilogue::kJoinsPairs) return;
            if constexpr (requires { epilogue.in_pairs; }) epilogue.in_pairs = *smem.in_pairs;
            const uint8_t* const rows = smem.rows + token * kQuantRowPitch;
            const float* const unscale = smem.unscale + token;
            static_for<kQuantAddedTiles>([&](auto i) {
                const int tile = kIsPair ? first : first + i * kAtOnce;
                if (tile >= round.num_rows) return;
                const int row = round.first_row + tile * static_cast<int>(gridDim.x);
                const int row_of_w = row * kQuantTileRows + thread % 32 / 4 * 2;
                const auto column = epilogue.column(kIsPair ? 2 * (row_of_w + i) : row_of_w);
                const float unit = kIsPair ? 1.f : matrix_of(args.w, row).unit;
                const float4& y = totals[i];
                const auto store = [&](int r, float y0, float y1) {
                    const Row& row = *reinterpret_cast<const Row*>(rows + r * kQuantRowPitch);
                    epilogue.store(row, column, y0 * unit * unscale[r], y1 * unit * unscale[r]);
                };
                store(0, y.x, y.y);
                if (token + 1 < m) store(1, y.z, y.w);
            });
        });
    }
}

// Where each row's outputs go, and whether in pairs, for add_round.
template <int kTokenTiles>
__device__ __forceinline__ void set_rows(const QuantDecodeArgs& args, const QuantSmem& smem) {
    const int r = threadIdx.x;
    if (r >= part_of<kTokenTiles>(args).m) return;
    with_epilogue(args.to, [&](const auto& epilogue) {
        using Row = typename std::decay_t<decltype(epilogue)>::Row;
        static_assert(sizeof(Row) <= kQuantEpilogueRowBytes);
        *reinterpret_cast<Row*>(smem.rows + r * kQuantRowPitch) =
            epilogue.row(part_of<kTokenTiles>(args).first + r);
        if constexpr (requires { epilogue.in_pairs; }) {
            if (r == 0) *smem.in_pairs = epilogue.in_pairs;
        }
    });
}

}  // namespace mk
