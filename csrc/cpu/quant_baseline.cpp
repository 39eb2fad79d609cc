// mk_cpu_linear_quant in plain C++, for any processor.
#include "cpu/vec_baseline.h"

namespace mk::cpu {
namespace {

// 16 x 32 bits: four of the 16-byte vectors that GCC and Clang have for every processor.
struct Ints {
    static constexpr int kTileM = 2, kTileN = 1;
    static constexpr int kDirectRows = 0;

    typedef uint32_t Unsigned __attribute__((vector_size(16)));
    typedef int32_t Signed __attribute__((vector_size(16)));
    typedef float Floats __attribute__((vector_size(16)));

    Unsigned v[4];

    // f(0) ... f(3)
    template <class F>
    static MK_INLINE Ints each(const F& f) {
        return {{f(0), f(1), f(2), f(3)}};
    }
    static MK_INLINE Ints set(int32_t a) {
        const Unsigned all = Unsigned{} + static_cast<uint32_t>(a);
        return {{all, all, all, all}};
    }
    static MK_INLINE Ints load(const uint32_t* p) {
        Ints a;
        __builtin_memcpy(a.v, p, sizeof a.v);
        return a;
    }
    MK_INLINE void store(uint32_t* p) const { __builtin_memcpy(p, v, sizeof v); }

    friend MK_INLINE Ints operator+(const Ints& a, const Ints& b) {
        return each([&](int i) { return a.v[i] + b.v[i]; });
    }
    friend MK_INLINE Ints operator-(const Ints& a, const Ints& b) {
        return each([&](int i) { return a.v[i] - b.v[i]; });
    }
    friend MK_INLINE Ints operator|(const Ints& a, const Ints& b) {
        return each([&](int i) { return a.v[i] | b.v[i]; });
    }
    friend MK_INLINE Ints operator&(const Ints& a, uint32_t b) {
        return each([&](int i) { return a.v[i] & b; });
    }
    friend MK_INLINE Ints operator^(const Ints& a, uint32_t b) {
        return each([&](int i) { return a.v[i] ^ b; });
    }
    friend MK_INLINE Ints operator<<(const Ints& a, int n) {
        return each([&](int i) { return a.v[i] << n; });
    }
    friend MK_INLINE Ints operator>>(const Ints& a, int n) {
        return each([&](int i) { return a.v[i] >> n; });
    }
    MK_INLINE Ints divide(int n) const {
        return each(
            [&](int i) { return reinterpret_cast<Unsigned>(reinterpret_cast<Signed>(v[i]) >> n); });
    }
    static MK_INLINE Ints spread_bits(Ints a) {
        a = a & 15;
        const Ints two = a | a << 14;  // bits 0, 1, and at 16, 17 bits 2, 3
        return (two << 4 | two << 11) & 0x10101010;
    }
    static MK_INLINE Ints and_or(const Ints& a, uint32_t mask, const Ints& b) {
        return (a & mask) | b;
    }

    static MK_INLINE Ints dot(const Ints& acc, const Ints& w, const Ints& x) {
        return each([&](int i) {
            return acc.v[i] + low(w.v[i]) * low(x.v[i]) + high(w.v[i]) * high(x.v[i]);
        });
    }
    // The signed halves of each lane.
    static MK_INLINE Unsigned low(Unsigned a) { return high(a << 16); }
    static MK_INLINE Unsigned high(Unsigned a) {
        return reinterpret_cast<Unsigned>(reinterpret_cast<Signed>(a) >> 16);
    }

    // The last bit of the sum is worth 1: halves to even.
    static MK_INLINE Ints round(const Vec& a) {
        Ints rounded;
        for (int i = 0; i < 4; ++i) {
            Floats f;
            __builtin_memcpy(&f, a.v + 4 * i, sizeof f);
            const Floats shifted = f + 0x1.8p23f;
            rounded.v[i] = reinterpret_cast<Unsigned>(shifted) - 0x4b400000u;
        }
        return rounded;
    }
    static MK_INLINE Ints max(const Ints& a, const Ints& b) {
        return each([&](int i) {
            const Unsigned more = reinterpret_cast<Unsigned>(reinterpret_cast<Signed>(a.v[i]) >
                                                             reinterpret_cast<Signed>(b.v[i]));
            return (a.v[i] & more) | (b.v[i] & ~more);
        });
    }
    uint32_t largest() const {
        uint32_t lanes[kLanes], most = 0;
        store(lanes);
        for (const uint32_t lane : lanes) most = lane > most ? lane : most;
        return most;
    }
    int32_t sum() const {
        const Unsigned four = v[0] + v[1] + v[2] + v[3];
        return static_cast<int32_t>(four[0] + four[1] + four[2] + four[3]);
    }
    MK_INLINE Vec to_float() const {
        Vec a;
        for (int i = 0; i < 4; ++i) {
            const auto f = __builtin_convertvector(reinterpret_cast<Signed>(v[i]), Floats);
            __builtin_memcpy(a.v + 4 * i, &f, sizeof f);
        }
        return a;
    }
    MK_INLINE Vec half() const {
        uint32_t words[kLanes];
        store(words);
        return Vec::each([&](int l) { return widen(F16{static_cast<uint16_t>(words[l])}); });
    }
    static MK_INLINE Ints gather(const uint8_t* const* rows, int64_t offset) {
        uint32_t words[kLanes];
        for (int r = 0; r < kLanes; ++r) __builtin_memcpy(words + r, rows[r] + offset, 4);
        return load(words);
    }
    static MK_INLINE void columns(const uint8_t* const* rows, int64_t offset, Ints (&out)[4]) {
        uint32_t words[4][kLanes];
        for (int r = 0; r < kLanes; ++r) {
            for (int j = 0; j < 4; ++j) {
                __builtin_memcpy(&words[j][r], rows[r] + offset + 4 * j, 4);
            }
        }
        for (int j = 0; j < 4; ++j) out[j] = load(words[j]);
    }
    static MK_INLINE void columns(const uint8_t* const* rows, int64_t offset, Ints (&out)[8]) {
        Ints half[4];
        for (int h = 0; h < 2; ++h) {
            columns(rows, offset + 16 * h, half);
            for (int j = 0; j < 4; ++j) out[4 * h + j] = half[j];
        }
    }
};

}  // namespace
}  // namespace mk::cpu

#include "cpu/quant_halves.h"

namespace mk::cpu {
namespace {
using Order = Halves;
}
}  // namespace mk::cpu

#include "cpu/quant_dequantize.h"
#include "cpu/quant_kernels.h"

const mk::cpu::QuantKernels mk::cpu::kQuantBaseline = {mk::cpu::kQuantProducts,
                                                       mk::cpu::dequantize};
