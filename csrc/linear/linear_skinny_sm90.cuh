// y = x w^T for up to 64 rows of x on Hopper, bound by the bytes of w: each is read from DRAM once.
//
//   output     columns | strip 0 | strip 1 | ...      a strip = kN columns over the whole of k
//   (m <= 64)          | block 0 | block 1 | ...      block b does strips b, b + grid, ...
//   stage      64 k of the rows of x, then of kN rows of w: rows of 128 bytes in wgmma's swizzle
//
//   warps 0-3  the MMAs of a stage, m64 n(kN) k16 each: x is A, w is B; then the epilogue
//   warp 4     one thread: TMA of w and x into a ring of stages that runs through all strips
//   warps 5-8  with a norm only: normalise x in the stage. By elements: fill the stage themselves
//
//   smem       stages | mbarriers, 576 bytes | with a norm: scales of 64 rows, sums of groups
//
// The sum is one accumulator over all k in ascending groups of 16 (minitron_kernels.h): a row's
// bits are those of any m. The tensor core takes a group in 16 clocks (reading A), 4096 k in 2.2
// us, where DRAM takes 10 us for 4096 columns; issue slots 2.2 us, with a norm of 64 rows 14 of 15
// us. Above 16 rows two blocks are a cluster: each fetches half of the rows of x for both
// (linear_skinny_tiles.h has the bytes). Then a stage is free when both are done with it.
// Events of a stage (mbarriers): full, its bytes have come; filled, by each of warps 5-8; empty, by
// the consumers of each block of the cluster.
// w does not wait for the launch before: its first stages come as far as L2 meanwhile. Not into
// shared memory, as that launch may have written w.
// Norm: all warps first pass over x for its scales, a cluster's blocks over half of the rows each;
// then warps 5-8 normalise in place what TMA brought. (On the way into A's registers, all of up to
// 16 rows would be warp 0's work.)
// Without 16-byte rows warps 5-8 load elements: slow, the same bits. That serves m > 64 too
// (grid.y: blocks of 64 rows), so that the GEMM needs no such form.
#pragma once

#include "common/static_for.cuh"
#include "common/wgmma.cuh"
#include "linear/linear_epilogue.cuh"
#include "linear/linear_norm.cuh"
#include "linear/linear_skinny_tiles.h"

namespace mk {

template <class Dtype, int kN>
struct LinearSkinnySm90 {
    using Args = LinearSkinnySm90Args;
    static constexpr int kConsumerWarps = kSkinnySm90Consumers / 32;
    static constexpr int kProducer = kConsumerWarps;  // warp
    static constexpr int kFillerWarps = kSkinnySm90Fillers / 32;
    static constexpr int kChunks = kSkinnySm90RowBytes / 16;  // of a row

    // A stage has one mbarrier of each kind; those of all stages lie side by side, from here on.
    enum Event {
        kFull = 0,
        kFilled = kFull + 8 * kSkinnySm90MaxStages,
        kEmpty = kFilled + 8 * kSkinnySm90MaxStages
    };

    const Args& args;
    const Product& a;
    const SkinnySm90Ring& ring;
    uint8_t* const smem;
    const uint32_t smem_stages, smem_events;
    const int num_strips;  // a multiple of the cluster's blocks
    const int cluster;     // blocks

    // A stage of the ring, and the parity of the phase in which it is used.
    struct Stage {
        uint32_t smem, events, parity;
        int index;
    };
    __device__ __forceinline__ Stage first_stage() const {
        return {smem_stages, smem_events, 0, 0};
    }
    __device__ __forceinline__ void advance(Stage& s) const {
        s.smem += ring.stage_bytes;
        s.events += 8;
        if (++s.index == ring.num_stages) {
            s = {smem_stages, smem_events, s.parity ^ 1, 0};
        }
    }
    __device__ __forceinline__ uint32_t smem_w(const Stage& s) const {
        return s.smem + ring.x_rows * kSkinnySm90RowBytes;
    }

