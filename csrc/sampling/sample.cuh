// sample: one token per row by the integer rule of minitron_kernels.h. One block per row.
//
// What is kept is described by a threshold: every token whose key (logits.cuh) is above
// Kept::key, and the first Kept::num_equal ids that have it. top_k and top_p each lower num_equal
// or raise key; both find their threshold by radix selection over the keys' bits from the top
// (11 + 11 + 10): a histogram of counts (top_k) or of weights (top_p) in shared memory, then a
// scan from the largest bin down. Nothing is sorted.
//
// The bulk of the logits lies far below the maximum, in a few bins, where atomics would queue up.
// So each selection first looks only at logits within 8 of the maximum, then within 28 (further
// down every weight is 0), and at all of them only if these do not reach the limit. A vector of 8
// with nothing above the threshold costs the loads and 8 max instructions, and no division or
// exponential. Sums are of integers and come out the same in any order.
//
// Reads of the row: 1 for the maximum, 3 for top_k, 4 for top_p (one for the total, 3 for the
// digits), 1 for the draw; the row stays in L2 (256 KB for 131072 bf16 logits).
//
// smem: weights 16 KB (bins of a digit, then chunks of the row), counts 8 KB, scans 0.5 KB.
#pragma once

#include "sampling/logits.cuh"

