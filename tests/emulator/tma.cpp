#include "tma.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emu {

Tile make_tile(const TensorMap& map, const int32_t* at) {
    if (map.interleave != Interleave::none || tensor_bits(map.type) < 8 ||
        map.swizzle > Swizzle::b128 || map.type == TensorType::tf32 ||
        map.type == TensorType::tf32_ftz)
        fault("not modelled",
              "a tensor map with interleave, elements below 8 bits or of tf32, or atoms above 16 "
              "bytes");
    Tile t{};
    t.map = map;
    t.rows = 1;
    for (int i = 0; i < map.rank; ++i) {
        t.at[i] = at[i];
        const uint32_t step = i == 0 ? 1 : map.steps[i];  // steps[0] is not used
        t.counts[i] = (map.box[i] + step - 1) / step;
        if (i > 0) t.rows *= t.counts[i];
    }
    static constexpr uint32_t kSpans[] = {0, 32, 64, 128};
    t.element = static_cast<uint32_t>(tensor_bits(map.type)) / 8;
    t.row_bytes = t.counts[0] * t.element;
    t.pitch = std::max(t.row_bytes, kSpans[static_cast<int>(map.swizzle)]);
    return t;
}

RowPart row_part(const Tile& t, uint32_t row) {
    uint64_t address = t.map.address;
    for (int i = 1; i < t.map.rank; ++i) {
        const int64_t index =
            int64_t{t.at[i]} + static_cast<int64_t>(row % t.counts[i]) * t.map.steps[i];
        row /= t.counts[i];
        if (index < 0 || index >= static_cast<int64_t>(t.map.dims[i])) return {0, 0, 0};
        address += static_cast<uint64_t>(index) * t.map.strides[i - 1];
    }
    const int64_t first = std::max<int64_t>(0, -int64_t{t.at[0]});
    const int64_t end =
        std::min<int64_t>(t.counts[0], static_cast<int64_t>(t.map.dims[0]) - int64_t{t.at[0]});
    if (end <= first) return {0, 0, 0};
    address += static_cast<uint64_t>(int64_t{t.at[0]} + first) * t.element;
    return {address, static_cast<uint32_t>(first) * t.element,
            static_cast<uint32_t>(end - first) * t.element};
}

namespace {

// The constant that stands for "outside" in a floating-point tensor: a NaN.
void fill_nan(uint8_t* to, uint32_t bytes, uint32_t element) {
    for (uint32_t i = 0; i < bytes; ++i) to[i] = (i + 1) % element == 0 ? 0x7f : 0xff;
}

// Calls f(shared address, offset in the row, bytes) for the pieces of a row.
template <class F>
void for_each_piece(const Tile& t, uint32_t address, uint32_t row, F f) {
    const uint32_t start = address + row * t.pitch;
    if (t.map.swizzle == Swizzle::none) return f(start, 0, t.row_bytes);
    for (uint32_t at = 0; at < t.row_bytes; at += 16)
        f(swizzled(t.map.swizzle, start + at), at, 16);
}

}  // namespace

void load_tile(const Tile& t, uint8_t* shared, uint32_t address) {
    std::vector<uint8_t> image(t.row_bytes);
    for (uint32_t row = 0; row < t.rows; ++row) {
        const RowPart part = row_part(t, row);
        if (part.bytes < t.row_bytes) {
            if (t.map.fill == OobFill::nan)
                fill_nan(image.data(), t.row_bytes, t.element);
            else
                std::fill(image.begin(), image.end(), 0);
        }
        std::memcpy(image.data() + part.skip, reinterpret_cast<const void*>(part.global),
                    part.bytes);
        if (t.map.type == TensorType::f32_ftz)
            for (uint32_t i = part.skip; i < part.skip + part.bytes; i += 4) {
                uint32_t bits;
                std::memcpy(&bits, &image[i], 4);
                if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
                std::memcpy(&image[i], &bits, 4);
            }
        for_each_piece(t, address, row, [&](uint32_t to, uint32_t from, uint32_t bytes) {
            std::memcpy(shared + to, image.data() + from, bytes);
        });
    }
}

void gather_tile(const Tile& t, const uint8_t* shared, uint32_t address, uint8_t* rows) {
    for (uint32_t row = 0; row < t.rows; ++row)
        for_each_piece(t, address, row, [&](uint32_t from, uint32_t to, uint32_t bytes) {
            std::memcpy(rows + static_cast<size_t>(row) * t.row_bytes + to, shared + from, bytes);
        });
}

}  // namespace emu
