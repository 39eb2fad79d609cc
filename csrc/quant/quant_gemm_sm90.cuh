// y = x w^T for quantised w on Hopper, with wgmma and the bits of quant_decode_sm80.cuh: w is A,
// unpacked in registers, and x, prepared by quant_prepare.cuh, is B in shared memory.
//
//   block = one warpgroup that copies and two that multiply; tile after tile of 128 rows of w x
//   T.tokens rows of x, all of k
//     warpgroup 0    a thread of it fetches w, x and x's sums by bulk copies     40 registers
//     warpgroup 1    rows 0-63 of w by wgmma m64 n(T.tokens / 2) k16            232
//     warpgroup 2    rows 64-127; a warp has a tile of 16 (quant_layout.h)
//
//   cluster: up to 4 blocks with the same rows of x, of which each fetches its share for all
//
// Arithmetic: quant_unpack.cuh, quant_x.cuh. P of 32 (or 16) k starts from 0, and scale * P is
// added to S; the minima meet the block sums of x in the same way, and Y of 256 k is added to the
// total.
//
//   time ->  P of tokens 0-63   | k 0-31 |        | k 32-63 |         | k 64-95 |
//            P of tokens 64-127          | k 0-31 |         | k 32-63 |
//            S += scale * P              | 0-63   | 64-127  | 0-63    | 64-127  |   unpacking: of k
//                                                                                   two products on
// Clocks of an SM for 256 k of a tile of 128 x 128, modelled: tensor cores 2 x (1024 + 128 for the
// sums). Each of the four schedulers issues for two warps, for each 32 k: 64 FFMA, 10 (Q4_K) to 20
// that unpack, 15 more, and 200 for Y: 1900 of 2304 (82 %). Of 16 k a scale it is twice the FFMA:
// those types (Q2_K, Q3_K, Q6_K) are bound by issue, at 2900. Registers: 64 each for P, S and
// totals. 96 tokens take as many slots a clock; 256 have no place.
// L2 gives an SM 23 bytes per clock when all ask: 91 KB (Q4_K) in 2304 are 40, hence the clusters;
// in one of four it is 16.
//
// Shared memory: quant_gemm_tiles.h. Stages hold 64 k of x in wgmma's order, without a swizzle, as
// they lie in memory; the stage behind those of 256 k has their sums. Events are mbarriers, as in
// linear_gemm_sm90.cuh. A slot of w is its block's own.
#pragma once

#include "common/static_for.cuh"
#include "common/wgmma.cuh"
#include "quant/quant_epilogue.cuh"
#include "quant/quant_gemm_stages.cuh"
#include "quant/quant_x.cuh"

namespace mk {

template <int kType>
constexpr int kQuantTileBytes = quant_tile_bytes(kType, 4);

template <QuantGemmTileSm90 T>
struct QuantGemmSm90 {
    static constexpr int kGroupRows = 64;  // of a warpgroup
    static constexpr int kGroups = kQuantGemmRowsSm90 / kGroupRows;
    static constexpr int kStageBytes = quant_gemm_x_bytes(T);
    static constexpr int kWAt = T.stages * kStageBytes;
    static constexpr int kScalesAt = kWAt + T.slots * kQuantGemmSlotBytes;
    static constexpr int kWarpScales = 2 * kQuantGemmScalePart;
    static constexpr int kOutAt = kScalesAt + kQuantGemmWarpsSm90 * kWarpScales;
    static constexpr int kGroupOut = quant_gemm_group_out_bytes(T);
    static constexpr int kRowsAt = kQuantStagedTokens * kQuantStagedPitch;  // in a group's
    static constexpr int kTotalsAt = kOutAt + kGroups * kGroupOut;
    static constexpr int kBarriersAt = quant_gemm_barriers_at(T);
    static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
    static_assert(kTotalsAt + quant_gemm_totals_bytes(T) == kBarriersAt && kBarriersAt % 8 == 0);
    static_assert(128 * (kProducerRegisters + kGroups * kConsumerRegisters) <= 65536);
    static_assert(T.stages >= 5, "a group's stages have room, so that the next one's w is fetched");

