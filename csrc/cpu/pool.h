// The threads that CPU ops share.
//
// A job is a number of chunks that threads claim one by one from a counter. The calling thread
// claims as well, and waits at the end only for chunks that are being worked on: when another
// process holds a core, the caller just takes more of them. Idle workers spin for a few tens of
// microseconds (the next op of a model usually follows at once), then block.
//
// One job runs at a time. A caller that finds the pool busy works its job off alone. A forked child
// starts with an empty pool. Workers are never joined: they hold nothing that exit must wait for.
#pragma once

#include <atomic>
#include <cstdint>

namespace mk::cpu {

// Hands out the chunks 0 ... count-1 of one job, to any number of threads.
class Chunks {
  public:
    explicit Chunks(int64_t count) : count_(count) {}

    // The next chunk; -1 when none is left.
    int64_t next() {
        const int64_t chunk = next_.fetch_add(1, std::memory_order_relaxed);
        return chunk < count_ ? chunk : -1;
    }

  private:
    const int64_t count_;
    std::atomic<int64_t> next_{0};
};

// What every thread of a job runs, once: claim chunks until none is left. A worker may return
// without having claimed any; the caller may not.
using Job = void (*)(void* context, Chunks& chunks);

// Run a job of `num_chunks` chunks on up to `num_threads` threads, the caller's among them.
// Returns when all chunks are done, whose writes the caller then sees.
void parallel(int num_threads, int64_t num_chunks, Job job, void* context);

}  // namespace mk::cpu
