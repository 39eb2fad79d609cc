// cuTensorMapEncodeTiled and cuTensorMapReplaceAddress, as strict as cuda.h documents them.

#include "tensor_map.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "driver.h"
#include "machine.h"

namespace emu {

namespace {

using namespace driver;

uint64_t checksum(const TensorMap& map) {  // FNV-1a
    uint64_t sum = 0xcbf29ce484222325;
    const auto* bytes = reinterpret_cast<const uint8_t*>(&map);
    for (size_t i = sizeof map.checksum; i < sizeof map; ++i)
        sum = (sum ^ bytes[i]) * 0x100000001b3;
    return sum;
}

void write(void* to, TensorMap map) {
    map.checksum = checksum(map);
    std::memcpy(to, &map, sizeof map);
}

struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

void require(bool ok, const std::string& argument, const std::string& got,
             const std::string& accepted) {
    if (!ok) throw Refused(argument + ": got " + got + ", must be " + accepted);
}
void require(bool ok, const std::string& argument, uint64_t got, const std::string& accepted) {
    require(ok, argument, std::to_string(got), accepted);
}
void require_range(const std::string& argument, uint64_t got, uint64_t low, uint64_t high) {
    require(got >= low && got <= high, argument, got,
            std::to_string(low) + " to " + std::to_string(high));
}
void require_multiple(const std::string& argument, uint64_t got, uint64_t unit,
                      const std::string& of = "") {
    require(got % unit == 0, argument, got, "a multiple of " + std::to_string(unit) + of);
}
void require_pointer(const std::string& argument, const void* pointer, uint64_t alignment) {
    const auto address = reinterpret_cast<uint64_t>(pointer);
    require(address != 0, argument, "NULL", "a pointer");
    require(address % alignment == 0, argument, hex(address),
            "aligned to " + std::to_string(alignment) + " bytes");
}
std::string indexed(const char* argument, size_t i) {
    return std::string(argument) + "[" + std::to_string(i) + "]";
}

bool is_float(TensorType t) { return t >= TensorType::f16 && t <= TensorType::tf32_ftz; }
bool has_gaps(TensorType t) { return t >= TensorType::u4_align16; }

// Of globalAddress and globalStrides.
uint64_t global_alignment(TensorType type, Interleave interleave) {
    return interleave == Interleave::b32 || has_gaps(type) ? 32 : 16;
}

// cuda.h has each dimension enclose those before it. Programs also order them otherwise (tokens
// before heads, say), so the rule here is what that one is for: no two elements share a byte.
void require_no_overlap(const TensorMap& map) {
    std::vector<size_t> order;
    for (size_t i = 0; i + 1 < map.rank; ++i)
        if (map.dims[i + 1] > 1) order.push_back(i);
    std::ranges::sort(order, {}, [&](size_t i) { return map.strides[i]; });
    // At most 2^32 * 2^40 each: a double holds them well enough to compare.
    double below = static_cast<double>(map.dims[0]) * tensor_bits(map.type) / 8;
    for (size_t i : order) {
        const auto stride = static_cast<double>(map.strides[i]);
        require(stride >= below, indexed("globalStrides", i), map.strides[i],
                "at least the " + std::to_string(static_cast<uint64_t>(std::min(below, 0x1p63))) +
                    " bytes that lie below it");
        below += stride * static_cast<double>(map.dims[i + 1] - 1);
    }
}

void require_swizzle(const TensorMap& map) {
    const auto code = static_cast<uint64_t>(map.swizzle);
    if (map.interleave == Interleave::b32)
        require(map.swizzle == Swizzle::b32, "swizzle", code, "SWIZZLE_32B with INTERLEAVE_32B");
    if (has_gaps(map.type)) {
        require(map.swizzle == Swizzle::none || map.swizzle == Swizzle::b128 ||
                    map.swizzle == Swizzle::b128_atom32 ||
                    (map.swizzle == Swizzle::b128_atom64 && map.type == TensorType::u6_align16),
                "swizzle", code, "one that this tensorDataType supports");
    } else if (map.interleave == Interleave::none && map.swizzle != Swizzle::none) {
        const int span = map.swizzle == Swizzle::b32 ? 32 : map.swizzle == Swizzle::b64 ? 64 : 128;
        const int bytes = map.box[0] * tensor_bits(map.type) / 8;
        require(bytes <= span, "boxDim[0]", std::to_string(bytes) + " bytes",
                "at most the " + std::to_string(span) + " bytes of the swizzle");
    }
}

// Runs f on a thread whose device has TMA; a refusal becomes the report.
template <class F>
int checked(const std::string& function, F f) {
    const Device* device = current_device();
    if (!device) return kInvalidContext;
    try {
        if (device->capability < 90) {
            report(function + ": tensor maps need sm_90, the device is sm_" +
                   std::to_string(device->capability));
            return kNotSupported;
        }
        f();
        return kSuccess;
    } catch (const Refused& e) {
        report(function + ": " + e.what());
        return kInvalidValue;
    }
}

}  // namespace

int tensor_bits(TensorType type) {
    static constexpr int kBits[] = {8, 16, 32, 32, 64, 64, 16, 32, 64, 16, 32, 32, 32, 4, 4, 6};
    return kBits[static_cast<size_t>(type)];
}

std::optional<TensorMap> decode_tensor_map(const void* map) {
    TensorMap decoded;
    std::memcpy(&decoded, map, sizeof decoded);
    if (decoded.checksum != checksum(decoded)) return {};
    return decoded;
}

}  // namespace emu

