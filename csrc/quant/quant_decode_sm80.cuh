// y = x w^T for up to 64 rows of x and packed weights w, bound by the bytes of w: each is read from
// DRAM once. A block has up to 16 of the rows (blockIdx.y; docs/native.md says why not more).
//
//             256 k
//   rows    +------+------+------+     block b: rows of tiles b, b + grid, ...; one block an SM
//   of w    |  |   |  |   |  |   |     warp:    an eighth of the tiles of a round: columns of 256
//   k, 16      | warp | warp | warp |              of all the rows of tiles of the round
//           |  0   |  1   |  2   |     sums:    Y of each tile to shared memory; when the round is
//   16      |  |   |  |   | ...                 done, a thread for two rows and two tokens adds
//           +--v---+--v---+------+              them in ascending k, and runs the epilogue
//
// A = w, 16 rows x 16 k of small integers as f16 patterns, B = x16, 16 k x 8 tokens (one or two
// such): quant_layout.h, quant_unpack.cuh, quant_x.cuh tell how. All blocks convert all of x first.
// What is added in which order depends on k alone, and a column of an MMA on its own tokens: so a
// row's bits depend on nothing else. Types are told apart once per run of a warp's columns of the
// same type: Q, K and V may differ. Of gate and up that are two matrices a round has tiles of the
// same rows, first gate's, then up's; a thread adds those of two rows of both. One entry serves all
// products and dtypes, which are branches where x is converted and where sums are stored.
//
// Weights come by 16-byte loads straight into registers, a tile ahead: all warps have a tile each
// on its way all the time. Tiles take turns in two sets of registers, and the loop has two of them:
// in one set the compiler loads early all the same, and copies 16 to 32 registers at the end of
// each. Scales come two ways: each lane converts its own four (or eight), and gets those of its
// rows that the other three lanes converted from 512 bytes of shared memory of the warp, of which
// tiles take turns in two such parts. Up to 8 tokens, x of a column stays in registers (36).
// Shared memory: quant_tiles.h. Where x does not fit, k goes in chunks.
// That file has the instructions per weight, too; of Q4_K a tile takes 174 (80 unpack, 36 scale and
// add, 18 MMAs), the rest of the kernel on sm_80 22 more a tile at m = 1 and 48 at m = 8. Lost:
// tiles by turns along k, x from shared memory each time: 12 more a tile. More warps spill. What
// only the end of a row or extreme ones need is kept from being computed for all (ptx::mov_b32).
#pragma once

#include "common/f32_pair.cuh"
#include "ptx/sm90.cuh"
#include "quant/quant_decode_output.cuh"
#include "quant/quant_decode_x.cuh"
#include "quant/quant_unpack.cuh"

namespace mk {

// ---- w ----

// A run of a warp's tiles: a group, of one row after the other.
struct QuantColumn {
    const uint8_t* piece;  // this lane's first one of the first tile
    int64_t step;          // to the next row's
    int rows;
    uint32_t x;       // this lane's x of the group
    uint32_t smem_y;  // this lane's sums of the first tile
    int type;         // 0: there is no column
    int group;
};

// A warp's way through the tiles of a round: of each matrix an eighth, along the rows first.
template <int kTokenTiles>
struct QuantWalk {
    static constexpr int kSumsBytes = quant_sums_bytes<kTokenTiles>;

    const QuantDecodeMatrix* matrix;  // the next one
    const QuantRound& round;
    const uint32_t smem_x, smem_sums;  // this lane's
    int end = 0;                       // rows of the matrices before the next one
    // Of the matrix at hand
    int num_rows, left = 0;  // tiles after the column
    int group, tile_bytes;
    const uint8_t* first_piece;  // of the group's first tile, and its sums
    uint32_t first_y;
    QuantColumn column{};

    __device__ __forceinline__ QuantWalk(const QuantDecodeMatrix* w, const QuantRound& of,
                                         uint32_t x_at, uint32_t sums_at)
        : matrix(w), round(of), smem_x(x_at), smem_sums(sums_at + threadIdx.x % 32 * 16) {
        enter_matrix();  // a round has rows
    }

    // To the next column.
    __device__ __forceinline__ void next() {
        if (left == 0) {
            column.type = 0;
            if (end < round.num_rows) enter_matrix();
            return;
        }
        ++group;
        first_piece += tile_bytes;
        first_y += kSumsBytes;
        set_column(0);
    }

