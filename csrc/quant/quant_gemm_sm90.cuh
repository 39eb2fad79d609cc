// y = x w^T for quantised w on Hopper, with wgmma and the bits of quant_decode_sm80.cuh: w is A,
// unpacked in registers, and x, prepared by quant_prepare.cuh, is B in shared memory.
//
//   block = one warpgroup that copies and two that multiply; tile after tile of 128 rows of w x
//   T.tokens rows of x, all of k. Up to 4 blocks share rows of x in a cluster.
//     warpgroup 0    two warps of it fetch (quant_fetch_sm90.cuh)                40 registers
//     warpgroup 1    rows 0-63 of w by wgmma m64 n64 k16                        232
//     warpgroup 2    rows 64-127; a warp has a tile of 16 (quant_layout.h)
//   Of gate and up that are two matrices one has 64 rows of gate, the other the same of up.
//
// Arithmetic: quant_unpack.cuh, quant_x.cuh. P of 32 k starts from 0, and scale * P is added to S;
// the minima meet the sums of x in the same way, and Y of 256 k is added to the total. Scales of 16
// k are in A: the MMAs of 64 k are one chain into S. A of its second half is unpacked under those
// of the first, A of the next 64 k under those of the second.
// 64 k of 32 k each of a warpgroup, whose other half of the time is the other one's:
//
//   P of tokens 0-63     | k 0-31 |        | k 32-63 |
//   P of tokens 64-127            | k 0-31 |         | k 32-63 |
//   schedulers           | unpack | S 0-63 | S 64-127, unpack  | S 0-63 | S 64-127 |
//
// Clocks of an SM for 256 k of 128 x 128, modelled from SASS. Tensor cores 2304, 256 of them for
// the sums. Each scheduler has two warps of (Q4_K) 4 x 204 + 358 instructions, 704 of them FFMA and
// the like for S and Y: 2348, or 2138 without moves, MMAs and shared memory's; Q4_0 2222 (2008),
// Q5_K 2488 (2264). With a scale for 16 k: Q2_K 1520, Q6_K 1748, Q3_K 1770. 128 x 64: 1152, and
// 1416 to 1636 (16 k: 1168 to 1418). L2 gives an SM 28 bytes per clock when all ask. Q4_K takes 39;
// in clusters of 2 24, of 4 16. Totals of tokens 64-127 lie in shared memory: with 64 registers
// each for P, S and totals, some types spill. Descriptors are in uniform registers, as long as
// ptxas knows that all of a warp take the same way; else each wgmma has four instructions more.
// Lost: P under way over the loop's end: ptxas serialises all wgmma (C7514). P of 128 tokens at
// once: 222 of a step's 288 clocks one after the other, and with the group's end all of them.
#pragma once

#include "common/static_for.cuh"
#include "common/wgmma.cuh"
#include "linear/linear_epilogue.cuh"
#include "quant/quant_fetch_sm90.cuh"
#include "quant/quant_gemm_stages.cuh"
#include "quant/quant_x.cuh"

namespace mk {

template <int kType>
constexpr int kQuantTileBytes = quant_tile_bytes(kType, 4);

template <QuantGemmTileSm90 T>
struct QuantGemmSm90 {
    using Ring = QuantRingSm90<T>;
    static constexpr int kGroupRows = Ring::kGroupRows;  // of a warpgroup
    static constexpr int kGroups = Ring::kGroups;
    static constexpr int kScalesAt = Ring::kWAt + T.slots * kQuantGemmSlotBytes;
    static constexpr int kOutAt = kScalesAt + kQuantGemmWarpsSm90 * kQuantGemmScaleBytes;
    static constexpr int kGroupOut = quant_gemm_group_out_bytes(T);
    static constexpr int kRowsAt = kQuantStagedTokens * kQuantStagedPitch;  // in a group's
    static constexpr int kTotalsAt = kOutAt + kGroups * kGroupOut;
    static_assert(kGroupRows == 64, "wgmma's");
    static_assert(kTotalsAt + quant_gemm_totals_bytes(T) == Ring::kBarriersAt);
    static_assert(kGroups == 2);

    // P and S of the two parts of the tokens, which take turns.
    static constexpr int kParts = T.tokens / 64;
    static constexpr int kPartTokens = T.tokens / kParts;
    using Part = float[kPartTokens / 8][4];
    using Sums = Part[kParts];
    // Totals: the first part's in registers, the second's in shared memory.
    static constexpr int kTotalStep = 256 * 16;  // from a thread's next to last four

