#include "mma.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "fp8_sums.h"
#include "mma_lanes.h"

namespace emu {
namespace {

// One register of A or B: out[...][g] = an element of row or column g. The elements come in an
// order of their own, the same for A and B: a block's sum does not depend on it.
template <MmaType type>
inline void unpack(const uint32_t* reg, Octet* out) {
    constexpr int kBits = element_bits(type);
    const auto low = load<Words>(reg), high = load<Words>(reg + 16);
    // The words of all eight rows for t = 0 and then t = 1; for t = 2 and then t = 3.
    const Words pairs[2] = {__builtin_shufflevector(low, high, 0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9,
                                                    13, 17, 21, 25, 29),
                            __builtin_shufflevector(low, high, 2, 6, 10, 14, 18, 22, 26, 30, 3, 7,
                                                    11, 15, 19, 23, 27, 31)};
    for (const Words& words : pairs) {
        for (int shift = 0; shift < 32; shift += kBits, out += 2) {
            const Floats values = element_values<type>(words >> shift);
            store(out, __builtin_convertvector(values, Doubles));
        }
    }
}

inline void unpack(MmaType type, const uint32_t* reg, Octet* out) {
    using enum MmaType;
    switch (type) {
        case f16:
            return unpack<f16>(reg, out);
        case bf16:
            return unpack<bf16>(reg, out);
        case tf32:
            return unpack<tf32>(reg, out);
        case e4m3:
            return unpack<e4m3>(reg, out);
        case e5m2:
            return unpack<e5m2>(reg, out);
        case s8:
            return unpack<s8>(reg, out);
        case u8:
            return unpack<u8>(reg, out);
        case s4:
            return unpack<s4>(reg, out);
        default:
            return unpack<u4>(reg, out);
    }
}

// The elements of one register of A or B.
using Block = Octet[kMaxBlockElements];

// a[kRowBlocks * i + j]: rows 8j .. 8j + 7 of block i of k; b[i]: its columns.
template <int kRowBlocks>
inline void multiply_add(const MmaOp& op, const Block* a, const Block* b, const uint32_t (*c)[32],
                         uint32_t (*d)[32]) {
    constexpr int kRows = kGroups * kRowBlocks;
    const int elements = block_elements(op.a);
    const int acc_regs = op.acc == MmaType::f16 ? 1 : 2;  // of eight rows
    Octet rows[kRows];
    for (int j = 0; j < kRowBlocks; ++j) unpack_acc(op.acc, c + acc_regs * j, rows + kGroups * j);
    const int blocks = op.k / elements, blocks_at_once = op.capability < 90 ? 1 : 2;
    for (int i = 0; i < blocks; ++i, a += kRowBlocks, ++b) {
        // Sixteen sums at once hide the latency of the additions; unrolled, they stay in registers.
        Octet sums[kRows];
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) sums[row] = rows[row];
        for (int e = 0; e < elements; ++e) {
#pragma GCC unroll 16
            for (int row = 0; row < kRows; ++row)
                sums[row] += a[row / kGroups][e][row % kGroups] * (*b)[e];
        }
        const bool is_end = (i + 1) % blocks_at_once == 0 || i + 1 == blocks;
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row)
            rows[row] = is_end && op.acc != MmaType::s32 ? truncate_to_f32(sums[row]) : sums[row];
    }
    for (int j = 0; j < kRowBlocks; ++j) pack_acc(op, rows + kGroups * j, d + acc_regs * j);
}

// fp8 on sm_89: 16 products at once, in few bits.
inline void multiply_add_narrow(const MmaOp& op, const Block* a, const Block* b,
                                const uint32_t (*c)[32], uint32_t (*d)[32]) {
    const int acc_regs = op.acc == MmaType::f16 ? 1 : 2;
    for (int half = 0; half < 2; ++half) {
        Octet rows[kGroups];
        unpack_acc(op.acc, c + acc_regs * half, rows);
        for (int i = 0; i < op.k / kBlockBytes; ++i)
            add_narrow(op, kBlockBytes, reinterpret_cast<const double*>(a[2 * i + half]), kGroups,
                       reinterpret_cast<const double*>(b[i]), kGroups, rows);
        pack_acc(op, rows, d + acc_regs * half);
    }
}

