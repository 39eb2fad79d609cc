// csrc/attention/attn_schedule.cuh on the CPU: the items of each cluster, for tests and for the
// modelled times. A warp's 32 lanes are contexts of one thread; at a function of the warp they
// meet.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>

using std::max, std::min;

#define __device__
#define __forceinline__ inline

// Of functions that the included headers declare, too.
struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};

namespace {

// Lanes run one after the other up to the next `meet`, where the last one applies the function.
class Warp {
  public:
    static constexpr int kLanes = 32;

    void run(const std::function<void()>& lane_program) {
        program = &lane_program;
        for (int lane = 0; lane < kLanes; ++lane) {
            getcontext(&lanes[lane]);
            lanes[lane].uc_stack = {stacks.get() + lane * kStackBytes, 0, kStackBytes};
            lanes[lane].uc_link = nullptr;
            makecontext(&lanes[lane], start, 0);
            is_started[lane] = false;
        }
        done = arrived = 0, lane = kLanes - 1;
        if (_setjmp(caller) == 0) next();
    }

    // What `combine` makes of all lanes' values, for this lane. All lanes must name the same one.
    template <class Combine>
    int64_t meet(const char* what, int64_t value, Combine combine) {
        const int self = lane;
        if (arrived++ == 0) name = what;
        if (name != what || done > 0) {
            std::fprintf(stderr, "lane %d: %s, others: %s\n", self, what, done ? "end" : name);
            std::abort();
        }
        values[self] = value;
        if (arrived == kLanes) {
            for (int i = 0; i < kLanes; ++i) results[i] = combine(values, i);
            arrived = 0;
        }
        if (_setjmp(places[self]) == 0) next();
        return results[self];
    }

    int lane;

  private:
    static constexpr size_t kStackBytes = 64 << 10;

    static void start();
    [[noreturn]] void next() {  // setcontext is a system call
        lane = (lane + 1) % kLanes;
        if (is_started[lane]) _longjmp(places[lane], 1);
        is_started[lane] = true;
        setcontext(&lanes[lane]);
        std::abort();
    }

    const std::function<void()>* program;
    ucontext_t lanes[kLanes];
    bool is_started[kLanes];
    jmp_buf caller, places[kLanes];
    std::unique_ptr<char[]> stacks{new char[kLanes * kStackBytes]};
    int arrived, done;
    const char* name;
    int64_t values[kLanes], results[kLanes];
};

Warp warp;

void Warp::start() {
    (*warp.program)();
    if (++warp.done == kLanes) _longjmp(warp.caller, 1);
    warp.next();
}

struct {
    struct {
        operator unsigned() const { return warp.lane; }
    } x;
} threadIdx;

int __popc(unsigned x) { return __builtin_popcount(x); }
int __clz(int x) { return x ? __builtin_clz(x) : 32; }

unsigned __ballot_sync(unsigned, bool value) {
    return warp.meet("ballot", value, [](const int64_t* values, int) {
        int64_t mask = 0;
        for (int i = 0; i < Warp::kLanes; ++i) mask |= values[i] << i;
        return mask;
    });
}
bool __any_sync(unsigned, bool value) {
    return warp.meet("any", value, [](const int64_t* values, int) {
        return *std::max_element(values, values + Warp::kLanes);
    });
}
int __reduce_max_sync(unsigned, int value) {
    return warp.meet("max", value, [](const int64_t* values, int) {
        return *std::max_element(values, values + Warp::kLanes);
    });
}
int __reduce_add_sync(unsigned, int value) {
    return warp.meet("add", value, [](const int64_t* values, int) {
        return std::accumulate(values, values + Warp::kLanes, int64_t{0});
    });
}
unsigned __reduce_min_sync(unsigned, unsigned value) {
    return warp.meet("min", value, [](const int64_t* values, int) {
        return *std::min_element(values, values + Warp::kLanes);
    });
}
int __shfl_sync(unsigned, int value, int from) {
    return warp.meet("shfl", value, [=](const int64_t* values, int) { return values[from]; });
}
int __shfl_up_sync(unsigned, int value, int by) {
    return warp.meet("shfl_up", value, [=](const int64_t* values, int lane) {
        return values[lane < by ? lane : lane - by];
    });
}

}  // namespace

#define MK_SM 90
#include "attention/attn_schedule.cuh"

// The items of a cluster, {sequence, unit, head or pair of heads} each, up to `most`; how many
// there are. `params`: its pointers are to the host's memory, where the kernel's are to the
// device's.
extern "C" int attn_schedule(const mk_attention_params* params, int cluster, int num_clusters,
                             int32_t (*items)[3], int most) {
    mk::AttnPrefillSm90Args args{};
    args.p = *params;
    const auto [heads, rows] = mk::attn_units(params->num_q_heads, params->num_kv_heads);
    args.num_head_units = heads, args.unit_rows = rows;
    int count = 0;
    warp.run([&] {
        mk::AttnSchedule schedule(args, cluster, num_clusters);
        mk::AttnSchedule::Item item;
        int n = 0;
        for (; schedule.next(item); ++n) {
            if (n >= most) continue;
            items[n][0] = item.sequence, items[n][1] = item.unit, items[n][2] = item.head_unit;
        }
        count = n;
    });
    return count;
}
