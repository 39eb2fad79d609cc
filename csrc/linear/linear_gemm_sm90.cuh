// y = x w^T for more than 64 rows of x on Hopper:  x [m, k] and w [n, k], both along k, y in fp32.
//
//   block = one warpgroup that copies and two that multiply; tile after tile of T.m x T.n of y
//     warpgroup 0    a thread of it fetches stages of 64 k by TMA               40 registers
//     warpgroup 1    rows 0-63 of the tile by wgmma m64 n(T.n) k16             232
//     warpgroup 2    rows 64-127
//
//   cluster, here of 2 x 2 blocks:        columns n0 ...  n0 + T.n ...
//                       rows m0 ...      |   rank 0    |    rank 2    |
//                       rows m0 + T.m    |   rank 1    |    rank 3    |
//     Blocks of a row need the same x, blocks of a column the same w: each fetches its share of
//     them, for itself and, by multicast, for the others.
//
//   smem, T.n = 256:  | 4 stages of x 16 KB, w 32 KB | 8 warps' 2 KB of sums, and rows | barriers |
//   A stage's rows are 128 bytes with wgmma's 128-byte swizzle, x as A and w as B, both K-major.
//   What TMA finds past m, n or k is 0.
//
// k ascends in groups of 16 into one accumulator per output, whatever the tile (see the header).
// Events are mbarriers: a full stage's is its block's arrival and the bytes of the boxes, its own
// and the others'; an empty one's the arrivals of both warpgroups of all blocks it is fetched for.
// The copying thread goes on to the next tile while the sums of this one are written; warpgroup 2
// starts a stage behind warpgroup 1, so that one still multiplies when the other begins to write.
//
// Of a tile of 128 x 256 the tensor cores take 1024 clocks per stage, and L2 gives an SM 48 KB in
// 2100 (23 bytes per clock when all SMs ask): hence the clusters. In one of four it is 24 KB.
#pragma once

#include "common/static_for.cuh"
#include "common/swizzle.cuh"
#include "common/wgmma.cuh"
#include "linear/linear_epilogue.cuh"

namespace mk {

template <class Dtype, GemmTileSm90 T, class Epilogue>
struct LinearGemmSm90 {
    using Args = LinearGemmSm90Args<typename Epilogue::Params>;
    using Row = typename Epilogue::Row;
    static constexpr int kGroupRows = 64;  // of a warpgroup
    static constexpr int kGroups = T.m / kGroupRows;
    static constexpr int kRowBytes = 2 * kGemmStageK;
    static constexpr int kXBytes = T.m * kRowBytes;
    static constexpr int kStageBytes = gemm_stage_bytes(T);
    static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
    static_assert(kGroups == 2 && kRowBytes == 128);
    static_assert(128 * (kProducerRegisters + kGroups * kConsumerRegisters) <= 65536);

    // 40 bytes apart no two of 16 rows share a bank in an access of 8 bytes.
    struct RowSlot {
        Row row;
        uint8_t pad[kGemmRowPitch - sizeof(Row)];
    };
    static_assert(sizeof(RowSlot) == kGemmRowPitch && kGemmWarpBytes % 256 == 0);

    using Sums = float[T.n / 8][4];

    static constexpr int kBehind = 1;  // named barrier

    const Args& args;
    uint32_t smem_stages, smem_full, smem_empty;
    int num_stages;      // along k
    int rank_m, rank_n;  // in the cluster

    __device__ __forceinline__ int rank(int m, int n) const { return m + n * args.grid.cluster.m; }

    struct Tile {
        int m0, n0;
    };
    // This block's tile of the cluster's number i. As in linear_gemm_sm80.cuh, in groups of rows
    // of x; in a group m first.
    __device__ __forceinline__ Tile tile(int i) const {
        const int group = i / (args.grid.group * args.grid.clusters_n) * args.grid.group;
        const int in_group = i - group * args.grid.clusters_n;
        const int height = min(args.grid.group, args.grid.clusters_m - group);
        const int n = in_group / height;
        const int m = group + in_group - n * height;
        return {(m * args.grid.cluster.m + rank_m) * T.m, (n * args.grid.cluster.n + rank_n) * T.n};
    }
    // The clusters take tiles in turn.
    template <class Body>
    __device__ __forceinline__ void each_tile(const Body& body) const {
        const int size = args.grid.cluster.m * args.grid.cluster.n;
        const int end = args.grid.clusters_m * args.grid.clusters_n;
        MK_NO_UNROLL
        for (int i = blockIdx.x / size; i < end; i += gridDim.x / size) body(tile(i));
    }