    // Where a row's outputs go; rows of 40 bytes are in other banks.
    template <class Row>
    struct RowSlot {
        Row row;
        float unscale;
    };

    const Ring ring;
    uint8_t* const smem;  // ring.smem as a pointer

    // ---- the warpgroups that multiply ----

    // What follows from the thread's number is computed where it is used: registers are short.
    static __device__ __forceinline__ int lane() { return ptx::mov_u32_tid_x() % 32; }
    static __device__ __forceinline__ int warp() {
        return ptx::mov_u32_tid_x() / 32 - 4;
    }  // 0 ... 7
    static __device__ __forceinline__ int thread() { return ptx::mov_u32_tid_x() % 128; }
    __device__ __forceinline__ uint8_t* out_of_group() const {
        return smem + kOutAt + group() * kGroupOut;
    }
    static __device__ __forceinline__ int group() { return warp() / 4; }
    static __device__ __forceinline__ void sync_group() { ptx::bar_sync(1 + group(), 128); }
    static __device__ __forceinline__ void sync_groups() { ptx::bar_sync(1 + kGroups, 256); }

    struct Places {
        typename Ring::template Place<T.stages> stage;
        typename Ring::template Place<T.slots> slot;
    };

    // B of a stage. `first`: the descriptor of the first one.
    template <int kRowBytes>
    struct Operand {
        uint64_t first;

        // Of part h, from step `step` of 16 k on.
        __device__ __forceinline__ uint64_t at(int h, int step) const {
            return wgmma_advance(first, h * kPartTokens * kRowBytes + step * 256);
        }
    };
    template <int kRowBytes>
    __device__ __forceinline__ Operand<kRowBytes> operand_of(uint32_t stage) const {
        return {wgmma_plain_operand(ring.x_at(stage), 128, 8 * kRowBytes)};
    }

    // P = A B of 32 k, under way; or P += A B.
    template <bool kAccumulate = false>
    static __device__ __forceinline__ void multiply(Part& p, const uint32_t (&a)[2][4],
                                                    const auto& b, int h, int step) {
        ptx::wgmma<ptx::WgmmaType::kF16, kAccumulate>(p, a[0], b.at(h, step));
        ptx::wgmma<ptx::WgmmaType::kF16, true>(p, a[1], b.at(h, step + 1));
    }
    static __device__ __forceinline__ void start(Part& p, const uint32_t (&a)[2][4], const auto& b,
                                                 int h, int step) {
        ptx::wgmma_fence();
        multiply(p, a, b, h, step);
        ptx::wgmma_commit_group();
    }
    static __device__ __forceinline__ void start_parts(Sums& p, uint32_t (&a)[2][4],
                                                       const auto& b) {
        ptx::pin(a);
        MK_UNROLL
        for (int h = 0; h < kParts; ++h) start(p[h], a, b, h, 0);
    }

    // What is under way ends, and the second half of the stage is started, part by part.
    static __device__ __forceinline__ void turn(Sums& s, Sums& p, float2 scale, uint32_t (&a)[2][4],
                                                const auto& b) {
        ptx::pin(a);
        MK_UNROLL
        for (int h = 0; h < kParts; ++h) {
            ptx::wgmma_wait_group<kParts - 1>();
            ptx::pin(p[h]);
            add(s[h], p[h], scale);
            start(p[h], a, b, h, 2);
        }
    }
    static __device__ __forceinline__ void end(Sums& s, Sums& p, float2 scale) {
        static_for<kParts>([&](auto h) {
            ptx::wgmma_wait_group<kParts - 1 - h>();
            ptx::pin(p[h]);
            add(s[h], p[h], scale);
            ptx::pin(s[h]);  // before the next part is waited for
        });
    }

    // S += A B of 32 k from step `step` of the stage on, under way.
    static __device__ __forceinline__ void add_half(Sums& s, uint32_t (&a)[2][4], const auto& b,
                                                    int step) {
        ptx::pin(a);
        ptx::wgmma_fence();
        MK_UNROLL
        for (int h = 0; h < kParts; ++h) multiply<true>(s[h], a, b, h, step);
        ptx::wgmma_commit_group();
    }
    // At most kPending halves are under way.
    template <int kPending>
    static __device__ __forceinline__ void wait_halves(Sums& s) {
        ptx::wgmma_wait_group<kPending>();
        MK_UNROLL
        for (int h = 0; h < kParts; ++h) ptx::pin(s[h]);
    }

