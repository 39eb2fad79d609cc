// mk_quant_pack and mk_quant_unpack: between GGUF blocks and the tiles of quant/quant_layout.h.
//
// A tile is made of 8 pairs of rows, slots g and g + 8, which lanes 4g ... 4g + 3 hold. Each pair
// goes through vectors of 4 words, one for each of these lanes t:
//
//   blocks <-> q (16 bits, in the order of k) <-> a[step][0 ... 3]: what the lanes' MMA takes
//          <-> words by quant_field's drawing <-> 16 bytes a lane: a transposition of 4 words
//
// Vectors are those of any x86-64 or Arm. Compiled for AVX2 or AVX-512 the same code is between a
// fifth slower (4 bits) and a quarter faster (6 bits): not worth a file per instruction set.
#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/pool.h"
#include "cpu/quant_pack_blocks.h"
#include "quant/quant_plan.h"

namespace mk::cpu {
namespace {

constexpr int kPairs = kQuantTileRows / 2;

// ---- four lanes' words ----

typedef uint32_t Lanes __attribute__((vector_size(16)));

inline Lanes load(const void* p) {
    Lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(void* p, Lanes v) { std::memcpy(p, &v, sizeof v); }

// Elements i ... l of the 8 of x and y.
template <int i, int j, int k, int l>
inline Lanes shuffle(Lanes x, Lanes y) {
#if defined(__clang__)
    return __builtin_shufflevector(x, y, i, j, k, l);
#else
    return __builtin_shuffle(x, y, Lanes{i, j, k, l});
#endif
}

struct Four {
    Lanes v[4];
};
inline Four transpose(const Four& x) {
    const Lanes low01 = shuffle<0, 4, 1, 5>(x.v[0], x.v[1]);
    const Lanes low23 = shuffle<0, 4, 1, 5>(x.v[2], x.v[3]);
    const Lanes high01 = shuffle<2, 6, 3, 7>(x.v[0], x.v[1]);
    const Lanes high23 = shuffle<2, 6, 3, 7>(x.v[2], x.v[3]);
    return {{shuffle<0, 1, 4, 5>(low01, low23), shuffle<2, 3, 6, 7>(low01, low23),
             shuffle<0, 1, 4, 5>(high01, high23), shuffle<2, 3, 6, 7>(high01, high23)}};
}

template <class F, int... i>
inline void unroll(F&& f, std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>{}), ...);
}
// f(0) ... f(count - 1), each a constant.
template <int count, class F>
inline void unroll(F&& f) {
    unroll(std::forward<F>(f), std::make_integer_sequence<int, count>{});
}

// The two 16-bit fields of each word, `width` bits from `from` on, moved to bit `to`.
template <int from, int width, int to>
inline Lanes move_fields(Lanes v) {
    constexpr uint32_t mask = ((1u << width) - 1) * 0x00010001u;
    if constexpr (from >= to) {
        return v >> (from - to) & (mask << to);
    } else {
        return (v & mask << from) << (to - from);
    }
}

// ---- a quarter of a pair of rows: a[s][0 ... 3] of 4 steps <-> the lanes' words ----

template <int kType>
inline void pack_quarter(const Lanes (&a)[4][4], Lanes* words) {
    for (int i = 0; i < quant_words(kType); ++i) words[i] = Lanes{};
    unroll<16>([&](auto index) {
        constexpr int s = index / 4, i = index % 4;
        if constexpr (quant_words(kType) == 8) {
            const Lanes bytes = (a[s][i] & 0xFFu) | (a[s][i] >> 8 & 0xFF00u);
            words[2 * s + i % 2] |= bytes << i / 2 * 16;
        } else {
            constexpr QuantField field = quant_field(kType, s, i % 2, i / 2 * 2);
            unroll<field.count>([&](auto part) {
                constexpr QuantBits b = field.bits[part];
                words[b.at] |= move_fields<b.from, b.width, b.bit>(a[s][i]);
            });
        }
    });
}

template <int kType>
inline void unpack_quarter(const Lanes* words, Lanes (&a)[4][4]) {
    unroll<16>([&](auto index) {
        constexpr int s = index / 4, i = index % 4;
        if constexpr (quant_words(kType) == 8) {
            const Lanes bytes = words[2 * s + i % 2] >> i / 2 * 16;
            a[s][i] = (bytes & 0xFFu) | (bytes << 8 & 0xFF0000u);
        } else {
            constexpr QuantField field = quant_field(kType, s, i % 2, i / 2 * 2);
            a[s][i] = Lanes{};
            unroll<field.count>([&](auto part) {
                constexpr QuantBits b = field.bits[part];
                a[s][i] |= move_fields<b.bit, b.width, b.from>(words[b.at]);
            });
        }
    });
}

// Row slot g + 8h's q of a quarter <-> a[s][h], a[s][2 + h]: k = 16 s + 4 t + e, e in pairs.
inline void to_fragments(const uint16_t* q, int h, Lanes (&a)[4][4]) {
    for (int s = 0; s < 4; ++s) {
        const Lanes first = load(q + 16 * s), second = load(q + 16 * s + 8);
        a[s][h] = shuffle<0, 2, 4, 6>(first, second);
        a[s][2 + h] = shuffle<1, 3, 5, 7>(first, second);
    }
}

inline void from_fragments(const Lanes (&a)[4][4], int h, uint16_t* q) {
    for (int s = 0; s < 4; ++s) {
        store(q + 16 * s, shuffle<0, 4, 1, 5>(a[s][h], a[s][2 + h]));
        store(q + 16 * s + 8, shuffle<2, 6, 3, 7>(a[s][h], a[s][2 + h]));
    }
}

// ---- quants of a pair of rows <-> tile ----

// The first of the four words of a lane's piece; 5 bits keep the fifth word apart.
constexpr int first_word(int type, int piece) { return piece * (quant_words(type) == 5 ? 5 : 4); }
constexpr int num_pieces(int type, int quarters) {
    return quarters * quant_words(type) / (quant_words(type) == 5 ? 5 : 4);
}

template <int kType>
void pack_quants(const Group (&rows)[2], int g, int quarters, uint8_t* tile) {
    Lanes words[4 * quant_words(kType)];
    for (int c = 0; c < quarters; ++c) {
        Lanes a[4][4];
        for (int h = 0; h < 2; ++h) to_fragments(rows[h].q + 64 * c, h, a);
        pack_quarter<kType>(a, words + c * quant_words(kType));
    }
    for (int piece = 0; piece < num_pieces(kType, quarters); ++piece) {
        const Lanes* const w = words + first_word(kType, piece);
        const Four lanes = transpose({{w[0], w[1], w[2], w[3]}});
        for (int t = 0; t < 4; ++t) store(tile + (piece * 32 + 4 * g + t) * 16, lanes.v[t]);
    }
    if constexpr (quant_words(kType) == 5) {
        for (int c = 0; c < quarters; ++c) {
            for (int t = 0; t < 4; ++t) {
                const uint32_t word = words[5 * c + 4][t];
                std::memcpy(tile + quant_word_offset(kType, quarters, 4 * g + t, 5 * c + 4), &word,
                            sizeof word);
            }
        }
    }
}

template <int kType>
void unpack_quants(const uint8_t* tile, int g, int quarters, Group (&rows)[2]) {
    Lanes words[4 * quant_words(kType)];
    for (int piece = 0; piece < num_pieces(kType, quarters); ++piece) {
        Four lanes;
        for (int t = 0; t < 4; ++t) lanes.v[t] = load(tile + (piece * 32 + 4 * g + t) * 16);
        const Four w = transpose(lanes);
        std::copy(w.v, w.v + 4, words + first_word(kType, piece));
    }
    if constexpr (quant_words(kType) == 5) {
        for (int c = 0; c < quarters; ++c) {
            for (int t = 0; t < 4; ++t) {
                uint32_t word;
                std::memcpy(&word, tile + quant_word_offset(kType, quarters, 4 * g + t, 5 * c + 4),
                            sizeof word);
                words[5 * c + 4][t] = word;
            }
        }
    }
    for (int c = 0; c < quarters; ++c) {
        Lanes a[4][4];
        unpack_quarter<kType>(words + c * quant_words(kType), a);
        for (int h = 0; h < 2; ++h) from_fragments(a, h, rows[h].q + 64 * c);
    }
}

// ---- scales of a row <-> tile ----

// The integer scale (kKind 0) or minimum (1) kBlock of a K type in the tile: quant_scale_field's
// for slot 0, from where the places move by the same steps for all blocks.
template <int kType, int kBlock, int kKind, class F>
inline void for_parts(int slot, const F& f) {
    constexpr QuantField field = quant_scale_field(kType, 0, kBlock, kKind);
    unroll<field.count>([&](auto part) {
        constexpr QuantBits b = field.bits[part];
        constexpr QuantBits by_g = quant_scale_field(kType, 1, kBlock, kKind).bits[part];
        constexpr QuantBits by_h = quant_scale_field(kType, 8, kBlock, kKind).bits[part];
        const int g = slot % 8, h = slot / 8;
        f(b.at + g * (by_g.at - b.at) + h * (by_h.at - b.at), b.bit + h * (by_h.bit - b.bit),
          (1 << b.width) - 1, b.from);
    });
}

// f(block, kind), both constants, for each of them.
template <int kType, class F>
inline void for_integers(const F& f) {
    constexpr QuantFormat format = quant_format(kType);
    constexpr int blocks = format.block_k == 256 ? 256 / format.scale_k : 0;
    unroll<blocks>([&](auto block) {
        f(block, std::integral_constant<int, 0>{});
        if constexpr (format.has_min) f(block, std::integral_constant<int, 1>{});
    });
}

// The scale section of the tile is 0 before.
template <int kType>
void pack_scales(const Group& row, int slot, int quarters, uint8_t* tile) {
    constexpr QuantFormat f = quant_format(kType);
    const auto put = [&](int block, bool is_min, uint16_t half) {
        store_u16(tile + quant_half_offset(kType, quarters, slot, block, is_min), half);
    };
    for (int b = 0; b < (f.block_k == 32 ? 2 * quarters : 1); ++b) {
        put(b, false, row.d[b]);
        if (f.has_min) put(b, true, row.m[b]);
    }
    for_integers<kType>([&](auto block, auto kind) {
        const int value = (kind ? row.min : row.scale)[block];
        for_parts<kType, block, kind>(slot, [&](int at, int bit, int mask, int from) {
            tile[at] |= (value >> from & mask) << bit;
        });
    });
}

template <int kType>
void unpack_scales(const uint8_t* tile, int slot, int quarters, Group& row) {
    constexpr QuantFormat f = quant_format(kType);
    const auto get = [&](int block, bool is_min) {
        return load_u16(tile + quant_half_offset(kType, quarters, slot, block, is_min));
    };
    for (int b = 0; b < (f.block_k == 32 ? 2 * quarters : 1); ++b) {
        row.d[b] = get(b, false);
        if (f.has_min) row.m[b] = get(b, true);
    }
    for_integers<kType>([&](auto block, auto kind) {
        int value = 0;
        for_parts<kType, block, kind>(slot, [&](int at, int bit, int mask, int from) {
            value |= (tile[at] >> bit & mask) << from;
        });
        (kind ? row.min : row.scale)[block] = static_cast<uint8_t>(value);
    });
}

// ---- a row of tiles ----

using Params = mk_quant_pack_params;

// The blocks of packed row p; NULL for a row of padding.
uint8_t* blocks_of(const Params& p, int64_t row) {
    if (row >= p.rows) return nullptr;
    auto* const blocks = static_cast<uint8_t*>(p.blocks);
    if (p.blocks_up) {
        if (row % 2) return static_cast<uint8_t*>(p.blocks_up) + row / 2 * p.row_up_bytes;
        return blocks + row / 2 * p.row_bytes;
    }
    return blocks + (p.row_order ? p.row_order[row] : row) * p.row_bytes;
}

template <int kType>
void pack_row_of_tiles(const Params& p, int64_t row_of_tiles) {
    using B = Blocks<kType>;
    constexpr int kPerTile = kQuantTileK / B::kElements;
    auto* tile = static_cast<uint8_t*>(p.tiles) + row_of_tiles * quant_row_tile_bytes(kType, p.k);
    Group rows[2];
    for (int j = 0; j < quant_row_tiles(p.k); ++j) {
        const int quarters = quant_tile_quarters(p.k, j);
        const int count = std::min(p.k / B::kElements - j * kPerTile, kPerTile);
        const int scales = quant_scales_offset(kType, quarters);
        std::memset(tile + scales, 0, quant_tile_bytes(kType, quarters) - scales);
        for (int g = 0; g < kPairs; ++g) {
            for (int h = 0; h < 2; ++h) {
                const uint8_t* const blocks = blocks_of(p, 16 * row_of_tiles + 2 * g + h);
                if (!blocks || count < kPerTile) rows[h] = {};
                for (int i = 0; blocks && i < count; ++i) {
                    B::read(blocks + (int64_t{j} * kPerTile + i) * B::kBytes, i, rows[h]);
                }
                pack_scales<kType>(rows[h], g + 8 * h, quarters, tile);
            }
            pack_quants<kType>(rows, g, quarters, tile);
        }
        tile += quant_tile_bytes(kType, quarters);
    }
}

template <int kType>
void unpack_row_of_tiles(const Params& p, int64_t row_of_tiles) {
    using B = Blocks<kType>;
    constexpr int kPerTile = kQuantTileK / B::kElements;
    auto* tile = static_cast<uint8_t*>(p.tiles) + row_of_tiles * quant_row_tile_bytes(kType, p.k);
    Group rows[2];
    for (int j = 0; j < quant_row_tiles(p.k); ++j) {
        const int quarters = quant_tile_quarters(p.k, j);
        const int count = std::min(p.k / B::kElements - j * kPerTile, kPerTile);
        for (int g = 0; g < kPairs; ++g) {
            unpack_quants<kType>(tile, g, quarters, rows);
            for (int h = 0; h < 2; ++h) {
                uint8_t* const blocks = blocks_of(p, 16 * row_of_tiles + 2 * g + h);
                if (!blocks) continue;
                unpack_scales<kType>(tile, g + 8 * h, quarters, rows[h]);
                for (int i = 0; i < count; ++i) {
                    B::write(rows[h], i, blocks + (int64_t{j} * kPerTile + i) * B::kBytes);
                }
            }
        }
        tile += quant_tile_bytes(kType, quarters);
    }
}

using RowOfTiles = void (*)(const Params& p, int64_t row_of_tiles);

template <int kType>
constexpr RowOfTiles choose(bool is_pack) {
    return is_pack ? &pack_row_of_tiles<kType> : &unpack_row_of_tiles<kType>;
}

RowOfTiles row_of_tiles_function(int32_t type, bool is_pack) {
    switch (type) {
        case MK_Q4_0:
            return choose<MK_Q4_0>(is_pack);
        case MK_Q4_1:
            return choose<MK_Q4_1>(is_pack);
        case MK_Q5_0:
            return choose<MK_Q5_0>(is_pack);
        case MK_Q5_1:
            return choose<MK_Q5_1>(is_pack);
        case MK_Q8_0:
            return choose<MK_Q8_0>(is_pack);
        case MK_Q2_K:
            return choose<MK_Q2_K>(is_pack);
        case MK_Q3_K:
            return choose<MK_Q3_K>(is_pack);
        case MK_Q4_K:
            return choose<MK_Q4_K>(is_pack);
        case MK_Q5_K:
            return choose<MK_Q5_K>(is_pack);
        default:
            return choose<MK_Q6_K>(is_pack);
    }
}

// Tiles of a chunk, which one thread does at a time.
constexpr int kChunkTiles = 32;

mk_status run(const Params& p, bool is_pack) {
    struct Context {
        const Params& p;
        RowOfTiles function;
        int64_t rows_of_tiles, grain;
    };
    const int64_t grain = std::max(1, kChunkTiles / quant_row_tiles(p.k));
    const Context context{p, row_of_tiles_function(p.type, is_pack), quant_row_of_tiles(p.rows),
                          grain};
    parallel(
        p.num_threads, ceil_div(context.rows_of_tiles, grain),
        [](void* pointer, Chunks& chunks) {
            const Context& c = *static_cast<const Context*>(pointer);
            for (int64_t chunk; (chunk = chunks.next()) >= 0;) {
                const int64_t end = std::min((chunk + 1) * c.grain, c.rows_of_tiles);
                for (int64_t i = chunk * c.grain; i < end; ++i) c.function(c.p, i);
            }
        },
        const_cast<Context*>(&context));
    return MK_OK;
}

// ---- checks ----

mk_status check_matrix(int32_t type, int32_t rows, int32_t k) {
    MK_TRY(check_size("rows", rows, 0, 1 << 24));
    MK_TRY(check_size("k", k, 1, 1 << 20));
    return check_quant_type("type", type, "k", k);
}

// `name`: blocks or blocks_up, whose stride is row_bytes or row_up_bytes.
mk_status check_blocks(const char* name, const void* blocks, int64_t row_bytes, int32_t rows,
                       int32_t least) {
    if (rows == 0) return MK_OK;
    MK_REQUIRE(blocks, MK_ERR_NULL, "%s is NULL", name);
    MK_REQUIRE(rows == 1 || row_bytes >= least, MK_ERR_STRIDE,
               "row%s_bytes must be at least the %d bytes of a row, got %lld", name + 6, least,
               static_cast<long long>(row_bytes));
    return MK_OK;
}

mk_status check(const mk_quant_pack_params* params) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    const mk_quant_pack_params& p = *params;
    MK_TRY(check_matrix(p.type, p.rows, p.k));
    MK_TRY(check_size("num_threads", p.num_threads, 1, 256));
    MK_REQUIRE(!p.blocks_up || p.rows % 2 == 0, MK_ERR_SHAPE,
               "rows must be even with blocks_up, got %d", p.rows);
    MK_REQUIRE(!p.blocks_up || !p.row_order, MK_ERR_VALUE, "row_order must be NULL with blocks_up");
    const QuantFormat format = quant_format(p.type);
    const int32_t row = p.k / format.block_k * format.block_bytes;
    const int32_t rows = p.blocks_up ? p.rows / 2 : p.rows;
    MK_TRY(check_blocks("blocks", p.blocks, p.row_bytes, rows, row));
    if (p.blocks_up) MK_TRY(check_blocks("blocks_up", p.blocks_up, p.row_up_bytes, rows, row));
    if (p.rows == 0) return MK_OK;
    MK_REQUIRE(p.tiles, MK_ERR_NULL, "tiles is NULL");
    MK_REQUIRE(is_16_byte(p.tiles, MK_F16, {}), MK_ERR_ALIGNMENT,
               "tiles = %p is not aligned to 16 bytes", p.tiles);
    if (!p.row_order) return MK_OK;
    MK_TRY(check_pointer("row_order", p.row_order, MK_I32));
    for (int32_t i = 0; i < p.rows; ++i) {
        MK_REQUIRE(0 <= p.row_order[i] && p.row_order[i] < p.rows, MK_ERR_VALUE,
                   "row_order[%d] must be 0 ... %d, got %d", i, p.rows - 1, p.row_order[i]);
    }
    return MK_OK;
}

}  // namespace
}  // namespace mk::cpu

extern "C" {

mk_status mk_quant_packed_bytes(int32_t type, int32_t rows, int32_t k, int64_t* bytes) {
    MK_REQUIRE(bytes, MK_ERR_NULL, "bytes is NULL");
    MK_TRY(mk::cpu::check_matrix(type, rows, k));
    *bytes = mk::quant_packed_bytes(type, rows, k);
    return MK_OK;
}

mk_status mk_quant_pack(const mk_quant_pack_params* params) {
    MK_TRY(mk::cpu::check(params));
    return mk::cpu::run(*params, true);
}

mk_status mk_quant_unpack(const mk_quant_pack_params* params) {
    MK_TRY(mk::cpu::check(params));
    return mk::cpu::run(*params, false);
}

}  // extern "C"