namespace mk {

// Keys order as floats do, with -0 = +0. No float has key 0. There are no NaN here.
constexpr uint32_t kKeyNone = 0;

__device__ __forceinline__ uint32_t key_of(float scaled) {
    const uint32_t bits = __float_as_uint(scaled + 0.f);  // -0 + 0 = +0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float scaled_of(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// Logits below this have keys below `lowest` (kKeyNone: none have) after division by `temperature`:
// the slack is far above the rounding errors of the two.
__device__ __forceinline__ float cut_of(uint32_t lowest, float temperature) {
    if (lowest == kKeyNone) return kMinusInf;
    const float cut = scaled_of(lowest) * temperature;
    return cut - (fabsf(cut) * 1e-6f + 1e-30f);
}

// The keys of 8 logits divided by `temperature`; false if all are below the cut.
__device__ __forceinline__ bool keys_of(const float (&logits)[kVec], float temperature, float cut,
                                        uint32_t (&keys)[kVec]) {
    if (max_of(logits) < cut) return false;
    MK_UNROLL
    for (int i = 0; i < kVec; ++i) keys[i] = key_of(__fdiv_rn(logits[i], temperature));
    return true;
}

struct Kept {
    uint32_t key;
    int num_equal;
};

struct SamplingSmem {
    unsigned long long weights[kSamplingBins];
    uint32_t counts[kSamplingBins];
    uint64_t warp_sums[kSamplingThreads / 32];
    uint64_t found_before;  // sum before the bin or chunk that was looked for
    int found;              // that bin or chunk; -1: none
};

// Logits this far below the largest have weight 0: e^-28 * 2^40 < 1.
constexpr float kWindow = 28.f;

// e^x * 2^40 for x <= 0, within 1.01 ulp; 0 from -28 down. Only fused multiply-adds, so
// every device gives the same bits. Polynomial: Cephes' expf (Moshier 1992).
__device__ __forceinline__ float exp_times_2_40(float x) {
    constexpr float kLog2E = 1.44269504088896341f;
    constexpr float kLn2Hi = 0.693147182f;
    constexpr float kLn2Lo = -1.90465421e-9f;
    if (!(x > -kWindow)) return 0.f;
    const float n = rintf(x * kLog2E);
    const float r = fmaf(n, -kLn2Lo, fmaf(n, -kLn2Hi, x));
    float y = fmaf(1.9875691500e-4f, r, 1.3981999507e-3f);
    y = fmaf(y, r, 8.3334519073e-3f);
    y = fmaf(y, r, 4.1665795894e-2f);
    y = fmaf(y, r, 1.6666665459e-1f);
    y = fmaf(y, r, 5.0000001201e-1f);
    y = fmaf(y, r * r, r) + 1.f;
    return y * __int_as_float((static_cast<int>(n) + 40 + 127) << 23);
}

__device__ __forceinline__ uint64_t weight_of(uint32_t key, float largest) {
    return static_cast<uint64_t>(exp_times_2_40(scaled_of(key) - largest));
}

// Sum over the threads before this one; *total gets the sum over all. Ends with a barrier.
__device__ __forceinline__ uint64_t block_scan(SamplingSmem& smem, uint64_t value,
                                               uint64_t* total) {
    const int lane = threadIdx.x % 32;
    const auto warp_scan = [lane](uint64_t sum) {
        MK_UNROLL
        for (int distance = 1; distance < 32; distance *= 2) {
            const uint64_t below = __shfl_up_sync(0xFFFFFFFFu, sum, distance);
            if (lane >= distance) sum += below;
        }
        return sum;
    };
    const uint64_t inclusive = warp_scan(value);
    if (lane == 31) smem.warp_sums[threadIdx.x / 32] = inclusive;
    __syncthreads();
    const uint64_t warps = warp_scan(smem.warp_sums[lane]);
    const uint64_t before =
        __shfl_sync(0xFFFFFFFFu, warps - smem.warp_sums[lane], threadIdx.x / 32);
    *total = __shfl_sync(0xFFFFFFFFu, warps, 31);
    __syncthreads();
    return before + inclusive - value;
}

// Looks for the place where a running sum passes `limit`: the slot with before < limit <= before +
// value. Thread t holds slots 2t and 2t + 1 in the order of summation, slot i being index(i).
template <class Index>
__device__ __forceinline__ void find_slot(SamplingSmem& smem, const uint64_t (&values)[2],
                                          uint64_t limit, const Index& index) {
    if (threadIdx.x == 0) smem.found = -1;
    uint64_t total;
    uint64_t before = block_scan(smem, values[0] + values[1], &total);
    MK_UNROLL
    for (int j = 0; j < 2; ++j) {
        if (before < limit && limit <= before + values[j]) {
            smem.found = index(2 * threadIdx.x + j);
            smem.found_before = before;
        }
        before += values[j];
    }
    __syncthreads();
}

// Calls visit(key) for the logits whose key is `lowest` or more, and for some others.
template <class Row, class Visit>
__device__ __forceinline__ void for_each_key(const Row& row, float temperature, uint32_t lowest,
                                             const Visit& visit) {
    const float cut = cut_of(lowest, temperature);
    for_each_8<1>(row, [&](int, const float (&logits)[kVec]) {
        uint32_t keys[kVec];
        if (!keys_of(logits, temperature, cut, keys)) return;
        MK_UNROLL
        for (const uint32_t key : keys) visit(key);
    });
}

// The threshold at which the tokens from the largest down first reach `limit` together: in number
// (kByWeight false), or in weight, of the tokens that `kept` holds. False if they do not reach it
// among the keys from `lowest` on.
template <bool kByWeight, class Row>
__device__ __forceinline__ bool select(SamplingSmem& smem, const Row& logits, float temperature,
                                       float largest, uint64_t limit, uint32_t lowest, Kept* kept) {
    uint32_t known = 0;  // digits found so far
    uint32_t known_mask = 0;
    int shift = 32;
    MK_NO_UNROLL
    while (shift > 0) {
        const int width = min(shift, 11);  // 11, 11, 10 bits
        const uint32_t digit_mask = (1u << width) - 1;
        shift -= width;
        for (int i = threadIdx.x; i < kSamplingBins; i += kSamplingThreads) {
            smem.weights[i] = 0;
            smem.counts[i] = 0;
        }
        __syncthreads();
        for_each_key(logits, temperature, max(lowest, kept->key), [&](uint32_t key) {
            if (key < lowest || (key & known_mask) != known) return;
            if (!kByWeight) {
                atomicAdd(&smem.counts[key >> shift & digit_mask], 1u);
            } else if (key > kept->key) {
                const uint64_t weight = weight_of(key, largest);
                if (weight) atomicAdd(&smem.weights[key >> shift & digit_mask], weight);
            }
        });
        if (kByWeight && threadIdx.x == 0 && kept->key >= lowest &&
            (kept->key & known_mask) == known) {
            atomicAdd(&smem.weights[kept->key >> shift & digit_mask],
                      kept->num_equal * weight_of(kept->key, largest));
        }
        __syncthreads();
        // Slots run from the largest bin down.
        const auto bin = [](int slot) { return kSamplingBins - 1 - slot; };
        uint64_t values[2];
        MK_UNROLL
        for (int j = 0; j < 2; ++j) {
            const int i = bin(2 * threadIdx.x + j);
            values[j] = kByWeight ? smem.weights[i] : smem.counts[i];
        }
        find_slot(smem, values, limit, bin);
        if (smem.found < 0) return false;
        known |= static_cast<uint32_t>(smem.found) << shift;
        known_mask |= digit_mask << shift;
        limit -= smem.found_before;
        __syncthreads();
    }
    kept->key = known;
    const uint64_t each = kByWeight ? weight_of(known, largest) : 1;
    kept->num_equal = static_cast<int>((limit + each - 1) / each);
    return true;
}

template <bool kByWeight, class Row>
__device__ __forceinline__ void narrow(SamplingSmem& smem, const Row& logits, float temperature,
                                       float largest, uint64_t limit, Kept* kept) {
    MK_NO_UNROLL
    for (int attempt = 0; attempt < 3; ++attempt) {
        const uint32_t lowest = attempt == 0   ? key_of(largest - 8.f)
                                : attempt == 1 ? key_of(largest - kWindow)
                                               : kKeyNone;
        if (select<kByWeight>(smem, logits, temperature, largest, limit, lowest, kept)) return;
    }
}

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
__device__ __forceinline__ uint64_t philox_4x32_10(uint64_t seed, uint32_t step) {
    uint32_t c[4] = {step, 0, 0, 0};
    uint32_t key_lo = static_cast<uint32_t>(seed);
    uint32_t key_hi = static_cast<uint32_t>(seed >> 32);
    MK_UNROLL
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c[0];
        const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * c[2];
        c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ key_lo;
        c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ key_hi;
        c[1] = static_cast<uint32_t>(b);
        c[3] = static_cast<uint32_t>(a);
        key_lo += 0x9E3779B9u;
        key_hi += 0xBB67AE85u;
    }
    return static_cast<uint64_t>(c[1]) << 32 | c[0];
}

// Draws among the tokens of `kept` whose weight is at least `floor`.
template <class Row>
__device__ __forceinline__ int draw(SamplingSmem& smem, const Row& logits, float temperature,
                                    float largest, const Kept& kept, uint64_t floor,
                                    uint64_t random) {
    const int lane = threadIdx.x % 32;
    const auto counted_weight = [&](uint32_t key) -> uint64_t {
        const uint64_t weight = weight_of(key, largest);
        return weight >= floor ? weight : 0;
    };
    const uint64_t equal_weight = counted_weight(kept.key);
    const float cut = cut_of(max(kept.key, key_of(largest - kWindow)), temperature);
    // The weights above the threshold, and who is at it, of 8 tokens.
    const auto count = [&](int first, uint64_t (&weights)[kVec], int (&equals)[kVec]) {
        float l[kVec];
        uint32_t keys[kVec];
        MK_UNROLL
        for (int i = 0; i < kVec; ++i) weights[i] = equals[i] = 0;
        if (first >= logits.vocab) return;
        logits.load(first, l);
        if (!keys_of(l, temperature, cut, keys)) return;
        MK_UNROLL
        for (int i = 0; i < kVec; ++i) {
            equals[i] = keys[i] == kept.key;
            if (keys[i] > kept.key) weights[i] = counted_weight(keys[i]);
        }
    };

    for (int i = threadIdx.x; i < kSamplingBins; i += kSamplingThreads) {
        smem.weights[i] = 0;
        smem.counts[i] = 0;
    }
    __syncthreads();
    const int num_chunks = (logits.vocab + kSamplingChunk - 1) / kSamplingChunk;
    MK_NO_UNROLL
    for (int chunk = threadIdx.x / 32; chunk < num_chunks; chunk += kSamplingThreads / 32) {
        uint64_t weights[kVec];
        int equals[kVec];
        count(chunk * kSamplingChunk + lane * kVec, weights, equals);
        uint64_t weight = 0;
        int equal = 0;
        MK_UNROLL
        for (int i = 0; i < kVec; ++i) {
            weight += weights[i];
            equal += equals[i];
        }
        equal = __reduce_add_sync(0xFFFFFFFFu, equal);
        MK_UNROLL
        for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) {
            weight += __shfl_xor_sync(0xFFFFFFFFu, weight, lane_mask);
        }
        if (lane == 0) {
            smem.weights[chunk] = weight;
            smem.counts[chunk] = equal;
        }
    }
    __syncthreads();

