// The threads that CPU ops share.
//
// A job is a number of chunks, of which each thread has a range to itself: neighbours in memory are
// read by one core, in order. Threads claim chunks one by one, of their own range first, then of
// the others'. The calling thread claims as well, and waits at the end only for chunks that are
// being worked on: when another process holds a core, the caller just takes more of them. Idle
// workers spin for a few tens of microseconds (the next op of a model usually follows at once),
// then block.
//
// One job runs at a time. A caller that finds the pool busy works its job off alone. A forked child
// starts with an empty pool. Workers are never joined: they hold nothing that exit must wait for.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

namespace mk::cpu {

constexpr int kMaxThreads = 256;

// The chunks 0 ... count-1 of one job, in a range for each of up to kMaxThreads threads.
class Ranges {
  public:
    Ranges(int64_t count, int num_threads) : num_threads_(num_threads) {
        for (int i = 0; i < num_threads; ++i) {
            new (&ranges_[i]) Range{{count * i / num_threads}, count * (i + 1) / num_threads};
        }
    }

    int num_threads() const { return num_threads_; }

    // The next chunk of a thread's range; -1 when none is left.
    int64_t next(int thread) {
        Range& range = ranges_[thread];
        const int64_t chunk = range.next.fetch_add(1, std::memory_order_relaxed);
        return chunk < range.end ? chunk : -1;
    }

  private:
    struct alignas(64) Range {
        std::atomic<int64_t> next;
        int64_t end;
    };
    const int num_threads_;
    union {
        Range ranges_[kMaxThreads];  // of which num_threads_ are there
    };
};

// Hands out chunks to one thread.
class Chunks {
  public:
    Chunks(Ranges& ranges, int thread) : ranges_(ranges), thread_(thread) {}

    // The next chunk; -1 when none is left.
    int64_t next() {
        for (; left_ > 0; --left_, thread_ = (thread_ + 1) % ranges_.num_threads()) {
            const int64_t chunk = ranges_.next(thread_);
            if (chunk >= 0) return chunk;
        }
        return -1;
    }

  private:
    Ranges& ranges_;
    int thread_;                        // whose range is next,
    int left_ = ranges_.num_threads();  // of so many
};

// What every thread of a job runs, once: claim chunks until none is left. A worker may return
// without having claimed any; the caller may not.
using Job = void (*)(void* context, Chunks& chunks);

// Run a job of `num_chunks` chunks on up to `num_threads` threads, the caller's among them.
// Returns when all chunks are done, whose writes the caller then sees.
void parallel(int num_threads, int64_t num_chunks, Job job, void* context);

}  // namespace mk::cpu