    static __device__ __forceinline__ void add(Part& s, const Part& p, float2 scale) {
        MK_UNROLL
        for (int n = 0; n < kPartTokens / 8; ++n) {
            s[n][0] = fmaf(scale.x, p[n][0], s[n][0]);
            s[n][1] = fmaf(scale.x, p[n][1], s[n][1]);
            s[n][2] = fmaf(scale.y, p[n][2], s[n][2]);
            s[n][3] = fmaf(scale.y, p[n][3], s[n][3]);
        }
    }

    // In all blocks of the cluster, as each fetches for the others. `to`: the first stage's barrier
    // in one of them, or 0.
    static __device__ __forceinline__ void release_x(uint32_t to, uint32_t stage) {
        if (to != 0) ptx::mbarrier_arrive_shared_cluster(to + 8 * stage);
    }

    __device__ __forceinline__ float4* kept_total(int n) const {
        return reinterpret_cast<float4*>(smem + kTotalsAt + n * kTotalStep +
                                         (ptx::mov_u32_tid_x() - 128) * 16);
    }
    static __device__ __forceinline__ void add_total(float (&total)[4], const float (&y)[4]) {
        MK_UNROLL  // not contracted with finish's product
            for (int j = 0; j < 4; ++j) total[j] = __fadd_rn(total[j], y[j]);
    }

    // The scales of the warp's tile: lane 4g + t's of quarter t, which the four lanes of row g then
    // read.
    template <int kType>
    static __device__ __forceinline__ void convert_scales(const uint8_t* tile, uint32_t to,
                                                          int quarters) {
        using Scales = QuantScales<kType>;
        typename Scales::Pairs pairs;
        load_scales<kType>(tile, lane(), quarters).scale_pairs(pairs);
        to += lane() % 4 * kQuantGemmScalePitch + lane() / 4 * 16;
        __syncwarp();  // all lanes are done with the last tile's
        ptx::st_shared_v4(to, Scales::scales(pairs));
        __syncwarp();
    }

    // total += the sums over all k of this warpgroup's rows, of kType.
    template <int kType>
    __device__ __forceinline__ void multiply(Places& at, Part& total) const {
        using Scales = QuantScales<kType>;
        constexpr bool kIs16 = Scales::kIs16;
        // Kept in registers, where the compiler would compute them again for each 64 k.
        const uint32_t smem_scales =
            ptx::mov_b32(ring.smem + kScalesAt + warp() * kQuantGemmScaleBytes);
        const uint32_t lane_scales = ptx::mov_b32(smem_scales + lane() / 4 * 16);
        const uint32_t empty = ptx::mov_b32(
            thread() < ring.args.cluster ? ptx::mapa_shared_cluster(ring.x_empty(0), thread()) : 0);
        const auto scales_of = [&](int quarter) {
            return ptx::ld_shared_v4(lane_scales + quarter * kQuantGemmScalePitch);
        };
        const auto floats = [](uint32_t x, uint32_t y) {
            return float2{__uint_as_float(x), __uint_as_float(y)};
        };
        int left = ring.args.x.quarters;
        MK_NO_UNROLL
        do {
            const int quarters = ptx::mov_b32(min(left, 4)), lane = ptx::mov_b32(this->lane());
            const uint32_t smem_tile =
                ptx::mov_b32(ring.w_at(at.slot.at, group()) + warp() % 4 * kQuantTileBytes<kType>);
            const auto* const tile =
                static_cast<const uint8_t*>(__cvta_shared_to_generic(smem_tile));
            Ring::wait(ring.w_full(at.slot.at), at.slot.parity);
            convert_scales<kType>(tile, smem_scales, quarters);
            QuantGemmWords<kType> words;
            uint32_t a[2][2][4];  // A of the halves of a quarter, of their steps
            words.next(tile, lane, 0, quarters);
            words.template unpack<0>(a[0]);
            uint4 scale;
            if constexpr (kIs16) {
                scale = scales_of(0);
                fold_scales(a[0], scale.x, scale.y);
            }
            Sums s{}, p;
            MK_NO_UNROLL
            for (int quarter = 0; quarter < quarters; ++quarter) {
                const auto x = operand_of<kQuantQuarterK * 2>(at.stage.at);
                Ring::wait(ring.x_full(at.stage.at), at.stage.parity);
                if constexpr (kIs16) {
                    add_half(s, a[0], x, 0);
                    words.template unpack<1>(a[1]);
                    fold_scales(a[1], scale.z, scale.w);
                    add_half(s, a[1], x, 2);
                    if (quarter + 1 < quarters) {
                        words.next(tile, lane, quarter + 1, quarters);
                        scale = scales_of(quarter + 1);
                        wait_halves<1>(s);
                        words.template unpack<0>(a[0]);
                        fold_scales(a[0], scale.x, scale.y);
                    }
                    wait_halves<0>(s);
                } else {
                    start_parts(p, a[0], x);
                    const uint4 of_quarter = scales_of(quarter);
                    words.template unpack<1>(a[1]);
                    turn(s, p, floats(of_quarter.x, of_quarter.y), a[1], x);
                    if (quarter + 1 < quarters) {
                        words.next(tile, lane, quarter + 1, quarters);
                        words.template unpack<0>(a[0]);
                    }
                    end(s, p, floats(of_quarter.z, of_quarter.w));
                }
                release_x(empty, at.stage.at);
                at.stage.advance();
            }
            // The minima and the sums of x, as high and low parts.
            const auto scales = load_scales<kType>(tile, lane, quarters);
            typename Scales::Pairs pairs;
            scales.scale_pairs(pairs);
            scales.minima(pairs, a[0][0]);
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(ring.w_empty(at.slot.at));
            at.slot.advance();
            MK_UNROLL
            for (int i = 0; i < 4; ++i) a[0][1][i] = a[0][0][i];
            Ring::wait(ring.x_full(at.stage.at), at.stage.parity);
            start_parts(p, a[0], operand_of<kPreparedSumsBytes / kPreparedRows>(at.stage.at));
            static_for<kParts>([&](auto h) {
                ptx::wgmma_wait_group<kParts - 1 - h>();
                ptx::pin(p[h]);
                MK_UNROLL
                for (int n = 0; n < kPartTokens / 8; ++n) {
                    float (&y)[4] = s[h][n];
                    scales.finish(y, p[h][n]);
                    if constexpr (h == 0) {
                        add_total(total[n], y);
                    } else {
                        float4& kept = *kept_total(n);
                        float sum[4] = {kept.x, kept.y, kept.z, kept.w};
                        add_total(sum, y);
                        kept = {sum[0], sum[1], sum[2], sum[3]};
                    }
                }
            });
            release_x(empty, at.stage.at);
            at.stage.advance();
            left -= quarters;
        } while (left > 0);
    }

