// Work of an op, handed out to threads in chunks. For host code: not to be compiled per
// instruction set.
#pragma once

#include "cpu/memory.h"
#include "cpu/pool.h"
#include "launch/op.h"

namespace mk::cpu {

inline mk_status check_options(const mk_cpu_options* options) {
    MK_REQUIRE(options, MK_ERR_NULL, "options is NULL");
    MK_REQUIRE(1 <= options->num_threads && options->num_threads <= 256, MK_ERR_VALUE,
               "num_threads must be 1 ... 256, got %d", options->num_threads);
    return MK_OK;
}

inline mk_status check_cpu_dtype(int32_t dtype) {
    MK_REQUIRE(dtype == MK_BF16 || dtype == MK_F16 || dtype == MK_F32, MK_ERR_DTYPE,
               "dtype must be MK_BF16 (1), MK_F16 (2) or MK_F32 (3), got %d", dtype);
    return MK_OK;
}

// Element i of an array of MK_I32 or MK_I64.
inline int64_t index_at(const void* indices, int32_t dtype, int64_t i) {
    return dtype == MK_I64 ? static_cast<const int64_t*>(indices)[i]
                           : static_cast<const int32_t*>(indices)[i];
}

// Scratch of the calling thread, kept for its next calls; NULL when there is no memory.
inline void* thread_memory(size_t bytes) {
    thread_local Buffer buffer;
    return buffer.reserve(bytes ? bytes : 1);
}

// Runs f(chunk, scratch) for every chunk, with `bytes` of scratch for each thread. False, with
// nothing done, if there is none for the caller.
template <class F>
bool for_chunks(int num_threads, int64_t num_chunks, size_t bytes, const F& f) {
    struct Context {
        const F& f;
        size_t bytes;
    } context{f, bytes};
    if (!thread_memory(bytes)) return false;
    parallel(
        num_threads, num_chunks,
        [](void* opaque, Chunks& chunks) {
            const Context& own = *static_cast<Context*>(opaque);
            void* const scratch = thread_memory(own.bytes);
            if (!scratch) return;  // a worker without memory: the others do its share
            const DefaultFloatMode mode;
            for (int64_t c; (c = chunks.next()) >= 0;) own.f(c, scratch);
        },
        &context);
    return true;
}

}  // namespace mk::cpu