    // ---- the thread that fetches ----

    __device__ __forceinline__ void fetch() const {
        // The blocks that share this one's rows of x (its row of the cluster), and of w.
        uint16_t row = 0, column = 0;
        for (int i = 0; i < args.grid.cluster.n; ++i) row |= 1 << rank(rank_m, i);
        for (int i = 0; i < args.grid.cluster.m; ++i) column |= 1 << rank(i, rank_n);
        const int box_x = T.m / args.grid.cluster.n, box_w = T.n / args.grid.cluster.m;  // rows
        const int first_x = rank_n * box_x, first_w = rank_m * box_w;
        const uint32_t smem_x = smem_stages + first_x * kRowBytes;
        const uint32_t smem_w = smem_stages + kXBytes + first_w * kRowBytes;
        uint32_t stage = 0, parity = 1;  // of the phase before the one that fills it
        each_tile([&](const Tile& to) {
            MK_NO_UNROLL
            for (int s = 0; s < num_stages; ++s) {
                const uint32_t full = smem_full + 8 * stage;
                while (!ptx::mbarrier_try_wait_parity_cluster(smem_empty + 8 * stage, parity)) {
                }
                ptx::mbarrier_arrive_expect_tx(full, kStageBytes);
                ptx::cp_async_bulk_tensor_2d_multicast(smem_x + stage * kStageBytes, &args.x_map,
                                                       s * kGemmStageK, to.m0 + first_x, full, row);
                ptx::cp_async_bulk_tensor_2d_multicast(smem_w + stage * kStageBytes, &args.w_map,
                                                       s * kGemmStageK, to.n0 + first_w, full,
                                                       column);
                if (++stage == T.stages) stage = 0, parity ^= 1;
            }
        });
    }

    // ---- the warpgroups that multiply ----

    // A stage of the ring as addresses, and the parity of the phase that fills it.
    struct Stage {
        uint32_t full;  // the barrier
        uint64_t w;     // the operand; x lies before it
        uint32_t parity;
    };

    // y += x w^T of a stage, under way.
    template <bool kIsFirst>
    static __device__ __forceinline__ void start(Sums& sums, const Stage& at, uint64_t x_before_w) {
        while (!ptx::mbarrier_try_wait_parity(at.full, at.parity)) {
        }
        ptx::wgmma_fence();
        static_for<kGemmStageK / 16>([&](auto j) {
            ptx::wgmma<kWgmmaType<Dtype>, !kIsFirst || (j > 0)>(
                sums, wgmma_advance(at.w - x_before_w, 32 * j), wgmma_advance(at.w, 32 * j));
        });
        ptx::wgmma_commit_group();
    }

