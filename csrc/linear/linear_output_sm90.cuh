// What a warp of linear_gemm_sm90.cuh and linear_fp8_sm90.cuh does with its 16 rows of a tile of
// sums: outputs by way of the warp's own shared memory, so that they leave in whole sectors.
//
//   Sums[j]: columns 8 j ... + 7 of the tile, as wgmma leaves them: row lane / 4 and that + 8
#pragma once

#include "common/static_for.cuh"
#include "common/swizzle.cuh"
#include "linear/linear_epilogue.cuh"

namespace mk {

template <class Dtype, GemmTileSm90 T, class Epilogue>
struct GemmOutputSm90 {
    using Row = typename Epilogue::Row;
    using Sums = float[T.n / 8][4];

    // 40 bytes apart no two of 16 rows share a bank in an access of 8 bytes.
    struct RowSlot {
        Row row;
        uint8_t pad[kGemmRowPitch - sizeof(Row)];
    };
    static_assert(sizeof(RowSlot) == kGemmRowPitch && kGemmWarpBytes % 256 == 0);

    // Where this warp's rows go, kept for write(); and what it will read there, to L2.
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

    // All of a tile's rows of this warp.
    static __device__ __forceinline__ void write(const Epilogue& epilogue, int first_row,
                                                 int num_rows, int n0, const Sums& sums,
                                                 uint8_t* smem_warp) {
        if constexpr (Epilogue::kOutputsOfPair > 0) {
            if (epilogue.in_vectors) {
                const auto in_vectors = [&](auto has_residual) {
                    write_vectors<has_residual>(epilogue, first_row, num_rows, n0, sums, smem_warp);
                };
                if constexpr (Epilogue::kOutputsOfPair == 2) {
                    if (epilogue.p.residual) return in_vectors(Constant<true>());
                }
                return in_vectors(Constant<false>());
            }
        }
        if constexpr (requires { epilogue.in_fours; }) {
            if (epilogue.in_fours) return write_fours(epilogue, n0, sums, smem_warp);
        }
        write_pairs(epilogue, num_rows, n0, sums, smem_warp);
    }

    // Sums go through shared memory 8 rows and 64 columns at a time, after which a lane has a pair
    // of adjacent columns and the next lane the next pair: whole sectors of outputs, residuals and
    // rotation tables.
    static __device__ __forceinline__ void write_pairs(const Epilogue& epilogue, int num_rows,
                                                       int n0, const Sums& sums, uint8_t* staged) {
        const int lane = threadIdx.x % 32;
        const uint32_t smem_lane = staged_at(staged, 0, lane * 8);
        MK_UNROLL
        for (int c = 0; c < T.n; c += 64) {
            const auto column = epilogue.column(n0 + c + lane * 2);
            MK_UNROLL
            for (int half = 0; half < 2; ++half) {
                stage(sums, c, half, staged);
                const int end = min(8, num_rows - 8 * half);
                _Pragma("unroll 4") for (int r = 0; r < end; ++r) {
                    const auto y = vector_at<float2>((smem_lane ^ r % 4 * 32) + r * 256);
                    epilogue.store(row_at(staged + kGemmStagedBytes, 8 * half + r), column, y.x,
                                   y.y);
                }
                __syncwarp();
            }
        }
    }

    // The same with four columns for a lane, of every second row. Angles are asked for a turn
    // ahead.
    static __device__ __forceinline__ void write_fours(const Epilogue& epilogue, int n0,
                                                       const Sums& sums, uint8_t* staged) {
        const int first = threadIdx.x % 32 / 16, lane = threadIdx.x % 16;
        const uint32_t smem_lane = staged_at(staged, first, lane * 16);
        const auto rows = [&](int turn) {
            return [=](int r) -> const Row& {
                return row_at(staged + kGemmStagedBytes, turn % 2 * 8 + 2 * r + first);
            };
        };
        const auto y = [&](int r) { return vector_at<float4>((smem_lane ^ r % 2 * 64) + r * 512); };
        constexpr int kTurns = T.n / 32;
        auto column = epilogue.column(n0 + lane * 4);
        auto angles = epilogue.angles(column, rows(0));
        MK_UNROLL
        for (int turn = 0; turn < kTurns; ++turn) {
            stage(sums, turn / 2 * 64, turn % 2, staged);
            const auto now = column;
            const auto angles_now = angles;
            if (turn + 1 < kTurns) {
                if (turn % 2) column = epilogue.column(n0 + (turn + 1) / 2 * 64 + lane * 4);
                angles = epilogue.angles(column, rows(turn + 1));
            }
            epilogue.store_fours(now, angles_now, rows(turn), y);
            __syncwarp();
        }
    }

    // Byte b of row r of what a warp has staged is at 256 r + (b ^ 32 (r % 4)): four pairs move as
    // one. As the warp's place is a multiple of 256, the XOR can be that of the address.
    static __device__ __forceinline__ uint32_t staged_at(uint8_t* staged, int r, int byte) {
        const uint32_t smem = static_cast<uint32_t>(__cvta_generic_to_shared(staged));
        return smem + r * 256 + (byte ^ r % 4 * 32);
    }
    template <class Vector>
    static __device__ __forceinline__ Vector& vector_at(uint32_t address) {
        return *static_cast<Vector*>(__cvta_shared_to_generic(address));
    }
    // Rows 8 half ... + 7 of columns c ... c + 63.
    static __device__ __forceinline__ void stage(const Sums& sums, int c, int half,
                                                 uint8_t* staged) {
        const int lane = threadIdx.x % 32;
        const uint32_t smem_block = staged_at(staged, lane / 4, lane % 4 * 8);
        MK_UNROLL
        for (int j = 0; j < 8; ++j) {
            const float (&y)[4] = sums[c / 8 + j];
            vector_at<float2>(smem_block ^ j * 32) = {y[2 * half], y[2 * half + 1]};
        }
        __syncwarp();
    }

    // Outputs that are a matrix of 2-byte elements, with rows of whole vectors of 16 bytes: rounded
    // in registers, through shared memory as 16 rows of up to 128 bytes, from there by vectors.
    template <bool kHasResidual>
    static __device__ __forceinline__ void write_vectors(const Epilogue& epilogue, int first_row,
                                                         int num_rows, int n0, const Sums& sums,
                                                         uint8_t* smem_warp) {
        constexpr int kOutputs = Epilogue::kOutputsOfPair;
        constexpr int kAll = T.n * kOutputs / 2;
        constexpr int kCols = kAll % 64 ? 32 : 64;     // of outputs at a time
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
};

}  // namespace mk