    // Of the equals, the first num_equal ids count: so many of each chunk.
    const auto in_order = [](int slot) { return slot; };
    const int mine = 2 * threadIdx.x;
    const int equals[2] = {static_cast<int>(smem.counts[mine]),
                           static_cast<int>(smem.counts[mine + 1])};
    uint64_t total;
    int equals_before = static_cast<int>(block_scan(smem, equals[0] + equals[1], &total));
    uint64_t weights[2];
    MK_UNROLL
    for (int j = 0; j < 2; ++j) {
        smem.counts[mine + j] = equals_before;
        const int left = max(kept.num_equal - equals_before, 0);
        weights[j] = smem.weights[mine + j] + min(equals[j], left) * equal_weight;
        equals_before += equals[j];
    }
    block_scan(smem, weights[0] + weights[1], &total);
    const uint64_t target = __umul64hi(random, total);
    find_slot(smem, weights, target + 1, in_order);

    // The chunk is known; every warp finds the token in it.
    const int chunk = smem.found;
    const int first = chunk * kSamplingChunk + lane * kVec;
    uint64_t token_weights[kVec];
    int token_equals[kVec];
    count(first, token_weights, token_equals);
    int lane_equals = 0;
    MK_UNROLL
    for (const int equal : token_equals) lane_equals += equal;
    int equal_rank = lane_equals;
    MK_UNROLL
    for (int distance = 1; distance < 32; distance *= 2) {
        const int below = __shfl_up_sync(0xFFFFFFFFu, equal_rank, distance);
        if (lane >= distance) equal_rank += below;
    }
    equal_rank += static_cast<int>(smem.counts[chunk]) - lane_equals;
    uint64_t lane_weight = 0;
    MK_UNROLL
    for (int i = 0; i < kVec; ++i) {
        if (token_equals[i] && equal_rank++ < kept.num_equal) token_weights[i] = equal_weight;
        lane_weight += token_weights[i];
    }
    uint64_t running = lane_weight;
    MK_UNROLL
    for (int distance = 1; distance < 32; distance *= 2) {
        const uint64_t below = __shfl_up_sync(0xFFFFFFFFu, running, distance);
        if (lane >= distance) running += below;
    }
    running += smem.found_before - lane_weight;
    int token = -1;
    MK_UNROLL
    for (int i = 0; i < kVec; ++i) {
        running += token_weights[i];
        if (token < 0 && running > target) token = first + i;
    }
    const unsigned passed = __ballot_sync(0xFFFFFFFFu, token >= 0);
    return __shfl_sync(0xFFFFFFFFu, token, __ffs(passed) - 1);
}