    __device__ __forceinline__ void multiply(int group, uint8_t* smem_warp) const {
        const Epilogue epilogue(args.p);
        const int cluster_m = args.grid.cluster.m, cluster_n = args.grid.cluster.n;
        // The blocks of its row and column fetch for this one: each is a lane's to tell.
        const int lane = threadIdx.x % 128;
        const bool is_releasing = lane < cluster_m + cluster_n - 1;
        const int other = lane - cluster_m;  // in the row, without this block
        const int block =
            other < 0 ? rank(lane, rank_n) : rank(rank_m, other + (other >= rank_n ? 1 : 0));
        const uint32_t to_empty =
            (is_releasing ? ptx::mapa_shared_cluster(smem_empty, block) : 0) - smem_full;
        const auto release = [&](uint32_t full) {
            if (is_releasing) ptx::mbarrier_arrive_shared_cluster(full + to_empty);
        };

        // Values that the loop would otherwise compute again for every stage.
        const uint64_t x_before_w = ptx::mov_b32((kXBytes - group * kGroupRows * kRowBytes) >> 4);
        const uint32_t first_full = ptx::mov_b32(smem_full);
        const uint32_t last_full = ptx::mov_b32(smem_full + 8 * (T.stages - 1));
        const uint64_t first_w = wgmma_operand(smem_stages + kXBytes, 0, 8 * kRowBytes);
        Stage at{first_full, first_w, 0};
        const auto advance = [&] {
            const bool is_last = at.full == last_full;
            at.full = is_last ? first_full : at.full + 8;
            at.w = is_last ? first_w : wgmma_advance(at.w, kStageBytes);
            at.parity ^= is_last;
        };
        Sums sums;
        bool is_first = true;
        each_tile([&](const Tile& to) {
            const int first_row = to.m0 + group * kGroupRows + threadIdx.x / 32 % 4 * 16;
            const int num_rows = min(args.product.m - first_row, 16);
            look_up(epilogue, first_row, num_rows, to.n0, smem_warp + kGemmStagedBytes);
            if (is_first && group == 1) ptx::bar_sync(kBehind, 256);
            start<true>(sums, at, x_before_w);
            if (is_first && group == 0) ptx::bar_arrive(kBehind, 256);
            is_first = false;
            MK_NO_UNROLL
            for (int s = 1; s < num_stages; ++s) {
                const uint32_t last = at.full;
                advance();
                start<false>(sums, at, x_before_w);
                ptx::wgmma_wait_group<1>();
                release(last);
            }
            ptx::wgmma_wait_group<0>();
            ptx::pin(sums);
            release(at.full);
            advance();
            if constexpr (Epilogue::kOutputsOfPair > 0) {
                if (epilogue.in_vectors) {
                    const auto write = [&](auto has_residual) {
                        write_vectors<has_residual>(epilogue, first_row, num_rows, to.n0, sums,
                                                    smem_warp);
                    };
                    if constexpr (Epilogue::kOutputsOfPair == 2) {
                        if (epilogue.p.residual) return write(Constant<true>());
                    }
                    return write(Constant<false>());
                }
            }
            write_pairs(epilogue, num_rows, to.n0, sums, smem_warp);
        });
    }

    // Where this warp's rows go, kept for write_pairs(); and what it will read there, to L2.
    static __device__ __forceinline__ void look_up(const Epilogue& epilogue, int first_row,
                                                   int num_rows, int n0, uint8_t* smem_rows) {
        const int lane = threadIdx.x % 32;
        if (lane < 16) {
            const bool exists = lane < num_rows;
            const Row row = exists ? epilogue.row(first_row + lane) : Row();
            if (!epilogue.in_vectors) row_at(smem_rows, lane) = row;
            MK_UNROLL
            for (int c = 0; c < T.n; c += 64) {  // 128 bytes of a residual
                if (exists) epilogue.prefetch(row, n0 + c);
            }
        }
        __syncwarp();
    }
    static __device__ __forceinline__ Row& row_at(uint8_t* smem_rows, int r) {
        return reinterpret_cast<RowSlot*>(smem_rows)[r].row;
    }

    // Sums go through shared memory 8 rows and 64 columns at a time, after which a lane has a pair
    // of adjacent columns and the next lane the next pair: whole sectors of outputs, residuals and
    // rotation tables.
    static __device__ __forceinline__ void write_pairs(const Epilogue& epilogue, int num_rows,
                                                       int n0, const Sums& sums, uint8_t* staged) {
        const int lane = threadIdx.x % 32;
        // Pair i of row r is at 256 r + 8 (i ^ 4 (r % 4)): four pairs, 32 bytes, move as one. As
        // the warp's place is a multiple of 256, the XOR can be that of the address.
        const uint32_t smem = static_cast<uint32_t>(__cvta_generic_to_shared(staged));
        const uint32_t smem_block = smem + lane / 4 * 256 + ((lane % 4 * 8) ^ (lane / 4 % 4 * 32));
        const uint32_t smem_row = smem + lane * 8;
        const auto pair_at = [](uint32_t address) -> float2& {
            return *static_cast<float2*>(__cvta_shared_to_generic(address));
        };
        MK_UNROLL
        for (int c = 0; c < T.n; c += 64) {
            const auto column = epilogue.column(n0 + c + lane * 2);
            MK_UNROLL
            for (int half = 0; half < 2; ++half) {
                MK_UNROLL
                for (int j = 0; j < 8; ++j) {
                    const float (&y)[4] = sums[c / 8 + j];
                    pair_at(smem_block ^ j * 32) = {y[2 * half], y[2 * half + 1]};
                }
                __syncwarp();
                const int end = min(8, num_rows - 8 * half);
                const auto row = [&](int r) -> const Row& {
                    return row_at(staged + kGemmStagedBytes, 8 * half + r);
                };
                const auto y = [&](int r) { return pair_at((smem_row ^ r % 4 * 32) + r * 256); };
                if constexpr (requires { epilogue.template store_rows<8>(column, end, row, y); }) {
                    epilogue.template store_rows<8>(column, end, row, y);
                } else {
                    _Pragma("unroll 4") for (int r = 0; r < end; ++r) {
                        const float2 sums_of_pair = y(r);
                        epilogue.store(row(r), column, sums_of_pair.x, sums_of_pair.y);
                    }
                }
                __syncwarp();
            }
        }
    }