    // P and S of the two parts of the tokens, which take turns.
    static constexpr int kParts = T.tokens / 64;
    static constexpr int kPartTokens = T.tokens / kParts;
    using Part = float[kPartTokens / 8][4];
    using Sums = Part[kParts];
    // Totals: the first part's in registers, the second's in shared memory.
    static constexpr int kTotalStep = 256 * 16;  // from a thread's next to last four

    struct Tile {
        const QuantGemmMatrix& w;
        int first_row;    // of the matrix
        int first_token;  // of x
    };

    // Where a row's outputs go; rows of 40 bytes are in other banks.
    template <class Row>
    struct RowSlot {
        Row row;
        float unscale;
    };

    const QuantGemmArgs& args;
    uint8_t* const smem;
    const uint32_t smem_at;  // its address
    const int rank;          // in the cluster

    __device__ __forceinline__ uint32_t x_full(uint32_t stage) const {
        return smem_at + kBarriersAt + 8 * stage;
    }
    __device__ __forceinline__ uint32_t x_empty(uint32_t stage) const {
        return x_full(stage) + 8 * T.stages;
    }
    __device__ __forceinline__ uint32_t w_full(uint32_t slot) const {
        return smem_at + kBarriersAt + 16 * T.stages + 8 * slot;
    }
    __device__ __forceinline__ uint32_t w_empty(uint32_t slot) const {
        return w_full(slot) + 8 * T.slots;
    }

