// The launch shape of ops that treat every vector of 8 elements of a row alike.
//
//   grid (rows, blocks_per_row), block (threads): the row's vectors go round the threads of its
//   blocks, so that a warp's accesses are contiguous; a thread takes at most kRowVecs of them and
//   loads them all before it uses one (64 bytes per tensor and thread in flight).
#pragma once

namespace mk {

constexpr int kRowVecs = 4;
constexpr int kRowMaxThreads = 256;

}  // namespace mk