    // Outputs that are a matrix of 2-byte elements, with rows of whole vectors of 16 bytes: rounded
    // in registers, through shared memory as 16 rows of up to 128 bytes, from there by vectors.
    template <bool kHasResidual>
    static __device__ __forceinline__ void write_vectors(const Epilogue& epilogue, int first_row,
                                                         int num_rows, int n0, const Sums& sums,
                                                         uint8_t* smem_warp) {
        constexpr int kOutputs = Epilogue::kOutputsOfPair;
        constexpr int kAll = T.n * kOutputs / 2;
        constexpr int kCols = kAll < 64 ? kAll : 64;   // of outputs at a time
        constexpr int kBlocks = kCols / kOutputs / 4;  // of 8 sums, for these
        constexpr int kPieces = kCols / kVec;
        constexpr int kRowsPerPass = 32 / kPieces, kPasses = 16 / kRowsPerPass;
        const uint32_t staged = static_cast<uint32_t>(__cvta_generic_to_shared(smem_warp));
        const int lane = threadIdx.x % 32;
        // As rows: piece `piece` of every kRowsPerPass'th row from `row` on.
        const int row = lane / kPieces, piece = lane % kPieces;
        const int first_col = n0 * kOutputs / 2 + piece * kVec;
        const auto place = [&](int pass) {
            return staged + swizzled<kPieces>(row + pass * kRowsPerPass, piece);
        };
        const auto of_row = [&](const void* rows, int64_t stride) {
            return static_cast<const uint16_t*>(rows) + (first_row + row) * stride + first_col;
        };
        uint16_t* const out = const_cast<uint16_t*>(of_row(epilogue.p.out, epilogue.p.out_stride));
        const auto exists = [&](int c, int pass) {
            return row + pass * kRowsPerPass < num_rows && first_col + c < epilogue.num_outputs();
        };
        uint4 residual[kPasses]{};
        const auto load_residual = [&](int c) {
            const int64_t stride = epilogue.p.residual_stride;
            const uint16_t* const from = of_row(epilogue.p.residual, stride) + c;
            MK_UNROLL
            for (int pass = 0; pass < kPasses; ++pass) {
                if (!exists(c, pass)) continue;
                residual[pass] = ptx::ld_global_v4(from + pass * kRowsPerPass * stride);
            }
        };

        if (kHasResidual) load_residual(0);
        MK_UNROLL
        for (int c = 0; c < kAll; c += kCols) {
            const int first = c / kCols * kBlocks;  // of the sums' blocks
            if (kHasResidual) {
                MK_UNROLL
                for (int i = 0; i < kPasses; ++i) ptx::st_shared_v4(place(i), residual[i]);
                __syncwarp();
                if (c + kCols < kAll) load_residual(c + kCols);
            }
            if constexpr (kOutputs == 2) {
                // Of two 8 x 8 blocks side by side, twice, as stmatrix takes them from sums.
                const uint32_t blocks = staged + swizzled<kPieces>(lane % 16, lane / 16);
                MK_UNROLL
                for (int j = 0; j < kBlocks; j += 2) {
                    uint32_t pairs[4];
                    if (kHasResidual) ptx::ldmatrix_x4(pairs, blocks ^ j * 16);
                    MK_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        const float (&y)[4] = sums[first + j + i / 2];
                        float2 v = {y[i % 2 * 2], y[i % 2 * 2 + 1]};
                        if (kHasResidual) {
                            const float2 add = Dtype::unpack(pairs[i]);
                            v.x += add.x;
                            v.y += add.y;
                        }
                        pairs[i] = Dtype::pack(v.x, v.y);
                    }
                    if (kHasResidual) __syncwarp();
                    ptx::stmatrix_x4(blocks ^ j * 16, pairs);
                }
            } else {
                MK_UNROLL
                for (int j = 0; j < kBlocks; ++j) {
                    MK_UNROLL
                    for (int half = 0; half < 2; ++half) {
                        const float (&y)[4] = sums[first + j];
                        const float output = epilogue.output(y[2 * half], y[2 * half + 1]);
                        uint8_t* const to = smem_warp + j % 2 * 8 + lane % 4 * 2 +
                                            swizzled<kPieces>(lane / 4 + 8 * half, j / 2);
                        *reinterpret_cast<uint16_t*>(to) =
                            static_cast<uint16_t>(Dtype::pack(output, 0.f));
                    }
                }
            }
            __syncwarp();
            MK_UNROLL
            for (int pass = 0; pass < kPasses; ++pass) {
                if (!exists(c, pass)) continue;
                ptx::st_global_v4(out + pass * kRowsPerPass * epilogue.p.out_stride + c,
                                  ptx::ld_shared_v4(place(pass)));
            }
            __syncwarp();
        }
    }

