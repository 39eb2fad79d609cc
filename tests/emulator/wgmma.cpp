#pragma GCC optimize("fp-contract=fast")  // products are exact: fused or not, the sums are the same

#include "wgmma.h"

#include "fp8_sums.h"
#include "mma_lanes.h"

namespace emu {
namespace {

constexpr int kVector = 16;

// 16 rows of 32 bytes at a time.
template <MmaType type>
inline void unpack_words(const uint32_t* words, int rows, double* out) {
    constexpr int kBits = element_bits(type), kPerWord = 32 / kBits;
    for (int row = 0; row < rows; row += kVector) {
        const int count = rows - row < kVector ? rows - row : kVector;
        for (int j = 0; j < kWgmmaBytes / 4; ++j) {
            uint32_t column[kVector] = {};
            for (int i = 0; i < count; ++i) column[i] = words[(row + i) * (kWgmmaBytes / 4) + j];
            const auto packed = load<Words>(column);
            for (int e = 0; e < kPerWord; ++e) {
                const Floats values = element_values<type>(packed >> (e * kBits));
                const auto doubles = __builtin_convertvector(values, Doubles);
                double* to = out + static_cast<long>(j * kPerWord + e) * rows + row;
                std::memcpy(to, &doubles, static_cast<size_t>(count) * sizeof(double));
            }
        }
    }
}

template <MmaType type>
inline void unpack_halves(const uint16_t* halves, int rows, double* out) {
    const int total = rows * (kWgmmaBytes / 2);
    for (int at = 0; at < total; at += kVector) {
        const int count = total - at < kVector ? total - at : kVector;
        uint32_t words[kVector] = {};
        for (int i = 0; i < count; ++i) words[i] = halves[at + i];
        const Floats values = element_values<type>(load<Words>(words));
        const auto doubles = __builtin_convertvector(values, Doubles);
        std::memcpy(out + at, &doubles, static_cast<size_t>(count) * sizeof(double));
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

void wgmma_unpack_transposed(MmaType type, const uint16_t* halves, int rows, double* out) {
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

// The XOR takes absolute address bits: the pattern lies in memory, not in the tile.
uint32_t WgmmaDescriptor::swizzle(uint32_t address) const {
    return mode ? address ^ (address >> 7 & ((8u >> (mode - 1)) - 1)) << 4 : address;
}

uint32_t WgmmaDescriptor::k_major(uint32_t row, uint32_t k_chunk) const {
    const uint32_t rows = start + row % 8 * span() + row / 8 * stride;
    return swizzle(rows + k_chunk * (mode ? 16 : leading));
}

uint32_t WgmmaDescriptor::mn_major(uint32_t mn_chunk, uint32_t k) const {
    if (!mode) return start + k % 8 * 16 + mn_chunk * stride + k / 8 * leading;
    const uint32_t atom = span() / 16;  // chunks
    return swizzle(start + mn_chunk % atom * 16 + mn_chunk / atom * leading + k % 8 * span() +
                   k / 8 * stride);
}

}  // namespace emu
