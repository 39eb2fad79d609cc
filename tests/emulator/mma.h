// Tensor-core instructions of one warp as pure functions over registers: mma.sync, ldmatrix,
// stmatrix. Registers are rows of 32 lanes, `uint32_t r[reg][32]`.
//
// One picture holds for all types. Lane l = 4 * g + t (g = 0..7, t = 0..3). A register of A holds,
// over the 32 lanes, a block of 8 rows by 16 bytes of k: lane l has bytes 4t..4t+3 of row g, so the
// row of lanes *is* the block, row-major. A register of B is the same with columns in place of
// rows.
//
//            k: 16 bytes  next 16
//   rows 0-7   [ a0        a2 ]          B: [ b0  b1 ] (8 columns n, each along k)
//   rows 8-15  [ a1        a3 ]
//
// C and D: lane l holds columns 2t and 2t+1 of row g, then of row g + 8: one register each for f32
// and s32, packed in one for f16. f64 (elements of 8 bytes: blocks of 8 rows by 4 elements) takes
// two registers an element, low half first. PTX ISA: "Matrix Fragments for mma.m16n8k16 with
// floating point type" and its siblings.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace emu {

enum class MmaType : uint8_t { f16, bf16, tf32, f64, e4m3, e5m2, s8, u8, s4, u4, b1, f32, s32 };

std::optional<MmaType> mma_type(std::string_view name);

struct MmaOp {
    int m, k;                // n is 8 in all of them
    MmaType a, b;            // element types of A and B
    MmaType acc;             // type of C and D: f32, f16, s32 or f64
    bool satfinite = false;  // s32: clamp instead of wrapping around
    bool and_popc = false;   // b1: .and.popc instead of .xor.popc
    int capability = 80;     // of the device, whose sums it takes
};

struct MmaTraits {
    int a_regs, b_regs, c_regs;  // rows of 32 x 32 bits; an f64 operand counts twice
    int min_sm;                  // lowest compute capability: 80, 89, 90
};

// What the PTX ISA says of an instruction; nothing if there is no such one.
std::optional<MmaTraits> mma_traits(const MmaOp& op);

// D = A * B + C for an op that has traits; d may be c.
//
// Arithmetic, after measurements (A100: Fasi et al., "Numerical behavior of NVIDIA tensor cores",
// 2021; A100 to B200: Xie et al., "MMA-Sim", arXiv:2511.10909): products are exact; those of 16
// bytes of k (8 f16, 4 tf32), of 32 from sm_90 on, and the accumulator are summed at once, and the
// sum is *truncated* to fp32; the rest follows in ascending k. f16 accumulators are rounded to
// nearest once, at the end. Hardware also drops low bits of small addends while it aligns them to
// the largest one (2^-24 of it on the A100, 2^-25 on the H100); that is not modelled: a sum is
// exact to 2^-53. Integers are exact; f64 is a chain of fused multiply-adds in ascending k.
//
// fp8 on sm_89 adds 16 products at once, in few bits (fp8_sums.h). From sm_90 on the tensor core
// has no fp8 mma.sync: ptxas converts to f16 and emits two HMMAs that start from zero, the first
// for k with k % 4 < 2, and an ordinary addition of C.
//
// m16n8k16 bf16 takes about 0.13 us with AVX-512, ten times as long without.
void mma_sync(const MmaOp& op, const uint32_t (*a)[32], const uint32_t (*b)[32],
              const uint32_t (*c)[32], uint32_t (*d)[32]);

// ldmatrix .m8n8.x{count} .b16: rows[8 * i + r] is row r of matrix i, 16 bytes; register i of lane
// l receives elements 2t and 2t + 1 of row g, or with `trans` of column g. stmatrix is its inverse.
// Rows from 8 * count on are not touched.
void ldmatrix(const uint8_t* const rows[32], int count, bool trans, uint32_t (*d)[32]);
void stmatrix(uint8_t* const rows[32], int count, bool trans, const uint32_t (*r)[32]);

}  // namespace emu