template <class Dtype, bool kAligned>
__device__ __forceinline__ void sample(const mk_sample_params& p) {
    __shared__ SamplingSmem smem;
    const int64_t row = blockIdx.x;
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    const mk_sampling& how = p.sampling[row];
    const Logits<Dtype, kAligned> logits(p.logits, row, p.logits_stride, p.vocab);
    const float temperature = how.temperature;
    const bool is_greedy = temperature == 0.f;
    const float largest_logit = block_max(logits);
    const float largest = is_greedy ? largest_logit : __fdiv_rn(largest_logit, temperature);
    const bool is_finite = fabsf(largest) < -kMinusInf;
    if (is_greedy || !is_finite) {
        const int token = is_finite ? block_first(logits, largest) : -1;
        if (threadIdx.x == 0) p.out[row] = token;
        return;
    }

    Kept kept = {kKeyNone, 0};
    if (0 < how.top_k && how.top_k < p.vocab) {
        narrow<false>(smem, logits, temperature, largest, how.top_k, &kept);
    }
    if (how.top_p < 1.0) {
        uint64_t sum = 0;
        for_each_key(logits, temperature, max(kept.key, key_of(largest - kWindow)),
                     [&](uint32_t key) {
                         if (key > kept.key) sum += weight_of(key, largest);
                     });
        uint64_t total;
        block_scan(smem, sum, &total);
        total += kept.num_equal * weight_of(kept.key, largest);
        const auto limit = static_cast<uint64_t>(how.top_p * static_cast<double>(total));
        narrow<true>(smem, logits, temperature, largest, max(limit, uint64_t{1}), &kept);
    }
    const auto floor = static_cast<uint64_t>(how.min_p * 0x1p40);
    const int token =
        draw(smem, logits, temperature, largest, kept, floor, philox_4x32_10(how.seed, how.step));
    if (threadIdx.x == 0) p.out[row] = token;
}

}  // namespace mk