    template <Event kEvent>
    static __device__ __forceinline__ void wait(const Stage& s, uint32_t parity) {
        while (!ptx::mbarrier_try_wait_parity<kEvent>(s.events, parity)) {
        }
    }
    // Until a stage that was used before may be filled again.
    static __device__ __forceinline__ void wait_until_empty(const Stage& s) {
        wait<kEmpty>(s, s.parity ^ 1);
    }

    // ---- the thread that starts the copies ----

    struct Loader {
        const LinearSkinnySm90& block;
        const int rank;  // in the cluster
        int strip, k;
        Stage stage;

        __device__ __forceinline__ bool has_stage() const { return strip < block.num_strips; }

        __device__ __forceinline__ void load() {
            const SkinnySm90Ring& ring = block.ring;
            const Args& args = block.args;
            const uint32_t full = stage.events + kFull;
            ptx::mbarrier_arrive_expect_tx(full, (ring.x_rows + kN) * kSkinnySm90RowBytes);
            ptx::cp_async_bulk_tensor_2d(block.smem_w(stage), &args.w_map, k, strip * kN, full);
            if (block.cluster == 1) {
                ptx::cp_async_bulk_tensor_2d(stage.smem, &args.x_map, k, 0, full);
            } else {
                const int row = rank * (ring.x_rows / 2);
                ptx::cp_async_bulk_tensor_2d_multicast(stage.smem + row * kSkinnySm90RowBytes,
                                                       &args.x_map, k, row, full, 3);
            }
            block.advance(stage);
            k += kSkinnySm90K;
            if (k >= block.a.k) k = 0, strip += gridDim.x;
        }

        // The stages that the ring holds.
        __device__ __forceinline__ void load_first() {
            for (int i = 0; i < block.ring.num_stages && has_stage(); ++i) load();
        }
        __device__ __forceinline__ void load_others() {
            while (has_stage()) {
                wait_until_empty(stage);
                load();
            }
        }
        __device__ __forceinline__ void prefetch_w() const {
            int s = strip, from = 0;
            for (int i = 0; i < block.ring.num_stages && s < block.num_strips; ++i) {
                ptx::cp_async_bulk_prefetch_tensor_2d_l2(&block.args.w_map, from, s * kN);
                from += kSkinnySm90K;
                if (from >= block.a.k) from = 0, s += gridDim.x;
            }
        }
    };

    // ---- the warps that fill stages ----

    // A filler has a chunk of every 16th row.
    static __device__ __forceinline__ int filler() {
        return threadIdx.x - kSkinnySm90Consumers - kSkinnySm90Producers;
    }
    static __device__ __forceinline__ int chunk() { return filler() % kChunks; }
    static __device__ __forceinline__ int filler_row() { return filler() / kChunks; }
    static constexpr int kRowStep = kSkinnySm90Fillers / kChunks;

    __device__ __forceinline__ uint8_t* piece_at(uint32_t rows, int r) const {
        const uint32_t offset = rows + r * kSkinnySm90RowBytes + (chunk() ^ r % 8) * 16;
        return smem + (offset - smem_stages);
    }

    // Normalise the rows of x that TMA brought.
    __device__ __forceinline__ void normalise_stage(const Stage& s, int piece, const float* scale,
                                                    const Vec8& norm_weight) const {
        if (piece >= a.k) return;
        for (int r = filler_row(); r < a.m; r += kRowStep) {
            uint8_t* const to = piece_at(s.smem, r);
            store_piece(to, normalise<Dtype>(load_piece(to), scale[r], norm_weight));
        }
    }