    // That the column's tiles have.
    __device__ __forceinline__ int quarters(const QuantColumn& of) const {
        return min(round.num_quarters - 4 * (round.first_group + of.group), 4);
    }

  private:
    __device__ __forceinline__ void set_column(int row) {
        column.piece = first_piece + row * column.step;
        column.rows = min(num_rows - row, left);
        left -= column.rows;
        column.x = smem_x + group * kQuantXGroupBytes;
        column.smem_y = first_y + row * round.row_bytes;
        column.group = group;
    }

    __device__ __forceinline__ void enter_matrix() {
        const uint32_t thread = ptx::mov_u32_tid_x(), warp = thread / 32;
        const int blocks = gridDim.x;
        column.type = 0;
        do {
            const QuantDecodeMatrix& w = *matrix++;
            const int start = end;
            end = round.num_rows;
            if (w.end < round.num_tiles) {  // not the last one
                end = (w.end - ptx::mov_b32(round.first_row) + blocks - 1) / blocks;
                end = min(max(end, start), round.num_rows);
            }
            num_rows = end - start;
            const uint32_t num_tiles = num_rows * round.num_groups;
            const uint32_t first = num_tiles * warp / kQuantWarps;
            left = num_tiles * (warp + 1) / kQuantWarps - first;
            if (left == 0) continue;
            group = first / static_cast<uint32_t>(num_rows);
            column.type = w.type;
            column.step = w.step;
            tile_bytes = w.tile_bytes;
            const int first_of_w = round.first_row + start * blocks - w.first;
            first_piece = w.tiles + int64_t{first_of_w} * w.row_tile_bytes +
                          ((round.first_group + group) * tile_bytes + thread % 32 * 16);
            first_y = smem_sums + start * round.row_bytes + group * kSumsBytes;
            set_column(first - group * num_rows);
            return;
        } while (end < round.num_rows);
    }
};

// A lane's words of a tile that is not a whole one.
template <int kType>
__device__ __forceinline__ void load_short(uint32_t (&words)[kQuantTileWords<kType>],
                                           const uint8_t* tile, int lane, int quarters) {
    using Pieces = QuantPieces<kType>;
    if constexpr (!QuantScales<kType>::kIsK) {
        constexpr int kPerQuarter = Pieces::kBits / 4;
        MK_UNROLL
        for (int q = 0; q < 4; ++q) {
            const bool is_there = q < quarters;
            MK_UNROLL
            for (int i = 0; i < kPerQuarter; ++i) {
                const int p = q * kPerQuarter + i;
                uint4 v{};
                if (is_there) v = ptx::ld_global_nc_l1_no_allocate_v4(tile + p * 512 + lane * 16);
                Pieces::store(words, p, v);
            }
            if constexpr (Pieces::kHasFifths) {
                uint32_t& fifth = words[5 * q + 4];
                fifth = 0;
                if (is_there) {
                    fifth = ptx::ld_global_nc_l1_no_allocate(tile + quarters * 512 +
                                                             (lane * quarters + q) * 4);
                }
            }
        }
    }
}

// Piece p of a whole tile, from piece 0 of the lane.
template <int kPiece>
__device__ __forceinline__ uint4 load_lane_piece(const uint8_t* first) {
    return ptx::ld_global_nc_l1_no_allocate_v4<kPiece * 512>(first);
}

// s += scale * p, of rows g and g + 8.
__device__ __forceinline__ void add_scaled(float (&s)[4], const float (&p)[4], float scale,
                                           float scale_8) {
    const float2 g = fma_pair(both(scale), {p[0], p[1]}, {s[0], s[1]});
    const float2 g_8 = fma_pair(both(scale_8), {p[2], p[3]}, {s[2], s[3]});
    s[0] = g.x, s[1] = g.y, s[2] = g_8.x, s[3] = g_8.y;
}

// B of a lane for 32 k, of the tiles' x or of its block sums. Weights of 8 bits are x1: of x / 16.
template <int kType, int kOffset>
__device__ __forceinline__ uint4 load_x(uint32_t smem_x) {
    uint4 b = ptx::ld_shared_v4<kOffset>(smem_x);
    if constexpr (QuantPieces<kType>::kBits == 8) {
        b.y = ptx::mul_rn_f16x2(b.y, 0x4C004C00u);
        b.w = ptx::mul_rn_f16x2(b.w, 0x4C004C00u);
    }
    return b;
}

// Y of columns of tiles to the sums, from `at` on, as long as they are of this type. x_bytes: from
// a tile of tokens to the second one, in x.
template <int kType, int kTokenTiles>
__device__ __forceinline__ void multiply_columns(QuantWalk<kTokenTiles>& at, uint32_t x_bytes,
                                                 uint8_t* smem_scales) {
    using Pieces = QuantPieces<kType>;
    using Scales = QuantScales<kType>;
    constexpr bool kKeepsX = kTokenTiles == 1;  // in registers, for all rows of a column
    // Read here, so that no type's addresses hold registers while another's tiles are multiplied.
    const int lane = ptx::mov_u32_tid_x() % 32, g = lane / 4, t = lane % 4;
    const uint32_t smem_rows = ptx::mov_b32(smem_address(smem_scales) + g * 64);
    uint4* const smem_own = reinterpret_cast<uint4*>(smem_scales) + lane;
    const int64_t place = ptx::mov_b64(Scales::scales_place(lane));
    const uint32_t y_step = at.round.row_bytes;

    struct Tile {
        uint32_t words[kQuantTileWords<kType>];
        Scales scales;
    };
    // Not left undefined: that would keep the registers of all types from one switch to the next.
    Tile tiles[2]{};
    const auto load_whole = [&](Tile& to, const uint8_t* piece) {
        to.scales.load(piece, place, lane);
        static_for<Pieces::kCount>(
            [&](auto p) { Pieces::store(to.words, p, load_lane_piece<p>(piece)); });
    };
    const auto load_all = [&](Tile& to, const uint8_t* piece, int quarters) {
        if (Scales::kIsK || quarters == 4) {
            load_whole(to, piece);
        } else {
            to.scales.load_short(piece - lane * 16, lane, quarters);
            load_short<kType>(to.words, piece - lane * 16, lane, quarters);
        }
    };
    QuantColumn column = at.column;
    load_all(tiles[0], column.piece, Scales::kIsK ? 4 : at.quarters(column));
    for (;;) {
        at.next();
        const bool is_same = at.column.type == kType;
        const int quarters = Scales::kIsK ? 4 : ptx::mov_b32(at.quarters(column));
        const bool is_whole = quarters == 4;
        // The last tile's next one: of the next column or, without a branch, a tile in which all
        // lanes read the same 16 bytes of each piece.
        const uint8_t* const after = is_same && (Scales::kIsK || at.quarters(at.column) == 4)
                                         ? at.column.piece
                                         : column.piece - lane * 16;
        uint4 kept_x[kKeepsX ? 8 : 1], kept_sums{};
        if constexpr (kKeepsX) {
            static_for<8>([&](auto i) { kept_x[i] = load_x<kType, i * 64>(column.x); });
            kept_sums = ptx::ld_shared_v4<512>(column.x);
        }
        const uint8_t* next = column.piece;
        uint32_t smem_y = column.smem_y;
        const uint32_t last_y = smem_y + (column.rows - 1) * y_step;

        // Y of one of the two to the sums, while the other one is loaded; is it the column's last?
        const auto multiply_tile = [&](auto which) {
            const Tile& tile = tiles[which];
            constexpr int kPart = which * kQuantScaleBytes;
            // The scales of this lane's rows from all four lanes that have them
            typename Scales::Pairs pairs;
            tile.scales.scale_pairs(pairs);
            smem_own[kPart / 16] = Scales::scales(pairs);
            __syncwarp();  // and all lanes are done with the other part, of the tile before
            uint32_t minima[4];
            tile.scales.minima(pairs, minima);
            float s[kTokenTiles][4]{}, c[kTokenTiles][4]{};
            MK_UNROLL
            for (int n = 0; n < kTokenTiles; ++n) {
                add_minima(c[n], minima,
                           kKeepsX ? kept_sums : ptx::ld_shared_v4<512>(column.x + n * x_bytes));
            }

            const bool is_last = smem_y == last_y;
            next = is_last ? after : next + column.step;
            if (is_whole) {
                load_whole(tiles[1 - which], next);
            } else if (!is_last) {
                load_all(tiles[1 - which], next, quarters);
            }

            static_for<4>([&](auto q) {
                QuantFragments a;
                unpack_quarter_of<kType>(tile.words, q, a);
                const uint4 scale = ptx::ld_shared_v4<kPart + q * 16>(smem_rows);
                static_for<2>([&](auto i) {  // 32 k
                    const uint32_t of_g = i ? scale.z : scale.x, of_g_8 = i ? scale.w : scale.y;
                    if constexpr (Scales::kIs16) fold_scales(a + 2 * i, of_g, of_g_8);
                    MK_UNROLL
                    for (int n = 0; n < kTokenTiles; ++n) {
                        uint4 b;
                        if constexpr (kKeepsX) {
                            b = kept_x[2 * q + i];
                        } else {
                            b = load_x<kType, (2 * q + i) * 64>(column.x + n * x_bytes);
                        }
                        float from_0[4]{};
                        float (&p)[4] = Scales::kIs16 ? s[n] : from_0;
                        ptx::mma_m16n8k16_f32_f16(p, a[2 * i], b.x, b.y);
                        ptx::mma_m16n8k16_f32_f16(p, a[2 * i + 1], b.z, b.w);
                        if constexpr (!Scales::kIs16) {
                            add_scaled(s[n], p, __uint_as_float(of_g), __uint_as_float(of_g_8));
                        }
                    }
                });
            });
            MK_UNROLL
            for (int n = 0; n < kTokenTiles; ++n) {
                tile.scales.finish(s[n], c[n]);
                // Of tokens 2t and 2t + 1: rows g and g + 8 together
                ptx::st_shared_v4(smem_y + n * 512,
                                  {__float_as_uint(s[n][0]), __float_as_uint(s[n][2]),
                                   __float_as_uint(s[n][1]), __float_as_uint(s[n][3])});
            }
            smem_y += y_step;
            return is_last;
        };
        for (;;) {
            if (multiply_tile(Constant<0>())) {
                tiles[0] = tiles[1];
                __syncwarp();  // the next tile's scales take this one's part
                break;
            }
            if (multiply_tile(Constant<1>())) break;
        }
        if (!is_same) return;
        if constexpr (!Scales::kIsK) {
            const int quarters = at.quarters(at.column);
            if (!is_whole || quarters < 4) load_all(tiles[0], at.column.piece, quarters);
        }
        column = at.column;
    }
}

// Y of all tiles of the round that are this warp's.
template <int kTokenTiles>
__device__ __forceinline__ void multiply_round(const QuantDecodeMatrix* w, const QuantRound& round,
                                               uint32_t smem_x, uint32_t x_bytes,
                                               uint8_t* smem_scales, uint32_t smem_sums) {
    QuantWalk<kTokenTiles> at(w, round, smem_x, smem_sums);
    while (at.column.type != 0) {
        switch (at.column.type) {
#define MK_QUANT_CASE(type)                                            \
    case type:                                                         \
        multiply_columns<type, kTokenTiles>(at, x_bytes, smem_scales); \
        break;
            MK_FOR_EACH_QUANT_TYPE(MK_QUANT_CASE)
#undef MK_QUANT_CASE
            default:
                __builtin_unreachable();
        }
    }
}

// Asks L2 for the block's first row of tiles, which does not change, while x is not there yet.
__device__ __forceinline__ void prefetch_tiles(const QuantDecodeMatrix* w) {
    const int row = blockIdx.x;
    const QuantDecodeMatrix& m = matrix_of(w, row);
    const uint8_t* const tiles = m.tiles + int64_t{row - m.first} * m.row_tile_bytes;
    const int first = threadIdx.x * 128;
    const uint8_t* line = tiles + first;
    MK_NO_UNROLL
    for (int left = min(m.row_tile_bytes, kQuantPrefetchBytes) - first; left > 0;) {
        ptx::prefetch_global_l2(line);
        line += kQuantThreads * 128;
        left -= kQuantThreads * 128;
    }
}

// The same of a chunk, before its x is converted: a warp asks for a row.
__device__ __forceinline__ void prefetch_round(const QuantDecodeMatrix* w,
                                               const QuantRound& round) {
    const int lane = threadIdx.x % 32;
    int left = kQuantPrefetchBytes / kQuantWarps;
    MK_NO_UNROLL
    for (int i = threadIdx.x / 32; i < round.num_rows && left > 0; i += kQuantWarps) {
        const int row = round.first_row + i * static_cast<int>(gridDim.x);
        const QuantDecodeMatrix& m = matrix_of(w, row);
        const int first = round.first_group * m.tile_bytes;
        const int end = min(first + round.num_groups * m.tile_bytes, m.row_tile_bytes);
        const uint8_t* const tiles = m.tiles + int64_t{row - m.first} * m.row_tile_bytes;
        MK_NO_UNROLL
        for (int at = first + lane * 128; at < end; at += 32 * 128) {
            ptx::prefetch_global_l2(tiles + at);
        }
        left -= end - first;
    }
}

// ---- the kernel ----

template <int kTokenTiles>
__device__ __forceinline__ void quant_decode_sm80(const QuantDecodeArgs& args) {
    extern __shared__ __align__(1024) uint8_t dynamic_smem[];
    Product a = args.product;  // copies: read once, not after every instruction on memory
    const QuantDecodeShape shape = args.shape;
    const int x_stride = shape.x_stride, dtype = args.to.dtype;
    const QuantPart part = part_of<kTokenTiles>(args);
    a.x = row_of(a.x, part.first, a.x_stride);
    a.m = part.m;
    const QuantSmem smem(dynamic_smem, shape);
    const int lane = threadIdx.x % 32, num_blocks = gridDim.x;

    ptx::griddepcontrol_launch_dependents();
#if MK_SM >= 90
    if (shape.cluster > 1) ptx::barrier_cluster_arrive_relaxed();
#endif
    prefetch_tiles(args.w);
    ptx::griddepcontrol_wait();

    set_rows<kTokenTiles>(args, smem);
    const XShare share(a.m, shape, smem_address(dynamic_smem));
    find_norm_scales(a, dtype, smem);
#if MK_SM >= 90
    if (shape.cluster > 1) ptx::barrier_cluster_wait();  // the other block has started
#endif

    // This lane's token (absent ones are the last one), and its second one.
    const int last = a.m - 1, g = lane / 4;
    const uint32_t smem_x = smem_address(smem.x) + min(g, last) * x_stride + threadIdx.x % 4 * 16;
    const uint32_t x_bytes = (min(kQuantTokens + g, last) - min(g, last)) * x_stride;

    uint32_t smem_sums = smem_address(smem.sums), other_sums = shape.round_bytes;
    int first = blockIdx.x, first_group = 0;
    int left = shape.least_tiles + (blockIdx.x < shape.blocks_with_more);  // at least one
    bool needs_x = true;
    for (int turn = 0;;) {
        const QuantRound round{first,
                               min(left, shape.round_tiles),
                               shape.num_tiles,
                               first_group,
                               min(shape.chunk_groups, shape.num_groups - first_group),
                               shape.num_quarters,
                               static_cast<uint32_t>(shape.sums_row_bytes)};
        if (needs_x) {
            // For 8 rows, which are converted sooner, it would be 4 % more instructions.
            if (kTokenTiles > 1 && shape.num_chunks > 1) {
                prefetch_round(args.w, round);
                if (shape.together == 2) prefetch_round(args.w + 1, round);
            }
            convert_x<kTokenTiles>(a, dtype, smem, shape, share, first_group, round.num_groups,
                                   turn == 0);
        }
        const bool is_pair = shape.together == 2;
        uint32_t to = smem_sums;
        const QuantDecodeMatrix* w = args.w;
        for (;;) {
            multiply_round<kTokenTiles>(w, round, smem_x, x_bytes, smem.scales, to);
            if (!is_pair || w != args.w) break;
            to += round.num_rows * round.row_bytes;
            ++w;
        }
        __syncthreads();
        const bool is_first = first_group == 0;
        first_group += shape.chunk_groups;
        const bool is_last = first_group >= shape.num_groups;
        is_pair ? add_round<kTokenTiles, true>(args, round, smem, smem_sums, is_first, is_last)
                : add_round<kTokenTiles, false>(args, round, smem, smem_sums, is_first, is_last);
        if (++turn == shape.num_turns) return;
        // The next round's sums go to the other buffer; with chunks, x is converted again.
        needs_x = shape.num_chunks > 1;
        if (needs_x) __syncthreads();
        smem_sums += other_sums;
        other_sums = -other_sums;
        if (is_last) {
            first_group = 0;
            first += shape.round_tiles * num_blocks;
            left -= shape.round_tiles;
            if (left <= 0) return;
        }
    }
}

}  // namespace mk
