// out[t] = row ids[t] of a packed table, decoded as ggml does: in fp32, rounded once to the dtype.
// An id out of range gives a row of NaN.
//
//   block x = token, 4 lanes = a tile of 256 k of its row (block y: 32 tiles further)
//
//   tile, 16 rows: pieces of 512 bytes     | lanes 0-3 | ... | lanes 4g ... 4g+3 | ...
//   row 2g + h of it is in 64 of them, with its neighbour: lane t of the four takes 16 bytes of
//   each piece, keeps h's half and has k = 16 step + 4t ... + 3 of each of the 16 steps: 8 bytes of
//   out
//
// A weight takes 10 to 15 lane-instructions (of PTX), which memory hides: twice the row's bytes are
// read and two bytes a weight are written. Scales are read where they are needed, by the byte, from
// L1.
#pragma once

#include "common/rows_tiles.h"
#include "common/static_for.cuh"
#include "ptx/sm90.cuh"
#include "quant/quant_unpack.cuh"

namespace mk {

template <int kType>
struct QuantRow {
    static constexpr QuantFormat kFormat = quant_format(kType);
    static constexpr int kWords = quant_words(kType);
    static constexpr int kQuarterBytes = quant_tile_bytes(kType, 4) / 4;  // tiles are linear in it
    static constexpr int kQuantBytes = quant_scales_offset(kType, 1);
    static constexpr int kHalvesAt = quant_halves_offset(kType, 4);
};

// Where a scale or minimum of the rows of slots 0, 1 (the next g) and 8 (the next h) is.
template <int kType, int kBlock, bool kIsMin>
struct QuantScalePlace {
    static constexpr QuantField kFirst = quant_scale_field(kType, 0, kBlock, kIsMin);
    static constexpr QuantField kNextG = quant_scale_field(kType, 1, kBlock, kIsMin);
    static constexpr QuantField kNextH = quant_scale_field(kType, 8, kBlock, kIsMin);
};

// The stored number of a scale or minimum, of row 2g + h.
template <int kType, int kBlock, bool kIsMin>
__device__ __forceinline__ float load_quant_scale(const uint8_t* tile, int g, int h) {
    using Place = QuantScalePlace<kType, kBlock, kIsMin>;
    int number = 0;
    static_for<Place::kFirst.count>([&](auto part) {
        constexpr QuantBits at = Place::kFirst.bits[part];
        constexpr int kByG = Place::kNextG.bits[part].at - at.at;
        constexpr int kByH = Place::kNextH.bits[part].at - at.at;
        constexpr int kBitByH = Place::kNextH.bits[part].bit - at.bit;
        const int byte = tile[at.at + g * kByG + h * kByH];
        number |= (byte >> (at.bit + h * kBitByH) & ((1 << at.width) - 1)) << at.from;
    });
    constexpr int kOffset = kType == MK_Q6_K ? 128 : kType == MK_Q3_K ? 32 : 0;
    return static_cast<float>(number - kOffset);
}

__device__ __forceinline__ float load_half(const uint8_t* address) {
    return ptx::cvt_f32_f16(*reinterpret_cast<const uint16_t*>(address));
}

// Weights k ... k + 3 of a row, which is aligned to 8 bytes or to its elements only.
__device__ __forceinline__ void store_4(uint16_t* to, uint32_t low, uint32_t high, bool in_eights) {
    if (in_eights) {
        *reinterpret_cast<uint2*>(to) = {low, high};
    } else {
        to[0] = static_cast<uint16_t>(low);
        to[1] = static_cast<uint16_t>(low >> 16);
        to[2] = static_cast<uint16_t>(high);
        to[3] = static_cast<uint16_t>(high >> 16);
    }
}

// What the weights of a block are made of: w = scale * (q - offset) + shift.
struct QuantLine {
    float scale, shift;
};

template <int kType, int kBlock>
__device__ __forceinline__ QuantLine load_quant_line(const uint8_t* tile, int quarters, int g,
                                                     int h) {
    constexpr QuantFormat kFormat = QuantRow<kType>::kFormat;
    if constexpr (kFormat.block_k == 32) {
        constexpr int kLaneBytes = kFormat.has_min ? 16 : 8;
        const uint8_t* const at = tile + quarters * QuantRow<kType>::kQuantBytes +
                                  (g * quarters + kBlock / 2) * kLaneBytes + h * 4 + kBlock % 2 * 2;
        return {load_half(at), kFormat.has_min ? load_half(at + 8) : 0.f};
    } else {
        const uint8_t* const at = tile + QuantRow<kType>::kHalvesAt;
        const float scale = load_quant_scale<kType, kBlock, false>(tile, g, h);
        if constexpr (kFormat.has_min) {
            const float min = load_quant_scale<kType, kBlock, true>(tile, g, h);
            const uint8_t* const d = at + g * 8 + h * 4;
            return {load_half(d) * scale, -(load_half(d + 2) * min)};  // both exact
        } else {
            return {load_half(at + g * 4 + h * 2) * scale, 0.f};  // exact
        }
    }
}

// Two weights, of which `pair` holds q * 2^-24 (x1) or q * 2^-20 (x16) as halves.
template <int kType, bool kIsX16>
__device__ __forceinline__ float2 quant_weights(uint32_t pair, const QuantLine& line) {
    constexpr QuantFormat kFormat = QuantRow<kType>::kFormat;
    constexpr float kUnit = kIsX16 ? kTwo24 / 16 : kTwo24;
    const float2 q = F16::unpack(pair);
    if constexpr (kFormat.has_min) {
        const float scale = line.scale * kUnit;
        return {fmaf(q.x, scale, line.shift), fmaf(q.y, scale, line.shift)};
    } else {  // q - offset first, so that 0 has ggml's sign
        return {line.scale * fmaf(q.x, kUnit, -kFormat.offset),
                line.scale * fmaf(q.y, kUnit, -kFormat.offset)};
    }
}

// Row `row`: this lane's part of its tile j to out, the row of the output.
template <class Dtype, int kType>
__device__ __forceinline__ void quant_embedding_tile(const mk_embedding_quant_params& p, int row,
                                                     int j, uint16_t* out, bool in_eights) {
    constexpr int kWords = QuantRow<kType>::kWords;
    using Pieces = QuantPieces<kType>;
    const int hidden = p.embedding.hidden;
    const int row_quarters = (hidden + kQuantQuarterK - 1) / kQuantQuarterK;
    const int quarters = min(row_quarters - 4 * j, 4);
    const int g = row % 16 / 2, h = row % 2, t = threadIdx.x % 4, lane = 4 * g + t;
    const uint8_t* const tile =
        static_cast<const uint8_t*>(p.table.tiles) +
        (row / 16 * int64_t{row_quarters} + 4 * j) * QuantRow<kType>::kQuarterBytes;

    uint32_t words[kQuantTileWords<kType>] = {};
    MK_UNROLL
    for (int piece = 0; piece < (kWords == 5 ? 4 : Pieces::kCount); ++piece) {
        if (Pieces::last_quarter(piece) < quarters) {
            const uint8_t* const at = tile + (piece * 32 + lane) * 16;
            Pieces::store(words, piece, ptx::ld_global_nc_l1_no_allocate_v4(at));
        }
    }
    if constexpr (kWords == 5) {
        const uint8_t* const fifths = tile + quarters * 512 + lane * quarters * 4;
        MK_UNROLL
        for (int c = 0; c < 4; ++c) {
            if (c < quarters) {
                words[5 * c + 4] = ptx::ld_global_nc_l1_no_allocate(fifths + 4 * c);
            }
        }
    }

    static_for<4>([&](auto quarter) {
        constexpr int c = quarter;
        if (c >= quarters) return;
        QuantFragments a;
        unpack_quarter_of<kType>(words, c, a);
        constexpr int kSteps = QuantRow<kType>::kFormat.scale_k / 16;  // that share a scale
        QuantLine lines[4 / kSteps];
        static_for<4 / kSteps>([&](auto block) {
            constexpr int kBlock = 4 * c / kSteps + block;
            lines[block] = load_quant_line<kType, kBlock>(tile, quarters, g, h);
        });
        static_for<4>([&](auto step) {
            constexpr int s = step;
            const QuantLine& line = lines[s / kSteps];
            const int k = kQuantTileK * j + kQuantQuarterK * c + 16 * s + 4 * t;
            if (k >= hidden) return;  // the last quarter may have 32 k only
            const uint32_t low = h ? a[s][1] : a[s][0], high = h ? a[s][3] : a[s][2];
            const float2 w01 = quant_weights<kType, false>(low, line);
            const float2 w23 = quant_weights<kType, kWords != 8>(high, line);
            store_4(out + k, Dtype::pack(w01.x, w01.y), Dtype::pack(w23.x, w23.y), in_eights);
        });
    });
}

template <class Dtype>
__device__ __forceinline__ void quant_embedding(const mk_embedding_quant_params& p) {
    constexpr uint32_t kNans = 0x7FFF7FFFu;  // in bf16 and in f16
    const mk_embedding_params& e = p.embedding;
    const int64_t token = blockIdx.x;
    const int j = (blockIdx.y * blockDim.x + threadIdx.x) / 4;

    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    const int64_t id = load_index(e.ids, e.ids_dtype, token);
    if (j * kQuantTileK >= e.hidden) return;
    auto* const out = static_cast<uint16_t*>(row_of(e.out, token, e.out_stride));
    const bool in_eights = ((reinterpret_cast<uintptr_t>(e.out) | 2 * e.out_stride) & 7) == 0;
    if (id < 0 || id >= e.vocab) {
        const int end = min(e.hidden, (j + 1) * kQuantTileK);
        MK_NO_UNROLL
        for (int k = kQuantTileK * j + threadIdx.x % 4 * 4; k < end; k += 16) {
            store_4(out + k, kNans, kNans, in_eights);
        }
        return;
    }
    const int row = static_cast<int>(id);
    switch (p.table.type) {
#define MK_QUANT_CASE(type) \
    case type:              \
        return quant_embedding_tile<Dtype, type>(p, row, j, out, in_eights);
        MK_FOR_EACH_QUANT_TYPE(MK_QUANT_CASE)
#undef MK_QUANT_CASE
        default:
            __builtin_unreachable();
    }
}

}  // namespace mk
