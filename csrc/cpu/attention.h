// mk_cpu_attention, between attention.cpp (checks, division of the work) and attention_kernels.h
// (one copy per instruction set).
#pragma once

#include <stdint.h>

#include "minitron_kernels.h"

namespace mk::cpu {

constexpr int kKeyBlock = 128;  // keys whose weights share a maximum; part of the result's bits
constexpr int kTileRows = 96;   // rows of q that a thread works on at a time, if a group has fewer
constexpr int kLogitStride = kKeyBlock + 16;  // of the logits of a row: a tile may write past them
constexpr int kMaxAttentionHeadDim = 1024;

// Some queries of one sequence with one KV head and some blocks of its keys. A row is a query and a
// head of the group: row r is head r % group of query r / group.
struct AttentionTile {
    int32_t sequence, kv_head;
    int32_t query, num_queries;  // within the sequence
    int32_t queries, keys;       // of the sequence
    int32_t block, block_end;
    // Where the blocks' parts go: a record for each block of the sequence, for each row; NULL: all
    // blocks are here, and the output is written.
    float* parts;
};

// A part: what a block of keys gives a row, before it is joined with the others. The maximum of
// the logits, the sum of the weights, then the weighted sum of v, of padded head_dim.
constexpr int kPartHeader = 16;  // floats before the latter

struct AttentionKernels {
    // Floats of scratch that a tile of so many rows needs.
    int64_t (*scratch_floats)(const mk_attention_params& p, int64_t rows);
    void (*attend)(const mk_attention_params& p, const AttentionTile& tile, float* scratch);
    // Joins the parts of all blocks and writes the output.
    void (*join)(const mk_attention_params& p, const AttentionTile& tile, float* scratch);
};

extern const AttentionKernels kAttentionBaseline;
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;

namespace {

constexpr int64_t padded(int32_t head_dim) { return (head_dim + 15) / 16 * 16; }

}  // namespace

}  // namespace mk::cpu