#pragma GCC visibility push(default)
extern "C" {

int cuTensorMapEncodeTiled(void* tensor_map, unsigned type, uint32_t rank, void* address,
                           const uint64_t* dims, const uint64_t* strides, const uint32_t* box,
                           const uint32_t* steps, unsigned interleave, unsigned swizzle,
                           unsigned l2_promotion, unsigned fill) {
    using namespace emu;
    return checked("cuTensorMapEncodeTiled", [&] {
        require_pointer("tensorMap", tensor_map, 64);
        require_range("tensorDataType", type, 0, 15);
        require_range("interleave", interleave, 0, 2);
        require_range("swizzle", swizzle, 0, 6);
        require_range("l2Promotion", l2_promotion, 0, 3);
        require_range("oobFill", fill, 0, 1);
        require_range("tensorRank", rank, interleave ? 3 : 1, 5);

        TensorMap map = {};
        map.rank = static_cast<uint8_t>(rank);
        map.type = static_cast<TensorType>(type);
        map.interleave = static_cast<Interleave>(interleave);
        map.swizzle = static_cast<Swizzle>(swizzle);
        map.l2_promotion = static_cast<uint8_t>(l2_promotion);
        map.fill = static_cast<OobFill>(fill);
        require(map.fill == OobFill::zero || is_float(map.type), "oobFill", fill,
                "0 where tensorDataType is not a floating-point type");
        require(map.type != TensorType::u6_align16 || map.interleave == Interleave::none,
                "interleave", interleave, "0 for 16U6_ALIGN16B");

        const uint64_t alignment = global_alignment(map.type, map.interleave);
        require_pointer("globalAddress", address, alignment);
        map.address = reinterpret_cast<uint64_t>(address);

        require_pointer("globalDim", dims, 1);
        if (rank > 1) require_pointer("globalStrides", strides, 1);
        require_pointer("boxDim", box, 1);
        require_pointer("elementStrides", steps, 1);
        for (size_t i = 0; i < rank; ++i) {
            require_range(indexed("globalDim", i), dims[i], 1, uint64_t{1} << 32);
            require_range(indexed("boxDim", i), box[i], 1, 256);
            require_range(indexed("elementStrides", i), steps[i], 1, 8);
            map.dims[i] = dims[i];
            map.box[i] = static_cast<uint16_t>(box[i]);
            map.steps[i] = static_cast<uint8_t>(steps[i]);
        }
        for (size_t i = 0; i + 1 < rank; ++i) {
            require_multiple(indexed("globalStrides", i), strides[i], alignment);
            require(strides[i] < uint64_t{1} << 40, indexed("globalStrides", i), strides[i],
                    "less than 2^40");
            map.strides[i] = strides[i];
        }
        require_no_overlap(map);

        if (has_gaps(map.type)) {
            require_multiple("globalDim[0]", dims[0], 128, " for this tensorDataType");
            require(box[0] == 128, "boxDim[0]", box[0], "128 for this tensorDataType");
        } else {
            if (map.type == TensorType::u4_align8)
                require_multiple("globalDim[0]", dims[0], 2, " for 16U4_ALIGN8B");
            const uint64_t bits = box[0] * static_cast<uint64_t>(tensor_bits(map.type));
            if (map.interleave == Interleave::none)
                require(bits % 128 == 0, "boxDim[0]", std::to_string(bits) + " bits",
                        "a multiple of 16 bytes without interleave");
        }
        require_swizzle(map);
        write(tensor_map, map);
    });
}

int cuTensorMapReplaceAddress(void* tensor_map, void* address) {
    using namespace emu;
    return checked("cuTensorMapReplaceAddress", [&] {
        require_pointer("tensorMap", tensor_map, 64);
        std::optional<TensorMap> map = decode_tensor_map(tensor_map);
        require(map.has_value(), "tensorMap", "other bytes", "one that was encoded");
        require_pointer("globalAddress", address, global_alignment(map->type, map->interleave));
        map->address = reinterpret_cast<uint64_t>(address);
        write(tensor_map, *map);
    });
}

// For tests: 0 and the 128 bytes of an emu::TensorMap, or 1.
int emu_tensor_map_decode(const void* tensor_map, void* decoded) {
    const auto map = emu::decode_tensor_map(tensor_map);
    if (map) std::memcpy(decoded, &*map, sizeof *map);
    return map ? 0 : 1;
}

}  // extern "C"
#pragma GCC visibility pop