    static __device__ __forceinline__ void run(const Args& args) {
        extern __shared__ uint8_t smem_unaligned[];
        ptx::griddepcontrol_launch_dependents();
        ptx::griddepcontrol_wait();
        const uint32_t unaligned = static_cast<uint32_t>(__cvta_generic_to_shared(smem_unaligned));
        const uint32_t smem_stages = (unaligned + 1023) & ~1023u;
        const uint32_t smem_full =
            smem_stages + T.stages * kStageBytes + kGemmWarps * kGemmWarpBytes;
        const uint32_t smem_empty = smem_full + 8 * T.stages;
        const int rank_in_cluster = static_cast<int>(ptx::mov_u32_cluster_ctarank());
        const LinearGemmSm90 block{args,
                                   smem_stages,
                                   smem_full,
                                   smem_empty,
                                   (args.product.k + kGemmStageK - 1) / kGemmStageK,
                                   rank_in_cluster % args.grid.cluster.m,
                                   rank_in_cluster / args.grid.cluster.m};
        if (threadIdx.x == 0) {
            for (int i = 0; i < T.stages; ++i) {
                ptx::mbarrier_init(smem_full + 8 * i, 1);
                ptx::mbarrier_init(smem_empty + 8 * i,
                                   kGroups * (args.grid.cluster.m + args.grid.cluster.n - 1));
            }
            ptx::fence_mbarrier_init();
        }
        __syncthreads();
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
        // The same in all lanes, and known to be: descriptors then take uniform registers.
        const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) - 1;
        if (group < 0) {
            ptx::setmaxnreg_dec<kProducerRegisters>();
            if (threadIdx.x == 0) block.fetch();
        } else {
            ptx::setmaxnreg_inc<kConsumerRegisters>();
            const uint32_t smem_warp =
                ptx::mov_b32(smem_stages + T.stages * kStageBytes +
                             (threadIdx.x / 32 - 4) * kGemmWarpBytes);  // kept in a register
            block.multiply(group, static_cast<uint8_t*>(__cvta_shared_to_generic(smem_warp)));
        }
        // Until then others may copy into this block's stages, and arrive at its barriers.
        __syncwarp();
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
    }
};

template <class Dtype, GemmTileSm90 T, class Epilogue>
__device__ __forceinline__ void linear_gemm_sm90(
    const LinearGemmSm90Args<typename Epilogue::Params>& args) {
    LinearGemmSm90<Dtype, T, Epilogue>::run(args);
}

}  // namespace mk