// fp8 from sm_90 on: two f16 MMAs that start from zero, then C is added.
inline void multiply_add_as_f16(const MmaOp& op, const Block* a, const Block* b,
                                const uint32_t (*c)[32], uint32_t (*d)[32]) {
    const int acc_regs = op.acc == MmaType::f16 ? 1 : 2, blocks = op.k / kBlockBytes;
    for (int half = 0; half < 2; ++half) {
        Octet rows[kGroups], sums[kGroups] = {};
        for (int part = 0; part < 2; ++part) {
            // `unpack` leaves bytes 0 and 1 of each word in the first four of eight elements.
            for (int i = 0; i < blocks; ++i)
                for (int e = 4 * part; e < kBlockBytes; e += e % 4 == 3 ? 5 : 1)
                    for (int row = 0; row < kGroups; ++row)
                        sums[row] += a[2 * i + half][e][row] * b[i][e];
            for (Octet& sum : sums) sum = truncate_to_f32(sum);
            if (op.acc == MmaType::f16) round_to_f16(sums);
        }
        unpack_acc(op.acc, c + acc_regs * half, rows);
        for (int row = 0; row < kGroups; ++row) rows[row] += sums[row];
        pack_acc(op, rows, d + acc_regs * half);
    }
}

// All types but f64 and b1, through exact products in double.
//
// Compiled three times, so that a portable build still uses what the machine has. Results do not
// depend on it: as products are exact, a fused multiply-add rounds like a multiplication and an
// addition.
__attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void
mma_blocks(const MmaOp& op, const uint32_t (*a)[32], const uint32_t (*b)[32],
           const uint32_t (*c)[32], uint32_t (*d)[32]) {
    const int b_regs = op.k / block_elements(op.a);
    const int a_regs = op.m / kGroups * b_regs;
    Block blocks[6];
    for (int i = 0; i < a_regs + b_regs; ++i) {
        const bool is_a = i < a_regs;
        unpack(is_a ? op.a : op.b, is_a ? a[i] : b[i - a_regs], blocks[i]);
    }
    const Block* b_blocks = blocks + a_regs;
    if (op.a == MmaType::e4m3 || op.a == MmaType::e5m2)
        return op.capability < 90 ? multiply_add_narrow(op, blocks, b_blocks, c, d)
                                  : multiply_add_as_f16(op, blocks, b_blocks, c, d);
    op.m == 16 ? multiply_add<2>(op, blocks, b_blocks, c, d)
               : multiply_add<1>(op, blocks, b_blocks, c, d);
}

// Element (row, col) of C or D sits in lane 4 * (row % 8) + col / 2, in register `slot`.
constexpr int lane_of(int row, int col) { return 4 * (row % 8) + col / 2; }
constexpr int slot_of(int row, int col) { return 2 * (row / 8) + col % 2; }

double read_f64(const uint32_t (*regs)[32], int index, int lane) {
    return std::bit_cast<double>(regs[2 * index][lane] | uint64_t{regs[2 * index + 1][lane]} << 32);
}

void mma_f64(const MmaOp& op, const uint32_t (*a)[32], const uint32_t (*b)[32],
             const uint32_t (*c)[32], uint32_t (*d)[32]) {
    constexpr int kBlock = 4;  // elements of k in one operand of A or B
    const int row_blocks = op.m / 8;
    double sums[kMaxRows][kCols];
    for (int row = 0; row < op.m; ++row) {
        for (int col = 0; col < kCols; ++col) {
            double sum = read_f64(c, slot_of(row, col), lane_of(row, col));
            for (int k = 0; k < op.k; ++k) {
                const int block = k / kBlock, t = k % kBlock;
                sum = std::fma(read_f64(a, block * row_blocks + row / 8, 4 * (row % 8) + t),
                               read_f64(b, block, 4 * col + t), sum);
            }
            sums[row][col] = sum;
        }
    }
    for (int row = 0; row < op.m; ++row) {
        for (int col = 0; col < kCols; ++col) {
            const auto bits = std::bit_cast<uint64_t>(sums[row][col]);
            const int lane = lane_of(row, col), slot = slot_of(row, col);
            d[2 * slot][lane] = static_cast<uint32_t>(bits);
            d[2 * slot + 1][lane] = static_cast<uint32_t>(bits >> 32);
        }
    }
}

void mma_b1(const MmaOp& op, const uint32_t (*a)[32], const uint32_t (*b)[32],
            const uint32_t (*c)[32], uint32_t (*d)[32]) {
    const int row_blocks = op.m / 8;
    uint32_t sums[kMaxRows][kCols];
    for (int row = 0; row < op.m; ++row) {
        for (int col = 0; col < kCols; ++col) {
            sums[row][col] = c[slot_of(row, col)][lane_of(row, col)];
            for (int word = 0; word < op.k / 32; ++word) {
                const int block = word / 4, t = word % 4;
                const uint32_t x = a[block * row_blocks + row / 8][4 * (row % 8) + t];
                const uint32_t y = b[block][4 * col + t];
                sums[row][col] += static_cast<uint32_t>(std::popcount(op.and_popc ? x & y : x ^ y));
            }
        }
    }
    for (int row = 0; row < op.m; ++row)
        for (int col = 0; col < kCols; ++col)
            d[slot_of(row, col)][lane_of(row, col)] = sums[row][col];
}