    // A place in a ring of kSize, and the parity of the phase that fills it.
    template <int kSize>
    struct Place {
        uint32_t at = 0, parity = 0;
        __device__ __forceinline__ void advance() {
            const bool is_last = at == kSize - 1;
            at = is_last ? 0 : at + 1;
            parity ^= is_last;
        }
    };
    static __device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
        while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
        }
    }

    // As in quant_gemm_sm80.cuh: in groups of rows of x, in a group m first. The clusters take
    // tiles in turn, a block of one after the other along the rows of w.
    __device__ __forceinline__ int tiles_m() const { return (args.m + T.tokens - 1) / T.tokens; }
    __device__ __forceinline__ int num_tiles() const {  // of the cluster's
        return tiles_m() * (args.strips / args.cluster);
    }
    __device__ __forceinline__ Tile tile(int i) const {
        constexpr int kGroup = kQuantGemmGroupRows / T.tokens;
        const int tiles_n = args.strips / args.cluster;
        const int group = i / (kGroup * tiles_n) * kGroup;
        const int in_group = i - group * tiles_n;
        const int height = min(kGroup, tiles_m() - group);
        const int n = in_group / height;
        const int strip = n * args.cluster + rank;
        const int matrix = (args.num_matrices > 1 && strip >= args.w[1].first_strip) +
                           (args.num_matrices > 2 && strip >= args.w[2].first_strip);
        const QuantGemmMatrix& w = args.w[matrix];
        return {w, (strip - w.first_strip) * kQuantGemmRowsSm90,
                (group + in_group - n * height) * T.tokens};
    }

    // ---- the warps that fetch ----

    // The next stage, kBytes of 64 rows of x: this block's share of them, to all blocks of the
    // cluster, in pieces of which a lane has one. `row`: its first, of the stage.
    template <int kBytes>
    __device__ __forceinline__ void fetch_stage(Place<T.stages>& stage, const uint8_t*& from,
                                                int row) const {
        constexpr int kRowBytes = kBytes / kPreparedRows;
        const uint32_t full = x_full(stage.at);
        while (!ptx::mbarrier_try_wait_parity_cluster(x_empty(stage.at), stage.parity ^ 1)) {
        }
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(full, T.tokens * kRowBytes);
        __syncwarp();
        if (row < (rank + 1) * T.tokens / args.cluster) {
            ptx::cp_async_bulk_multicast(smem_at + stage.at * kStageBytes + row * kRowBytes, from,
                                         piece() * kRowBytes, full,
                                         static_cast<uint16_t>((1 << args.cluster) - 1));
        }
        from += kBytes;
        stage.advance();
    }
    __device__ __forceinline__ int piece() const {  // rows: those of a block of 64 lie together
        return min(T.tokens / args.cluster, kPreparedRows);
    }

    // By a warp.
    __device__ __forceinline__ void fetch_x() const {
        Place<T.stages> stage;
        const int row = rank * T.tokens / args.cluster + threadIdx.x * piece();
        MK_NO_UNROLL
        for (int i = blockIdx.x / args.cluster; i < num_tiles(); i += gridDim.x / args.cluster) {
            // Past m the rows before are copied again.
            const int block =
                min((tile(i).first_token + row) / kPreparedRows, (args.m - 1) / kPreparedRows);
            const auto of_rows = [&](const uint8_t* from, int count, int bytes) {
                return from + int64_t{block} * count * bytes +
                       row % kPreparedRows * (bytes / kPreparedRows);
            };
            const uint8_t* x = of_rows(args.x.x16, args.x.quarters, kPreparedX16Bytes);
            const uint8_t* sums = of_rows(args.x.sums, args.x.groups, kPreparedSumsBytes);
            int left = args.x.quarters;
            MK_NO_UNROLL
            do {
                fetch_stage<kPreparedX16Bytes>(stage, x, row);
                // The sums of 256 k behind their stages.
                if (--left % 4 == args.x.quarters % 4 || left == 0) {
                    fetch_stage<kPreparedSumsBytes>(stage, sums, row);
                }
            } while (left > 0);
        }
    }

    // By a warp: a lane has one of the tiles.
    __device__ __forceinline__ void fetch_w() const {
        Place<T.slots> slot;
        const int lane = threadIdx.x % 32;
        MK_NO_UNROLL
        for (int i = blockIdx.x / args.cluster; i < num_tiles(); i += gridDim.x / args.cluster) {
            const Tile to = tile(i);
            const int tile_bytes = to.w.tile_bytes;
            // Past the last tile that one is copied again.
            const uint8_t* from = to.w.tiles + min(to.first_row / kQuantTileRows + lane,
                                                   (to.w.rows - 1) / kQuantTileRows) *
                                                   to.w.row_tile_bytes;
            MK_NO_UNROLL
            for (int left = args.x.quarters; left > 0; left -= 4) {
                const uint32_t bytes = tile_bytes * min(left, 4) / 4;
                const uint32_t full = w_full(slot.at);
                wait(w_empty(slot.at), slot.parity ^ 1);
                if (lane == 0) {
                    ptx::mbarrier_arrive_expect_tx(full, kQuantGemmWarpsSm90 * bytes);
                }
                __syncwarp();
                if (lane < kQuantGemmWarpsSm90) {
                    ptx::cp_async_bulk(
                        smem_at + kWAt + slot.at * kQuantGemmSlotBytes + lane * tile_bytes, from,
                        bytes, full);
                }
                from += tile_bytes;
                slot.advance();
            }
        }
    }

    // ---- the warpgroups that multiply ----

    // What follows from the thread's number is computed where it is used: registers are short.
    static __device__ __forceinline__ int lane() { return ptx::mov_u32_tid_x() % 32; }
    static __device__ __forceinline__ int warp() {
        return ptx::mov_u32_tid_x() / 32 - 4;
    }  // 0 ... 7
    static __device__ __forceinline__ int thread() { return ptx::mov_u32_tid_x() % 128; }
    __device__ __forceinline__ uint8_t* out_of_group() const {
        return smem + kOutAt + warp() / 4 * kGroupOut;
    }
    static __device__ __forceinline__ void sync_group() { ptx::bar_sync(1 + warp() / 4, 128); }

    struct Places {
        Place<T.stages> stage;
        Place<T.slots> slot;
    };

    // B: the first part, and how far the next part is from it, as descriptors.
    struct Operand {
        uint64_t first, step;
    };
    template <int kRowBytes>
    __device__ __forceinline__ Operand operand_of(uint32_t stage) const {
        return {wgmma_plain_operand(smem_at + stage * kStageBytes, 128, 8 * kRowBytes),
                uint64_t{kPartTokens * kRowBytes >> 4}};
    }
    static constexpr int kStepBytes = 256;  // of B, from 16 k to the next

    // P = A B of one step of 16 k or, kIsPair, of two, under way.
    template <bool kIsPair>
    static __device__ __forceinline__ void start(Part& p, const uint32_t (*a)[4], uint64_t b) {
        ptx::wgmma_fence();
        ptx::wgmma<ptx::WgmmaType::kF16, false>(p, a[0], b);
        if constexpr (kIsPair) {
            ptx::wgmma<ptx::WgmmaType::kF16, true>(p, a[1], wgmma_advance(b, kStepBytes));
        }
        ptx::wgmma_commit_group();
    }
    template <bool kIsPair>
    static __device__ __forceinline__ void start_parts(Sums& p, uint32_t (*a)[4],
                                                       const Operand& b) {
        pin_steps<kIsPair>(a);
        MK_UNROLL
        for (int h = 0; h < kParts; ++h) start<kIsPair>(p[h], a, b.first + h * b.step);
    }
    template <bool kIsPair>
    static __device__ __forceinline__ void pin_steps(uint32_t (*a)[4]) {
        MK_UNROLL
        for (int i = 0; i < (kIsPair ? 8 : 4); ++i) ptx::pin(a[i / 4][i % 4]);
    }

    // What is under way ends, and step `step` of the stage is started, part by part.
    template <bool kIsPair>
    static __device__ __forceinline__ void turn(Sums& s, Sums& p, float2 scale, uint32_t (*a)[4],
                                                const Operand& b, int step) {
        pin_steps<kIsPair>(a);
        MK_UNROLL
        for (int h = 0; h < kParts; ++h) {
            ptx::wgmma_wait_group<kParts - 1>();
            ptx::pin(p[h]);
            add(s[h], p[h], scale);
            start<kIsPair>(p[h], a, wgmma_advance(b.first + h * b.step, step * kStepBytes));
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

    static __device__ __forceinline__ void add(Part& s, const Part& p, float2 scale) {
        MK_UNROLL
        for (int n = 0; n < kPartTokens / 8; ++n) {
            s[n][0] = fmaf(scale.x, p[n][0], s[n][0]);
            s[n][1] = fmaf(scale.x, p[n][1], s[n][1]);
            s[n][2] = fmaf(scale.y, p[n][2], s[n][2]);
            s[n][3] = fmaf(scale.y, p[n][3], s[n][3]);
        }
    }

    // In all blocks of the cluster, as each fetches for the others.
    __device__ __forceinline__ void release_x(uint32_t stage) const {
        if (const int block = thread(); block < args.cluster) {
            ptx::mbarrier_arrive_shared_cluster(ptx::mapa_shared_cluster(x_empty(stage), block));
        }
    }

    __device__ __forceinline__ float4* kept_total(int n) const {
        return reinterpret_cast<float4*>(smem + kTotalsAt + n * kTotalStep +
                                         (ptx::mov_u32_tid_x() - 128) * 16);
    }
    static __device__ __forceinline__ void add_total(float (&total)[4], const float (&y)[4]) {
        MK_UNROLL  // not contracted with finish's product
            for (int j = 0; j < 4; ++j) total[j] = __fadd_rn(total[j], y[j]);
    }

    // The scales of the warp's tile as floats: lane 4g + t's of quarter t, which the four lanes of
    // row g then read.
    template <int kType>
    __device__ __forceinline__ void convert_scales(const uint8_t* tile, uint8_t* to, int lane,
                                                   int quarters) const {
        using Scales = QuantScales<kType>;
        typename Scales::Pairs pairs;
        load_scales<kType>(tile, lane, quarters).scale_pairs(pairs);
        __syncwarp();  // all lanes are done with the last tile's
        MK_UNROLL
        for (int i = 0; i < Scales::kFloat4s; ++i) {
            *reinterpret_cast<float4*>(to + i * kQuantGemmScalePart +
                                       lane % 4 * kQuantGemmScalePitch + lane / 4 * 16) =
                Scales::scales(pairs, i);
        }
        __syncwarp();
    }

    // total += the sums over all k of this warpgroup's rows, of kType.
    template <int kType>
    __device__ __forceinline__ void multiply(Places& at, Part& total) const {
        using Scales = QuantScales<kType>;
        constexpr bool kIs16 = Scales::kIs16;
        uint8_t* const scales_to = smem + kScalesAt + warp() * kWarpScales;
        const auto scales_of = [&](int quarter, int i) {
            return *reinterpret_cast<const float4*>(scales_to + i * kQuantGemmScalePart +
                                                    quarter * kQuantGemmScalePitch +
                                                    lane() / 4 * 16);
        };
        int left = args.x.quarters;
        MK_NO_UNROLL
        do {
            const int quarters = min(left, 4);
            const uint8_t* const tile =
                smem + kWAt + at.slot.at * kQuantGemmSlotBytes + warp() * kQuantTileBytes<kType>;
            wait(w_full(at.slot.at), at.slot.parity);
            convert_scales<kType>(tile, scales_to, lane(), quarters);
            QuantGemmWords<kType> words;
            uint32_t a[2][2][4];  // A of the halves of a quarter, of their steps
            words.next(tile, lane(), 0, quarters);
            words.template unpack<0>(a[0]);
            Sums s{}, p;
            MK_NO_UNROLL
            for (int quarter = 0; quarter < quarters; ++quarter) {
                const Operand x = operand_of<kQuantQuarterK * 2>(at.stage.at);
                wait(x_full(at.stage.at), at.stage.parity);
                start_parts<!kIs16>(p, a[0], x);
                float4 scale = scales_of(quarter, 0);
                if constexpr (kIs16) {
                    turn<false>(s, p, {scale.x, scale.y}, a[0] + 1, x, 1);
                    words.template unpack<1>(a[1]);
                    turn<false>(s, p, {scale.z, scale.w}, a[1], x, 2);
                    scale = scales_of(quarter, 1);
                    turn<false>(s, p, {scale.x, scale.y}, a[1] + 1, x, 3);
                } else {
                    words.template unpack<1>(a[1]);
                    turn<true>(s, p, {scale.x, scale.y}, a[1], x, 2);
                }
                if (quarter + 1 < quarters) {
                    words.next(tile, lane(), quarter + 1, quarters);
                    words.template unpack<0>(a[0]);
                }
                end(s, p, {scale.z, scale.w});
                release_x(at.stage.at);
                at.stage.advance();
            }
            // The minima and the sums of x, as high and low parts.
            const auto scales = load_scales<kType>(tile, lane(), quarters);
            typename Scales::Pairs pairs;
            scales.scale_pairs(pairs);
            scales.minima(pairs, a[0][0]);
            __syncwarp();
            if (lane() == 0) ptx::mbarrier_arrive(w_empty(at.slot.at));
            at.slot.advance();
            MK_UNROLL
            for (int i = 0; i < 4; ++i) a[0][1][i] = a[0][0][i];
            wait(x_full(at.stage.at), at.stage.parity);
            start_parts<true>(p, a[0], operand_of<kPreparedSumsBytes / kPreparedRows>(at.stage.at));
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
            release_x(at.stage.at);
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
    __device__ __forceinline__ void look_up(const Tile& tile) const {
        uint8_t* const rows = out_of_group() + kRowsAt;
        const int r = thread(), token = tile.first_token + r;
        sync_group();  // the last tile's were read
        if (r >= T.tokens || token >= args.m) return;
        with_epilogue(args.to, [&](const auto& epilogue) {
            using Row = typename std::decay_t<decltype(epilogue)>::Row;
            row_slot<Row>(rows, r) = {epilogue.row(token), args.x.unscale[token]};
        });
    }

    // Sums to outputs, kQuantStagedTokens rows of x at a time through shared memory: a lane then
    // has a pair of rows of w, and the next lane the next pair.
    __device__ __forceinline__ void write(const Tile& tile, const Part& total) const {
        uint8_t* const staged = out_of_group();
        uint8_t* const to =
            staged + lane() % 4 * 2 * kQuantStagedPitch + warp() % 4 * 64 + lane() / 4 * 8;
        const int num_rows = min(T.tokens, args.m - tile.first_token);
        const int row_of_w = tile.first_row + warp() / 4 * kGroupRows + lane() * 2;
        const float unit = tile.w.unit;
        with_epilogue(args.to, [&](const auto& epilogue) {
            using Row = typename std::decay_t<decltype(epilogue)>::Row;
            const auto column = epilogue.column(tile.w.first_row + row_of_w);
            MK_NO_UNROLL
            for (int first = 0; first < num_rows; first += kQuantStagedTokens) {
                sync_group();
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
                sync_group();
                if (row_of_w >= tile.w.rows) continue;
                const int end = min(num_rows - first, kQuantStagedTokens);
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

    __device__ __forceinline__ void consume() const {
        Places at;
        MK_NO_UNROLL
        for (int i = blockIdx.x / args.cluster; i < num_tiles(); i += gridDim.x / args.cluster) {
            look_up(tile(i));
            Part total{};
            MK_UNROLL
            for (int n = 0; n < (kParts - 1) * kPartTokens / 8; ++n) *kept_total(n) = {};
            switch (tile(i).w.type) {
#define MK_QUANT_CASE(type)        \
    case type:                     \
        multiply<type>(at, total); \
        break;
                MK_QUANT_CASE(MK_Q4_0)
                MK_QUANT_CASE(MK_Q4_1)
                MK_QUANT_CASE(MK_Q5_0)
                MK_QUANT_CASE(MK_Q5_1)
                MK_QUANT_CASE(MK_Q8_0)
                MK_QUANT_CASE(MK_Q2_K)
                MK_QUANT_CASE(MK_Q3_K)
                MK_QUANT_CASE(MK_Q4_K)
                MK_QUANT_CASE(MK_Q5_K)
                MK_QUANT_CASE(MK_Q6_K)
#undef MK_QUANT_CASE
            }
            write(tile(ptx::mov_b32(i)), total);  // found again: registers are short
        }
    }

    static __device__ __forceinline__ void run(const QuantGemmArgs& args) {
        extern __shared__ __align__(128) uint8_t smem[];
        ptx::griddepcontrol_launch_dependents();
        const QuantGemmSm90 block{args, smem, static_cast<uint32_t>(__cvta_generic_to_shared(smem)),
                                  static_cast<int>(ptx::mov_u32_cluster_ctarank())};
        if (threadIdx.x == 0) {
            for (int i = 0; i < T.stages; ++i) {
                ptx::mbarrier_init(block.x_full(i), 1);
                ptx::mbarrier_init(block.x_empty(i), kGroups * args.cluster);
            }
            for (int i = 0; i < T.slots; ++i) {
                ptx::mbarrier_init(block.w_full(i), 1);
                ptx::mbarrier_init(block.w_empty(i), kQuantGemmWarpsSm90);
            }
            ptx::fence_mbarrier_init();
        }
        ptx::griddepcontrol_wait();
        __syncthreads();
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
        // The same in all lanes, and known to be: descriptors then take uniform registers.
        const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) - 1;
        if (group < 0) {
            ptx::setmaxnreg_dec<kProducerRegisters>();
            if (threadIdx.x < 32) {
                block.fetch_x();
            } else if (threadIdx.x < 64) {
                block.fetch_w();
            }
        } else {
            ptx::setmaxnreg_inc<kConsumerRegisters>();
            block.consume();
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
