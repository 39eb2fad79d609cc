// What host code of the CPU ops shares: memory of a thread, and the mode of its floating point.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace mk::cpu {

// 64-byte aligned memory of a thread, kept from call to call.
class Buffer {
  public:
    ~Buffer() { std::free(data_); }

    // Room for `bytes`, contents undefined; NULL when there is no memory.
    void* reserve(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 63) / 64 * 64;
            data_ = std::aligned_alloc(64, size_);
            if (!data_) size_ = 0;
        }
        return data_;
    }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

// Default rounding, and subnormals as numbers or as zeros, whatever the calling thread has set.
class DefaultFloatMode {
  public:
#if defined(__x86_64__)
    explicit DefaultFloatMode(bool flush = false) : before_(__builtin_ia32_stmxcsr()) {
        __builtin_ia32_ldmxcsr(flush ? 0x9fc0 : 0x1f80);
    }
    ~DefaultFloatMode() { __builtin_ia32_ldmxcsr(before_); }

  private:
    const unsigned before_;
#else
    explicit DefaultFloatMode(bool = false) {}
#endif
};

}  // namespace mk::cpu