    // Bring rows of x and w by elements, zeros for those that do not exist and past the last k.
    __device__ __forceinline__ void fill_stage(const Stage& s, int piece, int first_row, int strip,
                                               const float* scale, const Vec8& norm_weight) const {
        MK_NO_UNROLL
        for (int r = filler_row(); r < ring.x_rows; r += kRowStep) {
            Vec8 v{};
            if (first_row + r < a.m) {
                v = load8<false>(row_of(a.x, first_row + r, a.x_stride), piece, a.k);
                if (a.norm_weight) v = normalise<Dtype>(v, scale[r], norm_weight);
            }
            store_piece(piece_at(s.smem, r), v);
        }
        MK_NO_UNROLL
        for (int r = filler_row(); r < kN; r += kRowStep) {
            const int row = strip * kN + r;
            store_piece(
                piece_at(smem_w(s), r),
                row < a.n ? load8<false>(row_of(a.w, row, a.w_stride), piece, a.k) : Vec8{});
        }
    }

    __device__ __forceinline__ void fill(const float* scale) const {
        Stage stage = first_stage();
        bool is_used = false;
        for (int row = first_row(); row < a.m; row += row_step()) {
            for (int strip = blockIdx.x; strip < num_strips; strip += gridDim.x) {
                for (int k = 0; k < a.k; k += kSkinnySm90K) {
                    const int piece = k + chunk() * kVec;
                    Vec8 norm_weight{};
                    if (a.norm_weight && piece < a.k && filler_row() < a.m) {
                        norm_weight = a.is_aligned
                                          ? load8<true, Reuse::kOften>(a.norm_weight, piece, a.k)
                                          : load8<false>(a.norm_weight, piece, a.k);
                    }
                    if (a.is_aligned) {
                        wait<kFull>(stage, stage.parity);
                        normalise_stage(stage, piece, scale, norm_weight);
                    } else {
                        if (is_used) wait_until_empty(stage);
                        fill_stage(stage, piece, row, strip, scale, norm_weight);
                    }
                    ptx::fence_proxy_async();
                    __syncwarp();
                    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive<kFilled>(stage.events);
                    advance(stage);
                    is_used |= stage.index == 0;
                }
            }
        }
    }

    // ---- the warps that multiply ----

    static __device__ __forceinline__ uint64_t operand(uint32_t rows) {
        return wgmma_operand(rows, 0, 8 * kSkinnySm90RowBytes);
    }

    // Tells whoever fills a stage, here and in the cluster, that its MMAs have ended: all four
    // warps', if this thread has waited for them. What warps 5-8 wrote there the MMAs have read, so
    // that the next copy, the other block's too, comes later in any case.
    __device__ __forceinline__ void release(uint32_t events) const {
        if (static_cast<int>(threadIdx.x) >= cluster) return;
        if (cluster == 1) {
            ptx::mbarrier_arrive<kEmpty>(events);
        } else {
            const uint32_t there = ptx::mapa_shared_cluster(events, threadIdx.x);
            ptx::mbarrier_arrive_shared_cluster<kEmpty>(there);
        }
    }