    // ---- outputs ----

    template <class Row>
    static __device__ __forceinline__ RowSlot<Row>& row_slot(uint8_t* rows, int r) {
        static_assert(sizeof(Row) <= kQuantEpilogueRowBytes);
        return *reinterpret_cast<RowSlot<Row>*>(rows + r * kQuantRowPitchSm90);
    }

    // Where the tile's rows go, by the warpgroup, before it multiplies.
    __device__ __forceinline__ void look_up(const typename Ring::Tile& tile) const {
        uint8_t* const rows = out_of_group() + kRowsAt;
        const int r = thread(), token = tile.first_token + r;
        sync_group();  // the last tile's were read
        if (r >= T.tokens || token >= ring.args.m) return;
        with_epilogue(ring.args.to, [&](const auto& epilogue) {
            using Row = typename std::decay_t<decltype(epilogue)>::Row;
            row_slot<Row>(rows, r) = {epilogue.row(token), ring.args.x.unscale[token]};
        });
    }

    // Sums to outputs, kQuantStagedTokens rows of x at a time through shared memory: a lane then
    // has a pair of rows of w, and the next lane the next pair. Of gate and up both warpgroups meet
    // there, and a lane has a row of both, and the one 32 further.
    __device__ __forceinline__ void write(const typename Ring::Tile& tile,
                                          const Part& total) const {
        uint8_t* const staged = out_of_group();
        uint8_t* const to =
            staged + lane() % 4 * 2 * kQuantStagedPitch + warp() % 4 * 64 + lane() / 4 * 8;
        const int num_rows = min(T.tokens, ring.args.m - tile.first_token);
        const int row_of_w = tile.first_row + lane() * 2;
        const float unit = tile.w.unit;
        with_epilogue(ring.args.to, [&](const auto& epilogue) {
            using Epilogue = std::decay_t<decltype(epilogue)>;
            using Row = typename Epilogue::Row;
            const bool is_pair = Epilogue::kJoinsPairs && ring.args.is_pair;
            const auto sync = [&] { is_pair ? sync_groups() : sync_group(); };
            const auto column = epilogue.column(tile.w.first_row + row_of_w);
            MK_NO_UNROLL
            for (int first = 0; first < num_rows; first += kQuantStagedTokens) {
                sync();
                static_for<T.tokens / kQuantStagedTokens>([&](auto i) {
                    if (i * kQuantStagedTokens != first) return;
                    static_for<kQuantStagedTokens / 8>([&](auto j) {
                        constexpr int kN = i * (kQuantStagedTokens / 8) + j;
                        float4 y;
                        if constexpr (kN < kPartTokens / 8) {
                            y = {total[kN][0], total[kN][1], total[kN][2], total[kN][3]};
                        } else {
                            y = *kept_total(kN - kPartTokens / 8);
                        }
                        uint8_t* const row = to + 8 * j * kQuantStagedPitch;
                        *reinterpret_cast<float2*>(row) = {y.x, y.z};
                        *reinterpret_cast<float2*>(row + kQuantStagedPitch) = {y.y, y.w};
                    });
                });
                sync();
                const int end = min(num_rows - first, kQuantStagedTokens);
                if (is_pair) {
                    write_pairs(epilogue, tile, first, end);
                    continue;
                }
                if (row_of_w >= tile.w.rows) continue;
                _Pragma("unroll 4") for (int r = warp() % 4; r < end; r += 4) {
                    const float2 y = *reinterpret_cast<const float2*>(
                        staged + r * kQuantStagedPitch + lane() * 8);
                    const auto& slot = row_slot<Row>(staged + kRowsAt, first + r);
                    epilogue.store(slot.row, column, y.x * unit * slot.unscale,
                                   y.y * unit * slot.unscale);
                }
            }
        });
    }

