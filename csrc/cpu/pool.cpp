#include "cpu/pool.h"

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace mk::cpu {
namespace {

constexpr int kMaxWorkers = kMaxThreads - 1;
// How long a thread waits for another before it gives its core away: it spins, then yields to
// whoever else wants to run, then (a worker) sleeps. Decoding a token of a small model calls here
// every 50 to 400 us, and waking a sleeper takes about 50.
constexpr std::chrono::microseconds kSpin{20};
constexpr std::chrono::microseconds kYield{500};

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Spins, then yields until done() or until kYield has passed; returns done().
template <class Done>
bool wait_briefly(Done done) {
    const auto start = std::chrono::steady_clock::now();
    std::chrono::steady_clock::duration waited{};
    do {
        for (int i = 0; i < 16; ++i) {
            if (done()) return true;
            pause();
        }
        waited = std::chrono::steady_clock::now() - start;
        if (waited > kSpin) std::this_thread::yield();
    } while (waited < kYield);
    return done();
}

class Pool {
  public:
    // False when another job is running: nothing was done.
    bool run(int num_workers, Ranges& ranges, Job job, void* context) {
        const std::unique_lock<std::mutex> running(running_, std::try_to_lock);
        if (!running) return false;
        start_workers(num_workers);
        ranges_ = &ranges;
        job_ = job;
        context_ = context;
        invited_ = num_workers;
        open_.store(true);
        round_.fetch_add(1);
        if (asleep_.load() > 0) {
            {
                const std::lock_guard<std::mutex> lock(sleep_);
            }
            wake_.notify_all();
        }
        Chunks chunks(ranges, 0);
        job(context, chunks);
        // A worker enters by inside_ + 1 and then looks at open_; here open_ is cleared before
        // inside_ is read. So either it sees the closed door, or it is waited for.
        open_.store(false);
        while (!wait_briefly([this] { return inside_.load() == 0; })) {
        }
        return true;
    }

  private:
    void start_workers(int count) {
        for (; num_workers_ < count && num_workers_ < kMaxWorkers; ++num_workers_) {
            // Signals are for the threads of the program (Python's Ctrl-C).
            sigset_t all, before;
            sigfillset(&all);
            pthread_sigmask(SIG_SETMASK, &all, &before);
            bool started = true;
            try {
                std::thread([this, index = num_workers_, seen = round_.load()] {
                    work(index, seen);
                }).detach();
            } catch (const std::system_error&) {
                started = false;  // the others do its share
            }
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            if (!started) return;
        }
    }

    [[noreturn]] void work(int index, uint64_t seen) {
        for (;;) {
            const auto changed = [&] { return round_.load() != seen; };
            if (!wait_briefly(changed)) {
                std::unique_lock<std::mutex> lock(sleep_);
                asleep_.fetch_add(1);
                wake_.wait(lock, changed);
                asleep_.fetch_sub(1);
            }
            seen = round_.load();
            inside_.fetch_add(1);
            if (open_.load() && index < invited_) {
                Chunks chunks(*ranges_, index + 1);
                job_(context_, chunks);
            }
            inside_.fetch_sub(1);
        }
    }

    std::mutex running_;  // held while a job runs
    int num_workers_ = 0;

    // The job, written while no worker is inside.
    Ranges* ranges_ = nullptr;
    Job job_ = nullptr;
    void* context_ = nullptr;
    int invited_ = 0;  // workers 0 ... invited_-1 take part

    std::atomic<uint64_t> round_{0};  // counts jobs
    std::atomic<bool> open_{false};   // a job may be entered
    std::atomic<int> inside_{0};      // workers that may be looking at the job
    std::atomic<int> asleep_{0};
    std::mutex sleep_;
    std::condition_variable wake_;
};

// Lives in static storage with no destructor: workers outlast static destruction at exit.
alignas(Pool) unsigned char storage[sizeof(Pool)];

Pool& pool() {
    static Pool* const instance = [] {
        // The child has none of the threads, and perhaps locks that one of them held.
        pthread_atfork(nullptr, nullptr, [] { new (storage) Pool; });
        return new (storage) Pool;
    }();
    return *instance;
}

}  // namespace

void parallel(int num_threads, int64_t num_chunks, Job job, void* context) {
    if (num_threads > num_chunks) num_threads = static_cast<int>(num_chunks);
    if (num_threads > 1) {
        Ranges ranges(num_chunks, num_threads);
        if (pool().run(num_threads - 1, ranges, job, context)) return;
    }
    Ranges all(num_chunks, 1);
    Chunks chunks(all, 0);
    job(context, chunks);
}

}  // namespace mk::cpu