    // A loop for each product: its rows' addresses stay in registers from strip to strip.
    template <class Epilogue>
    __device__ __forceinline__ void multiply(const Epilogue& epilogue) const {
        const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const bool has_fillers = blockDim.x == kSkinnySm90Threads;
        Stage stage = first_stage();
        for (int block_row = first_row(); block_row < a.m; block_row += row_step()) {
            // Of the sums that this thread holds: these rows, columns 2t and 2t + 1 of each 8.
            const int row = block_row + warp * 16 + g;
            typename Epilogue::Row rows[2]{};
            MK_UNROLL
            for (int i = 0; i < 2; ++i) {
                if (row + 8 * i < a.m) rows[i] = epilogue.row(row + 8 * i);
            }
            for (int strip = blockIdx.x; strip < num_strips; strip += gridDim.x) {
                const int column = strip * kN + 2 * t;
                MK_UNROLL
                for (int i = 0; i < 2; ++i) {
                    if (row + 8 * i >= a.m) continue;
                    MK_UNROLL
                    for (int j = 0; j < kN / 8; ++j) epilogue.prefetch(rows[i], column + 8 * j);
                }
                float acc[kN / 8][4]{};
                uint32_t last = 0;  // events of the stage before
                for (int k = 0; k < a.k; k += kSkinnySm90K) {
                    if (a.is_aligned) wait<kFull>(stage, stage.parity);
                    if (has_fillers) wait<kFilled>(stage, stage.parity);
                    const uint64_t x = operand(stage.smem), w = operand(smem_w(stage));
                    ptx::wgmma_fence();
                    static_for<kSkinnySm90K / 16>([&](auto j) {
                        ptx::wgmma<kWgmmaType<Dtype>, true>(acc, wgmma_advance(x, j * 32),
                                                            wgmma_advance(w, j * 32));
                    });
                    ptx::wgmma_commit_group();
                    ptx::wgmma_wait_group<1>();
                    if (last) release(last);
                    last = stage.events;
                    advance(stage);
                }
                ptx::wgmma_wait_group<0>();
                ptx::pin(acc);
                release(last);
                if constexpr (requires { epilogue.in_quads; }) {
                    if (epilogue.in_quads) {
                        store_quads(epilogue, rows, row, strip * kN, acc);
                        continue;
                    }
                }
                store(epilogue, rows, row, column, acc);
            }
        }
    }

    template <class Epilogue>
    __device__ __forceinline__ void store(const Epilogue& epilogue,
                                          const typename Epilogue::Row (&rows)[2], int row,
                                          int column, const float (&acc)[kN / 8][4]) const {
        if (row >= a.m) return;
        MK_UNROLL
        for (int j = 0; j < kN / 8; ++j) {
            const auto c = epilogue.column(column + 8 * j);
            epilogue.store(rows[0], c, acc[j][0], acc[j][1]);
            if (row + 8 < a.m) epilogue.store(rows[1], c, acc[j][2], acc[j][3]);
        }
    }

    // Of two blocks of 8 columns, four lanes have pairs of each in a row. Even ones take the first
    // block and odd ones the second, four columns each: together a whole sector of 2-byte outputs.
    template <class Epilogue>
    __device__ __forceinline__ void store_quads(const Epilogue& epilogue,
                                                const typename Epilogue::Row (&rows)[2], int row,
                                                int first_column,
                                                const float (&acc)[kN / 8][4]) const {
        const int t = threadIdx.x % 4;
        const bool is_odd = t % 2;
        const int column = first_column + is_odd * 8 + t / 2 * 4;
        MK_UNROLL
        for (int j = 0; j < kN / 8; j += 2) {
            MK_UNROLL
            for (int i = 0; i < 2; ++i) {
                const float *const even = acc[j] + 2 * i, *const odd = acc[j + 1] + 2 * i;
                const float a0 = is_odd ? odd[0] : even[0], a1 = is_odd ? odd[1] : even[1];
                const float b0 = __shfl_xor_sync(0xFFFFFFFFu, is_odd ? even[0] : odd[0], 1);
                const float b1 = __shfl_xor_sync(0xFFFFFFFFu, is_odd ? even[1] : odd[1], 1);
                if (row + 8 * i >= a.m) continue;
                const float4 y = is_odd ? float4{b0, b1, a0, a1} : float4{a0, a1, b0, b1};
                epilogue.store_quad(rows[i], column + 8 * j, y);
            }
        }
    }

    // ---- the block ----

    // Of x, in blocks of 64: TMA's products have but one.
    static __device__ __forceinline__ int first_row() { return blockIdx.y * kSkinnySm90Rows; }
    static __device__ __forceinline__ int row_step() { return gridDim.y * kSkinnySm90Rows; }

