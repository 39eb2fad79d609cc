// mk_cpu_linear_quant in plain C++, for any processor.
#include "cpu/vec_baseline.h"

namespace mk::cpu {
namespace {

// 16 x 32 bits.
struct Ints {
    static constexpr int kTileM = 2, kTileN = 1;

    uint32_t v[kLanes];

    // f(0) ... f(15)
    template <class F>
    static MK_INLINE Ints each(const F& f) {
        Ints a;
        for (int l = 0; l < kLanes; ++l) a.v[l] = f(l);
        return a;
    }
    static Ints set(int32_t a) {
        return each([&](int) { return static_cast<uint32_t>(a); });
    }
    static Ints load(const uint32_t* p) {
        return each([&](int l) { return p[l]; });
    }
    void store(uint32_t* p) const { __builtin_memcpy(p, v, sizeof v); }

    friend Ints operator+(const Ints& a, const Ints& b) {
        return each([&](int l) { return a.v[l] + b.v[l]; });
    }
    friend Ints operator&(const Ints& a, uint32_t b) {
        return each([&](int l) { return a.v[l] & b; });
    }
    friend Ints operator^(const Ints& a, uint32_t b) {
        return each([&](int l) { return a.v[l] ^ b; });
    }
    friend Ints operator|(const Ints& a, const Ints& b) {
        return each([&](int l) { return a.v[l] | b.v[l]; });
    }
    friend Ints operator<<(const Ints& a, int n) {
        return each([&](int l) { return a.v[l] << n; });
    }
    friend Ints operator>>(const Ints& a, int n) {
        return each([&](int l) { return a.v[l] >> n; });
    }
    static Ints and_or(const Ints& a, uint32_t mask, const Ints& b) { return (a & mask) | b; }

    static Ints dot(const Ints& acc, const Ints& w, const Ints& x) {
        return each([&](int l) {
            const int32_t even = static_cast<int16_t>(w.v[l]) * static_cast<int16_t>(x.v[l]);
            const int32_t odd =
                static_cast<int16_t>(w.v[l] >> 16) * static_cast<int16_t>(x.v[l] >> 16);
            return acc.v[l] + static_cast<uint32_t>(even) + static_cast<uint32_t>(odd);
        });
    }
    Vec to_float() const {
        return Vec::each([&](int l) { return static_cast<float>(static_cast<int32_t>(v[l])); });
    }
    Vec half() const {
        return Vec::each([&](int l) { return widen(F16{static_cast<uint16_t>(v[l])}); });
    }
    static Ints gather(const uint8_t* const* rows, int64_t offset) {
        Ints a;
        for (int r = 0; r < kLanes; ++r) __builtin_memcpy(a.v + r, rows[r] + offset, 4);
        return a;
    }
    static void columns(const uint8_t* const* rows, int64_t offset, Ints (&out)[4]) {
        for (int r = 0; r < kLanes; ++r) {
            uint32_t words[4];
            __builtin_memcpy(words, rows[r] + offset, sizeof words);
            for (int j = 0; j < 4; ++j) out[j].v[r] = words[j];
        }
    }
};

}  // namespace
}  // namespace mk::cpu

#include "cpu/quant_kernels.h"

const mk::cpu::QuantKernels mk::cpu::kQuantBaseline = mk::cpu::kQuantKernels;
