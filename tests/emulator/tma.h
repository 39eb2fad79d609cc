// The tile of a tensor map that a TMA instruction moves: where its bytes are in global memory and
// where in shared memory.
#pragma once

#include <cstdint>

#include "tensor_map.h"

namespace emu {

struct Tile {
    TensorMap map;
    int32_t at[5];       // of its first element, innermost coordinate first; may lie outside
    uint32_t counts[5];  // elements moved along each dimension
    uint32_t element;    // bytes
    uint32_t row_bytes;  // of the innermost dimension, contiguous on both sides
    uint32_t pitch;      // bytes from row to row in shared memory
    uint32_t rows;
    uint32_t bytes() const { return rows * row_bytes; }
    uint32_t span() const { return rows * pitch; }
};

// Throws Fault for a map that this emulator does not model (interleave, sub-byte elements).
Tile make_tile(const TensorMap& map, const int32_t* at);

// Part of a row of a tile that lies inside the tensor: `bytes` (0: none) bytes at `global`, which
// are those from `skip` on of the row.
struct RowPart {
    uint64_t global;
    uint32_t skip, bytes;
};
RowPart row_part(const Tile& tile, uint32_t row);

// Where the 16 bytes at an unswizzled shared address really are.
inline uint32_t swizzled(Swizzle mode, uint32_t address) {
    constexpr uint32_t kMasks[] = {0, 1, 3, 7};
    return address ^ (address >> 7 & kMasks[static_cast<int>(mode)]) << 4;
}

// A tile out of global memory into `shared` (the CTA's memory; the tile starts at `address`), with
// what lies outside the tensor filled; and the bytes of one in shared memory, row by row.
void load_tile(const Tile& tile, uint8_t* shared, uint32_t address);
void gather_tile(const Tile& tile, const uint8_t* shared, uint32_t address, uint8_t* rows);

}  // namespace emu
