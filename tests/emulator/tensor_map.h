// Tensor maps: what cuTensorMapEncodeTiled writes and the TMA instructions read.
#pragma once

#include <cstdint>
#include <optional>

namespace emu {

// The values of the driver API's enumerations (CUtensorMapDataType and so on).
// clang-format off
enum class TensorType : uint8_t {
    u8, u16, u32, s32, u64, s64, f16, f32, f64, bf16, f32_ftz, tf32, tf32_ftz,
    u4_align8,   // 16 values of 4 bits take 8 bytes in shared memory
    u4_align16,  // ... 16 bytes, the upper 8 a gap
    u6_align16,  // 16 values of 6 bits take 16 bytes, the upper 4 a gap
};
// clang-format on
enum class Interleave : uint8_t { none, b16, b32 };
enum class Swizzle : uint8_t { none, b32, b64, b128, b128_atom32, b128_atom32_flip8, b128_atom64 };
enum class OobFill : uint8_t { zero, nan };

// The bytes of a CUtensorMap. The hardware's layout is not public, and programs only pass the map
// by its address, so the emulator has this one. Entries from `rank` on are zero.
struct TensorMap {
    uint64_t checksum;    // of all that follows; no map of zeros has it
    uint64_t address;     // of element 0
    uint64_t dims[5];     // elements, innermost first
    uint64_t strides[4];  // bytes; strides[i] is that of dims[i + 1]
    uint16_t box[5];      // elements spanned by one copy, before `steps`
    uint8_t steps[5];     // elementStrides; the hardware takes steps[0] as 1 without interleave
    uint8_t rank;
    TensorType type;
    Interleave interleave;
    Swizzle swizzle;
    uint8_t l2_promotion;  // a hint: 0, 64, 128 or 256 bytes, as 0 to 3
    OobFill fill;
    uint8_t unused[19];  // zero: no padding, whose bytes a copy may change
};
static_assert(sizeof(TensorMap) == 128);

// Of an element in global memory.
int tensor_bits(TensorType type);

// The map at this address; nothing if it is not one, or not as the driver left it.
std::optional<TensorMap> decode_tensor_map(const void* map);

}  // namespace emu