using HalfRow = uint16_t __attribute__((vector_size(16)));

// 8 x 8 halves. Interleaving rows i and i + 4 rotates the bits of an element's index (row, column)
// by one; three times swaps the three bits of the row with those of the column.
void transpose(HalfRow* m) {
    for (int step = 0; step < 3; ++step) {
        HalfRow next[8];
        for (int i = 0; i < 4; ++i) {
            next[2 * i] = __builtin_shufflevector(m[i], m[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            next[2 * i + 1] = __builtin_shufflevector(m[i], m[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        std::copy(next, next + 8, m);
    }
}

bool is_one_of(MmaType type, std::initializer_list<MmaType> types) {
    return std::find(types.begin(), types.end(), type) != types.end();
}

}  // namespace

std::optional<MmaType> mma_type(std::string_view name) {
    static const std::pair<std::string_view, MmaType> names[] = {
        {"f16", MmaType::f16}, {"bf16", MmaType::bf16}, {"tf32", MmaType::tf32},
        {"f64", MmaType::f64}, {"e4m3", MmaType::e4m3}, {"e5m2", MmaType::e5m2},
        {"s8", MmaType::s8},   {"u8", MmaType::u8},     {"s4", MmaType::s4},
        {"u4", MmaType::u4},   {"b1", MmaType::b1},     {"f32", MmaType::f32},
        {"s32", MmaType::s32}};
    for (auto& [known, type] : names)
        if (known == name) return type;
    return std::nullopt;
}

std::optional<MmaTraits> mma_traits(const MmaOp& op) {
    using enum MmaType;
    const bool f64_op = op.a == f64 && op.b == f64 && op.acc == f64;
    const bool same = op.a == op.b;
    const bool fp8 = is_one_of(op.a, {e4m3, e5m2}) && is_one_of(op.b, {e4m3, e5m2});
    const bool int8 = is_one_of(op.a, {s8, u8}) && is_one_of(op.b, {s8, u8});
    const bool int4 = is_one_of(op.a, {s4, u4}) && is_one_of(op.b, {s4, u4});
    const bool integer = (int8 || int4 || (op.a == b1 && same)) && op.acc == s32;
    const bool float_to_f32 =
        ((is_one_of(op.a, {f16, bf16, tf32}) && same) || fp8) && op.acc == f32;
    const bool float_to_f16 = ((op.a == f16 && same) || fp8) && op.acc == f16;
    if (!f64_op && !integer && !float_to_f32 && !float_to_f16) return std::nullopt;

    const int per_block = f64_op ? 4 : block_elements(op.a);
    const int blocks = op.k / per_block;
    const bool k_fits =
        op.k % per_block == 0 && (blocks == 1 || blocks == 2 || (f64_op && blocks == 4));
    const bool m_fits = op.m == 16 || (op.m == 8 && blocks == 1 && (f64_op || integer));
    if (!k_fits || !m_fits) return std::nullopt;

    const int row_blocks = op.m / 8;
    const int words = f64_op ? 2 : 1;
    const int c_regs = op.acc == f16 ? row_blocks : 2 * row_blocks * words;
    const int min_sm = fp8 ? 89 : f64_op && op.m == 16 ? 90 : 80;
    return MmaTraits{blocks * row_blocks * words, blocks * words, c_regs, min_sm};
}

void mma_sync(const MmaOp& op, const uint32_t (*a)[32], const uint32_t (*b)[32],
              const uint32_t (*c)[32], uint32_t (*d)[32]) {
    if (op.a == MmaType::f64) return mma_f64(op, a, b, c, d);
    if (op.a == MmaType::b1) return mma_b1(op, a, b, c, d);

    mma_blocks(op, a, b, c, d);
}

void ldmatrix(const uint8_t* const rows[32], int count, bool trans, uint32_t (*d)[32]) {
    for (int matrix = 0; matrix < count; ++matrix) {
        HalfRow m[8];
        for (int row = 0; row < 8; ++row) m[row] = load<HalfRow>(rows[8 * matrix + row]);
        if (trans) transpose(m);
        std::memcpy(d[matrix], m, sizeof m);
    }
}

void stmatrix(uint8_t* const rows[32], int count, bool trans, const uint32_t (*r)[32]) {
    for (int matrix = 0; matrix < count; ++matrix) {
        HalfRow m[8];
        std::memcpy(m, r[matrix], sizeof m);
        if (trans) transpose(m);
        for (int row = 0; row < 8; ++row) store(rows[8 * matrix + row], m[row]);
    }
}

}  // namespace emu
