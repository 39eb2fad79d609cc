#include "mma.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "convert.h"

namespace emu {
namespace {

constexpr int kBlockBytes = 16;        // of k, in one register of A or B
constexpr int kMaxBlockElements = 32;  // s4
constexpr int kMaxRows = 16;
constexpr int kCols = 8;

// One row of D: a vector of eight columns.
using Row = double __attribute__((vector_size(kCols * sizeof(double))));
using RowBits = int64_t __attribute__((vector_size(kCols * sizeof(double))));

template <class T>
T load(const uint8_t* bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof(T));
    return value;
}

// Element `e` of a row of 16 bytes.
template <MmaType type>
inline double element(const uint8_t* row, int e) {
    if constexpr (type == MmaType::f16) return f16_to_f32(load<uint16_t>(row + 2 * e));
    if constexpr (type == MmaType::bf16) return bf16_to_f32(load<uint16_t>(row + 2 * e));
    // The tensor core does not read the lower 13 bits of a tf32 operand.
    if constexpr (type == MmaType::tf32)
        return std::bit_cast<float>(load<uint32_t>(row + 4 * e) & ~0x1FFFu);
    if constexpr (type == MmaType::e4m3) return e4m3_to_f32(row[e]);
    if constexpr (type == MmaType::e5m2) return e5m2_to_f32(row[e]);
    if constexpr (type == MmaType::s8) return static_cast<int8_t>(row[e]);
    if constexpr (type == MmaType::u8) return row[e];
    const int nibble = (row[e / 2] >> (4 * (e % 2))) & 0xF;
    if constexpr (type == MmaType::u4) return nibble;
    return (nibble ^ 8) - 8;
}

constexpr int element_bits(MmaType type) {
    switch (type) {
        case MmaType::f64:
            return 64;
        case MmaType::tf32:
        case MmaType::f32:
        case MmaType::s32:
            return 32;
        case MmaType::f16:
        case MmaType::bf16:
            return 16;
        case MmaType::e4m3:
        case MmaType::e5m2:
        case MmaType::s8:
        case MmaType::u8:
            return 8;
        case MmaType::s4:
        case MmaType::u4:
            return 4;
        case MmaType::b1:
            return 1;
    }
    return 0;
}

constexpr int block_elements(MmaType type) { return 8 * kBlockBytes / element_bits(type); }

// Calls `body` with the element type as a compile-time constant.
template <class Body>
inline void with_type(MmaType type, Body body) {
    using enum MmaType;
    switch (type) {
        case f16:
            return body.template operator()<f16>();
        case bf16:
            return body.template operator()<bf16>();
        case tf32:
            return body.template operator()<tf32>();
        case e4m3:
            return body.template operator()<e4m3>();
        case e5m2:
            return body.template operator()<e5m2>();
        case s8:
            return body.template operator()<s8>();
        case u8:
            return body.template operator()<u8>();
        case s4:
            return body.template operator()<s4>();
        default:
            return body.template operator()<u4>();
    }
}

// acc[row] += (rows of A) * B for one 16-byte block of k; a holds the block's one or two registers.
//
// Compiled three times, so that a portable build still uses what the machine has. Results do not
// depend on it: every product is exact in double, so a fused multiply-add rounds like a
// multiplication and an addition.
__attribute__((flatten, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void
add_block(const MmaOp& op, const uint32_t (*a)[32], const uint32_t* b, Row* acc) {
    alignas(64) double a_values[kMaxRows][kMaxBlockElements];
    Row b_values[kMaxBlockElements];
    with_type(op.a, [&]<MmaType type>() {
        const auto* bytes = reinterpret_cast<const uint8_t*>(a);
        for (int row = 0; row < op.m; ++row)
            for (int e = 0; e < block_elements(type); ++e)
                a_values[row][e] = element<type>(bytes + kBlockBytes * row, e);
    });
    with_type(op.b, [&]<MmaType type>() {
        const auto* bytes = reinterpret_cast<const uint8_t*>(b);
        for (int e = 0; e < block_elements(type); ++e)
            for (int col = 0; col < kCols; ++col)
                b_values[e][col] = element<type>(bytes + kBlockBytes * col, e);
    });
    const int elements = block_elements(op.a);
    // Four rows at a time keep the sums in registers.
    for (int row = 0; row < op.m; row += 4) {
        Row sum[4] = {acc[row], acc[row + 1], acc[row + 2], acc[row + 3]};
        for (int e = 0; e < elements; ++e)
            for (int i = 0; i < 4; ++i) sum[i] += a_values[row + i][e] * b_values[e];
        for (int i = 0; i < 4; ++i) acc[row + i] = sum[i];
    }
}

// Drops the mantissa bits that fp32 does not have: rounding towards zero.
void truncate_to_f32(Row* acc, int rows) {
    constexpr int64_t kDropped = (int64_t{1} << (52 - 23)) - 1;
    for (int row = 0; row < rows; ++row)
        acc[row] = std::bit_cast<Row>(std::bit_cast<RowBits>(acc[row]) & ~kDropped);
}

uint32_t to_f32_bits(double value) {
    return std::isnan(value) ? 0x7FFFFFFFu : std::bit_cast<uint32_t>(static_cast<float>(value));
}

uint32_t to_s32_bits(double value, bool satfinite) {
    auto integer = static_cast<int64_t>(value);
    if (satfinite)
        integer = std::clamp<int64_t>(integer, std::numeric_limits<int32_t>::min(),
                                      std::numeric_limits<int32_t>::max());
    return static_cast<uint32_t>(integer);
}

// Element (row, col) of C or D sits in lane 4 * (row % 8) + col / 2, in register or half `slot`.
constexpr int lane_of(int row, int col) { return 4 * (row % 8) + col / 2; }
constexpr int slot_of(int row, int col) { return 2 * (row / 8) + col % 2; }

double read_acc(MmaType type, const uint32_t (*c)[32], int row, int col) {
    const int lane = lane_of(row, col), slot = slot_of(row, col);
    if (type == MmaType::f32) return std::bit_cast<float>(c[slot][lane]);
    if (type == MmaType::s32) return static_cast<int32_t>(c[slot][lane]);
    return f16_to_f32(static_cast<uint16_t>(c[slot / 2][lane] >> (16 * (slot % 2))));
}

void write_acc(const MmaOp& op, double value, uint32_t (*d)[32], int row, int col) {
    const int lane = lane_of(row, col), slot = slot_of(row, col);
    if (op.acc == MmaType::f32) {
        d[slot][lane] = to_f32_bits(value);
    } else if (op.acc == MmaType::s32) {
        d[slot][lane] = to_s32_bits(value, op.satfinite);
    } else {
        // The value is an fp32 number, so this rounds once.
        const uint32_t half = f32_to_f16(static_cast<float>(value));
        const int shift = 16 * (slot % 2);
        d[slot / 2][lane] = (d[slot / 2][lane] & ~(0xFFFFu << shift)) | half << shift;
    }
}

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

bool is_one_of(MmaType type, std::initializer_list<MmaType> types) {
    return std::find(types.begin(), types.end(), type) != types.end();
}

}  // namespace

std::optional<MmaTraits> mma_traits(const MmaOp& op) {
    using enum MmaType;
    const bool f64_op = op.a == f64 && op.b == f64 && op.acc == f64;
    const bool same = op.a == op.b;
    const bool fp8 = is_one_of(op.a, {e4m3, e5m2}) && is_one_of(op.b, {e4m3, e5m2});
    const bool int8 = is_one_of(op.a, {s8, u8}) && is_one_of(op.b, {s8, u8});
    const bool int4 = is_one_of(op.a, {s4, u4}) && is_one_of(op.b, {s4, u4});
    const bool integer = (int8 || int4 || (op.a == b1 && same)) && op.acc == s32;
    const bool float_to_f32 = (is_one_of(op.a, {f16, bf16, tf32}) && same || fp8) && op.acc == f32;
    const bool float_to_f16 = (op.a == f16 && same || fp8) && op.acc == f16;
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

    Row acc[kMaxRows];
    for (int row = 0; row < op.m; ++row)
        for (int col = 0; col < kCols; ++col) acc[row][col] = read_acc(op.acc, c, row, col);
    const int row_blocks = op.m / 8;
    const int blocks = op.k / block_elements(op.a);
    for (int block = 0; block < blocks; ++block) {
        add_block(op, a + block * row_blocks, b[block], acc);
        if (op.acc != MmaType::s32) truncate_to_f32(acc, op.m);
    }
    for (int row = 0; row < op.m; ++row)
        for (int col = 0; col < kCols; ++col) write_acc(op, acc[row][col], d, row, col);
}

void ldmatrix(const uint8_t* const rows[32], int count, bool trans, uint32_t (*d)[32]) {
    for (int matrix = 0; matrix < count; ++matrix) {
        uint16_t values[8][8];
        for (int row = 0; row < 8; ++row)
            std::memcpy(values[row], rows[8 * matrix + row], sizeof values[row]);
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const uint32_t low = trans ? values[2 * t][g] : values[g][2 * t];
            const uint32_t high = trans ? values[2 * t + 1][g] : values[g][2 * t + 1];
            d[matrix][lane] = low | high << 16;
        }
    }
}

void stmatrix(uint8_t* const rows[32], int count, bool trans, const uint32_t (*r)[32]) {
    for (int matrix = 0; matrix < count; ++matrix) {
        uint16_t values[8][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const auto low = static_cast<uint16_t>(r[matrix][lane]);
            const auto high = static_cast<uint16_t>(r[matrix][lane] >> 16);
            (trans ? values[2 * t][g] : values[g][2 * t]) = low;
            (trans ? values[2 * t + 1][g] : values[g][2 * t + 1]) = high;
        }
        for (int row = 0; row < 8; ++row)
            std::memcpy(rows[8 * matrix + row], values[row], sizeof values[row]);
    }
}

}  // namespace emu