    // Of the staged rows first ... first + count - 1, every eighth by a warp.
    template <class Epilogue>
    __device__ __forceinline__ void write_pairs(const Epilogue& epilogue,
                                                const typename Ring::Tile& tile, int first,
                                                int count) const {
        const float unit = ring.args.w[0].unit, unit_up = ring.args.w[1].unit;
        const uint8_t* const staged = smem + kOutAt + lane() * 4;
        MK_NO_UNROLL
        for (int r = warp(); r < count; r += kQuantGemmWarpsSm90) {
            const auto& slot =
                row_slot<typename Epilogue::Row>(out_of_group() + kRowsAt, first + r);
            MK_UNROLL
            for (int row = 0; row < kGroupRows; row += 32) {
                const auto* const gate =
                    reinterpret_cast<const float*>(staged + r * kQuantStagedPitch + row * 4);
                const int c = 2 * (tile.first_row + lane() + row);
                epilogue.store(slot.row, epilogue.column(c), gate[0] * unit * slot.unscale,
                               gate[kGroupOut / 4] * unit_up * slot.unscale);
            }
        }
    }

    __device__ __forceinline__ void consume() const {
        Places at;
        MK_NO_UNROLL
        for (int i = blockIdx.x / ring.args.cluster; i < ring.num_tiles();
             i += gridDim.x / ring.args.cluster) {
            look_up(ring.tile(i, group()));
            Part total{};
            MK_UNROLL
            for (int n = 0; n < (kParts - 1) * kPartTokens / 8; ++n) *kept_total(n) = {};
            switch (__shfl_sync(0xFFFFFFFFu, ring.tile(i, group()).w.type, 0)) {
#define MK_QUANT_CASE(type)        \
    case type:                     \
        multiply<type>(at, total); \
        break;
                MK_FOR_EACH_QUANT_TYPE(MK_QUANT_CASE)
#undef MK_QUANT_CASE
            }
            // Found again: registers are short.
            write(ring.tile(ptx::mov_b32(i), group()), total);
        }
    }

    static __device__ __forceinline__ void run(const QuantGemmArgs& args) {
        extern __shared__ __align__(128) uint8_t smem[];
        ptx::griddepcontrol_launch_dependents();
        const Ring ring{args, static_cast<uint32_t>(__cvta_generic_to_shared(smem)),
                        static_cast<int>(ptx::mov_u32_cluster_ctarank())};
        if (threadIdx.x == 0) ring.init();
        __syncthreads();
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
        ptx::griddepcontrol_wait();
        // The same in all lanes, and known to be: descriptors then take uniform registers.
        const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) - 1;
        if (group < 0) {
            ptx::setmaxnreg_dec<kProducerRegisters>();
            if (threadIdx.x < 32) {
                ring.fetch_x();
            } else if (threadIdx.x < 64) {
                ring.fetch_w();
            }
        } else {
            ptx::setmaxnreg_inc<kConsumerRegisters>();
            QuantGemmSm90{ring, smem}.consume();
        }
        // Until then others may copy into this block's stages, and arrive at its barriers.
        __syncwarp();
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
    }
};

template <QuantGemmTileSm90 T>
__device__ __forceinline__ void quant_gemm_sm90(const QuantGemmArgs& args) {
    QuantGemmSm90<T>::run(args);
}

}  // namespace mk