    __device__ __forceinline__ void init() const {
        if (threadIdx.x == 0) {
            for (int i = 0; i < ring.num_stages; ++i) {
                const uint32_t events = smem_events + 8 * i;
                ptx::mbarrier_init(events + kFull, 1);
                ptx::mbarrier_init(events + kFilled, kFillerWarps);
                ptx::mbarrier_init(events + kEmpty, cluster);
            }
            ptx::fence_mbarrier_init();
        }
        // The MMAs may read behind the rows of w, which nothing else writes.
        const int used = (ring.x_rows + kN) * kSkinnySm90RowBytes;
        for (int i = 0; i < ring.num_stages; ++i) {
            for (int byte = used + threadIdx.x * 16; byte < ring.stage_bytes;
                 byte += blockDim.x * 16) {
                store_piece(smem + i * ring.stage_bytes + byte, Vec8{});
            }
        }
        ptx::fence_proxy_async();
        sync();
    }

    __device__ __forceinline__ void sync() const {
        if (cluster == 1) {
            __syncthreads();
        } else {
            __syncwarp();  // the instructions are of whole warps
            ptx::barrier_cluster_arrive();
            ptx::barrier_cluster_wait();
        }
    }

    // Of the rows of x, by all threads; a cluster's blocks each of half of them.
    __device__ __forceinline__ void find_scales(int rank, float* scale, float4* group_sums) const {
        const int share = (a.m + cluster - 1) / cluster;
        const int first = rank * share, count = min(share, a.m - first);
        row_scales<Dtype>(a, first, count, group_sums, scale + first);
        if (cluster == 1) return;
        if (static_cast<int>(threadIdx.x) < count) {
            float* const own = scale + first + threadIdx.x;
            const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(own));
            ptx::st_shared_cluster(ptx::mapa_shared_cluster(address, rank ^ 1), *own);
        }
        sync();
    }

    static __device__ __forceinline__ void run(const Args& args) {
        extern __shared__ __align__(1024) uint8_t dynamic_smem[];
        const auto smem_stages = static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_smem));
        const SkinnySm90Ring& ring = args.ring;
        uint8_t* const events = dynamic_smem + ring.num_stages * ring.stage_bytes;
        auto* const scale = reinterpret_cast<float*>(events + kSkinnySm90EventBytes);
        auto* const group_sums = reinterpret_cast<float4*>(scale + kSkinnySm90Rows);
        const Product& a = args.product;
        const int cluster = ring.cluster;
        const int rank = blockIdx.x % cluster;
        const int strips = (a.n + kN - 1) / kN;
        const LinearSkinnySm90 block{args,
                                     a,
                                     ring,
                                     dynamic_smem,
                                     smem_stages,
                                     smem_stages + ring.num_stages * ring.stage_bytes,
                                     (strips + cluster - 1) / cluster * cluster,
                                     cluster};
        // The same in all lanes, and known to be: descriptors then take uniform registers.
        const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
        const bool is_loader = a.is_aligned && threadIdx.x == kProducer * 32;

        ptx::griddepcontrol_launch_dependents();
        Loader loader{block, rank, static_cast<int>(blockIdx.x), 0, block.first_stage()};
        if (is_loader) loader.prefetch_w();
        block.init();
        ptx::griddepcontrol_wait();
        if (is_loader) loader.load_first();
        __syncwarp();
        if (a.norm_weight) block.find_scales(rank, scale, group_sums);

        if (warp < kProducer) {
            with_epilogue<Dtype>(args.to, [&](const auto& epilogue) { block.multiply(epilogue); });
        } else if (warp > kProducer) {
            block.fill(scale);
        } else if (is_loader) {
            loader.load_others();
        }
        // The other block's copies and arrivals come here as long as it runs.
        if (cluster > 1) block.sync();
    }
};

template <class Dtype, int kN>
__device__ __forceinline__ void linear_skinny_sm90(const LinearSkinnySm90Args& args) {
    LinearSkinnySm90<Dtype, kN>::run(args);
}

}  // namespace mk
