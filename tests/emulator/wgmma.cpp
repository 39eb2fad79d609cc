#pragma GCC optimize("fp-contract=fast")  // products are exact: fused or not, the sums are the same

#include "wgmma.h"

#include "fp8_sums.h"
#include "mma_lanes.h"

namespace emu {
namespace {

// Eight rows of eight words. Interleaving rows i and i + 4 rotates the bits of a word's index (row,
// column) by one; three times swaps the three bits of the row with those of the column.
inline void transpose(HalfWords* m) {
#pragma GCC unroll 3
    for (int step = 0; step < 3; ++step) {
        HalfWords next[8];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            next[2 * i] = __builtin_shufflevector(m[i], m[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            next[2 * i + 1] = __builtin_shufflevector(m[i], m[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        std::memcpy(m, next, sizeof next);
    }
}

// Eight rows of 32 bytes at a time.
template <MmaType type>
inline void unpack_words(const uint32_t* words, int rows, double* out) {
    constexpr int kBits = element_bits(type), kPerWord = 32 / kBits, kWords = kWgmmaBytes / 4;
    for (int row = 0; row < rows; row += 8) {
        HalfWords m[8];
        for (int i = 0; i < 8; ++i) m[i] = load<HalfWords>(words + (row + i) * kWords);
        transpose(m);
#pragma GCC unroll 8
        for (int j = 0; j < kWords; ++j)
            for (int e = 0; e < kPerWord; ++e) {
                const auto values =
                    element_values<type, HalfWords, HalfFloats, HalfInts>(m[j] >> (e * kBits));
                store(out + static_cast<long>(j * kPerWord + e) * rows + row,
                      __builtin_convertvector(values, Octet));
            }
    }
}

// As many halves as rows of 16 k have: a multiple of 16.
template <MmaType type>
inline void unpack_halves(const uint16_t* halves, int rows, double* out) {
    for (int at = 0; at < rows * (kWgmmaBytes / 2); at += 16) {
        const auto words = __builtin_convertvector(load<Halves>(halves + at), Words);
        store(out + at, __builtin_convertvector(element_values<type>(words), Doubles));
    }
}

// Eight rows and kBlocks times eight columns.
template <int kBlocks>
inline void multiply_block(const WgmmaOp& op, const double* a, const double* b, bool zero,
                           uint32_t* const* d) {
    const int k = op.k();
    const int regs = op.acc == MmaType::f16 ? 1 : 2;  // of eight rows and columns
    const bool narrow = op.a == MmaType::e4m3 || op.a == MmaType::e5m2;
    const MmaOp as_mma{16, k, op.a, op.b, op.acc, op.satfinite};
    for (int half = 0; half < 2; ++half) {
        Octet sums[kBlocks][8];
        uint32_t c[2][32];
        for (int j = 0; j < kBlocks; ++j) {
            if (zero) {
                for (Octet& row : sums[j]) row = Octet{};
                continue;
            }
            for (int r = 0; r < regs; ++r)
                std::memcpy(c[r], d[(2 * j + half) * regs + r], sizeof c[r]);
            unpack_acc(op.acc, c, sums[j]);
        }
        const double* rows = a + 8 * half;
        if (narrow)
            for (int j = 0; j < kBlocks; ++j)
                add_narrow(as_mma, k, rows, kWgmmaRows, b + 8 * j, op.n, sums[j]);
        for (int i = 0; i < k && !narrow; ++i) {
            Octet columns[kBlocks];
#pragma GCC unroll 2
            for (int j = 0; j < kBlocks; ++j)
                columns[j] = load<Octet>(b + static_cast<long>(i) * op.n + 8 * j);
#pragma GCC unroll 8
            for (int row = 0; row < 8; ++row) {
#pragma GCC unroll 2
                for (int j = 0; j < kBlocks; ++j)
                    sums[j][row] += rows[i * kWgmmaRows + row] * columns[j];
            }
        }
        for (int j = 0; j < kBlocks; ++j) {
            if (op.acc != MmaType::s32)
                for (Octet& row : sums[j]) row = truncate_to_f32(row);
            pack_acc(as_mma, sums[j], c);
            for (int r = 0; r < regs; ++r)
                std::memcpy(d[(2 * j + half) * regs + r], c[r], sizeof c[r]);
        }
    }
}

__attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void
multiply(const WgmmaOp& op, const double* a, const double* b, bool zero, uint32_t* const* d) {
    const int regs = op.acc == MmaType::f16 ? 2 : 4;  // of 16 rows and eight columns
    int j = 0;
    for (; j + 2 <= op.n / 8; j += 2) multiply_block<2>(op, a, b + 8 * j, zero, d + regs * j);
    if (j < op.n / 8) multiply_block<1>(op, a, b + 8 * j, zero, d + regs * j);
}

__attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void unpack(
    MmaType type, const uint32_t* words, int rows, double* out) {
    using enum MmaType;
    switch (type) {
        case f16:
            return unpack_words<f16>(words, rows, out);
        case bf16:
            return unpack_words<bf16>(words, rows, out);
        case tf32:
            return unpack_words<tf32>(words, rows, out);
        case e4m3:
            return unpack_words<e4m3>(words, rows, out);
        case e5m2:
            return unpack_words<e5m2>(words, rows, out);
        case s8:
            return unpack_words<s8>(words, rows, out);
        default:
            return unpack_words<u8>(words, rows, out);
    }
}

}  // namespace

int WgmmaOp::k() const { return kWgmmaBytes * 8 / element_bits(a); }

void wgmma_unpack(MmaType type, const uint32_t* words, int rows, double* out) {
    unpack(type, words, rows, out);
}

__attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void
wgmma_unpack_transposed(MmaType type, const uint16_t* halves, int rows, double* out) {
    if (type == MmaType::f16)
        unpack_halves<MmaType::f16>(halves, rows, out);
    else
        unpack_halves<MmaType::bf16>(halves, rows, out);
}

void wgmma_multiply(const WgmmaOp& op, const double* a, const double* b, bool zero,
                    uint32_t* const* d) {
    multiply(op, a, b, zero, d);
}

// ---- descriptors --------------------------------------------------------------------------------

WgmmaDescriptor::WgmmaDescriptor(uint64_t bits)
    : start((bits & 0x3fff) << 4),
      leading((bits >> 16 & 0x3fff) << 4),
      stride((bits >> 32 & 0x3fff) << 4),
      base_offset(bits >> 49 & 7),
      mode(static_cast<uint32_t>(bits >> 62)) {}

}  // namespace emu
