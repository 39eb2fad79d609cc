// The machine that executes a decoded kernel: warps, CTAs, barriers, memory, counters.
//
// A virtual register is a row of 32 lanes (uint32_t for 8 to 32-bit types, uint64_t for 64-bit
// types, two 64-bit rows for .b128); a predicate is one lane mask at the start of its row. All rows
// of a warp lie in one array, and immediates and special registers are rows as well, so an operand
// is always just an offset into it.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "ptx.h"

namespace emu {

constexpr int kLanes = 32;
using Mask = uint32_t;
constexpr Mask kAllLanes = ~0u;
constexpr uint32_t kNone = ~0u;

// Generic addresses of shared and local memory; host addresses never reach so high.
constexpr uint64_t kSharedWindow = 1ull << 56;
constexpr uint64_t kLocalWindow = 2ull << 56;
constexpr uint64_t window_of(uint64_t address) { return address & (0xffull << 56); }

struct Dim3 {
    uint32_t x = 1, y = 1, z = 1;
    uint64_t count() const { return static_cast<uint64_t>(x) * y * z; }
};

struct Device {
    std::string name;
    int capability;  // 80, 89, 90, 100
    int sms;
    uint32_t smem_per_cta;  // opt-in maximum
    uint32_t smem_per_sm;
    int max_warps_per_sm;
};
const Device* find_device(const std::string& target);

// What went wrong, thrown by an instruction; the warp adds where.
struct Fault {
    std::string kind;
    std::string message;
    int lane = -1;
};
[[noreturn]] void fault(const char* kind, std::string message, int lane = -1);
std::string hex(uint64_t value);

// ---- decoded program ------------------------------------------------------------------------

enum class Class : uint8_t {
    fp32,
    fp64,
    fp16,
    mufu,
    alu,
    cvt,
    mma,
    shared,
    global,
    copy,
    local,
    sync,
    control,
    mov,
    internal,  // added by the decoder (width adaption, layout jumps); not counted
};
constexpr int kClasses = static_cast<int>(Class::internal);
extern const char* const kClassNames[kClasses];

struct Warp;
struct Instr;
using Handler = void (*)(Warp&, const Instr&, Mask);

// Definedness of registers that may be read before they are written, see Warp::propagate.
struct Taint {
    std::vector<uint32_t> sources;
    std::vector<uint32_t> results;
    bool consumes = false;  // an undefined source is an error here, not passed on
    bool crosses_lanes = false;
};

struct Instr {
    Handler fn = nullptr;
    std::array<uint32_t, 6> op{};    // rows; the result first
    const uint32_t* list = nullptr;  // rows of vector operands
    int64_t imm = 0;
    uint32_t target = 0;     // branch: pc; call: index into Program::calls
    uint32_t guard = kNone;  // row of @p
    bool guard_negated = false;
    Class cls = Class::alu;
    uint8_t a = 0, b = 0, c = 0, d = 0;  // small parameters, meaning per family
    uint32_t statement = 0;              // index into Program::statements
    const Taint* taint = nullptr;
};

enum class Special : uint8_t {
    tid_x,
    tid_y,
    tid_z,
    ntid_x,
    ntid_y,
    ntid_z,
    ctaid_x,
    ctaid_y,
    ctaid_z,
    nctaid_x,
    nctaid_y,
    nctaid_z,
    laneid,
    warpid,
    nwarpid,
    smid,
    nsmid,
    gridid,
    lanemask_eq,
    lanemask_le,
    lanemask_lt,
    lanemask_ge,
    lanemask_gt,
    dynamic_smem_size,
    total_smem_size,
    aggr_smem_size,
    reserved_smem,
    clusterid_x,
    clusterid_y,
    clusterid_z,
    nclusterid_x,
    nclusterid_y,
    nclusterid_z,
    cluster_ctaid_x,
    cluster_ctaid_y,
    cluster_ctaid_z,
    cluster_nctaid_x,
    cluster_nctaid_y,
    cluster_nctaid_z,
    cluster_ctarank,
    cluster_nctarank,
    is_explicit_cluster,
    warp_size,
    param_base,
};

struct ParamSlot {
    uint32_t offset;
    uint32_t bytes;
};

struct CallTarget {
    uint32_t entry_pc = 0;
    // Bytes to copy between the caller's and the callee's parameter slots in local memory.
    struct Copy {
        uint32_t from, to, bytes;
    };
    std::vector<Copy> arguments;
    std::vector<Copy> results;
};

struct Program {
    std::string name;
    const Module* module = nullptr;
    const Function* entry = nullptr;
    std::vector<Instr> code;
    std::vector<const Statement*> statements;
    std::vector<std::unique_ptr<uint32_t[]>> lists;
    std::vector<std::unique_ptr<Taint>> taints;
    std::vector<CallTarget> calls;
    std::map<int, uint32_t> function_pc;            // functions laid out here: index -> pc
    std::vector<uint32_t> block_start;              // first pc of every block, ascending
    std::vector<std::vector<uint32_t>> successors;  // per block
    uint32_t register_words = 0;
    uint32_t constants_at = 0;  // where the constant rows start
    std::vector<uint32_t> constants;
    std::vector<std::pair<Special, uint32_t>> specials;
    std::vector<ParamSlot> params;
    std::map<uint32_t, std::string> row_names;  // of registers with a Taint
    uint32_t param_bytes = 0;
    uint32_t local_bytes = 0;
    uint32_t static_smem = 0;
    uint32_t dynamic_smem_at = 0;
    int granule_shift = 2;  // log2 of the narrowest shared-memory access: the race detector's unit

    // May control flow get from one pc to another?
    bool reaches(uint32_t from_pc, uint32_t to_pc) const;
    uint32_t block_of(uint32_t pc) const;
};

// Decodes `entry` and everything it calls. `addresses` are those of the module's global variables.
std::unique_ptr<Program> decode(const Module& module, int entry,
                                const std::vector<uint64_t>& addresses, const Device& device);

// ---- memory -----------------------------------------------------------------------------------

struct Region {
    uint64_t base = 0;
    uint64_t bytes = 0;
    std::string name;
    bool writable = true;
    std::shared_ptr<uint8_t[]> valid;    // one flag a byte: has it been written? null: all have
    std::shared_ptr<uint8_t[]> touched;  // per 32-byte sector, of one launch: 1 read, 2 written
};

struct Counters {
    uint64_t issued[kClasses] = {};
    uint64_t lanes[kClasses] = {};
    uint64_t read_requests = 0, read_sectors = 0, read_bytes = 0, unique_read_sectors = 0;
    uint64_t write_requests = 0, write_sectors = 0, write_bytes = 0, unique_write_sectors = 0;
    uint64_t shared_requests = 0, shared_wavefronts = 0, shared_wavefronts_min = 0;

    void add(const Counters& other);
};

// Shared memory of a CTA with, for each granule of it, who wrote and who read it last, and when.
// "When" is the CTA's logical time, which each synchronisation advances; `seen[w][v]` is the time
// up to which warp w has synchronised with warp v, so an access by v at time t is ordered before
// w's if t < seen[w][v].
class SharedMemory {
  public:
    static constexpr uint32_t kPending = ~0u;  // written by an asynchronous copy nobody waited for
    static constexpr uint16_t kAtomic = 1 << 15;

    struct Options {
        bool allow_uninitialised = false;
        bool check_races = true;
    };
    void reset(uint32_t bytes, int granule_shift, int warps, Options options);
    uint32_t size() const { return size_; }
    uint8_t* data() { return data_.data(); }

    enum class Access : uint8_t { read, write, atomic, strong_read, strong_write, async_write };
    // Checks one lane's access and records it. Bounds and alignment were checked before. `value`
    // is what a write is about to store: writing what is there already harms nobody.
    void access(Access kind, int warp, int lane, uint32_t address, uint32_t bytes,
                const uint8_t* value = nullptr);
    // The same for the lanes of a mask, without values.
    void access(Access kind, int warp, Mask lanes, const uint64_t* addresses, uint32_t bytes);
    void land(int warp, int lane, uint32_t address, uint32_t bytes);  // an async_write arrives

    // Synchronisation: `arrive` publishes what `warp` did into `clock`, `join` acquires it.
    using Clock = std::vector<uint32_t>;
    void arrive(int warp, Clock& clock);
    void join(int warp, const Clock& clock);
    void sync_warp(int warp) { seen(warp, warp) = ++time_; }

  private:
    uint32_t& seen(int warp, int other) { return seen_[warp * warps_ + other]; }
    // When `warp` read granule g and, if g is a multiple of 4, the three after it: [g / 4][warp][g
    // % 4].
    uint32_t* reads_of(int warp, uint32_t g) {
        return &read_time_[((g >> 2) * static_cast<uint32_t>(warps_) +
                            static_cast<uint32_t>(warp)) *
                               4 +
                           (g & 3)];
    }
    void slow_check(Access kind, int warp, int lane, uint32_t granule, const uint8_t* value);
    void check_readers(int warp, int lane, uint32_t first, uint32_t last);

    std::vector<uint8_t> data_;
    uint32_t size_ = 0;
    int shift_ = 2;
    int warps_ = 0;
    uint32_t granules_ = 0;
    uint32_t time_ = 0;
    uint32_t start_ = 1;  // times before it are of earlier CTAs: never in this one
    Options options_;
    std::vector<uint32_t> seen_;
    std::vector<uint32_t> write_time_;
    std::vector<uint16_t> writer_;     // warp << 5 | lane
    std::vector<uint32_t> read_time_;  // see reads_of
    std::map<uint32_t, Clock> flags_;  // clocks carried by atomics and strong accesses
};

// ---- execution --------------------------------------------------------------------------------

enum class Wait : uint8_t {
    none,
    peers,  // for lanes of the same warp to come to the same instruction
    cta_barrier,
    warp_barrier,
};

// Lanes of a warp at the same pc with the same call stack.
struct Group {
    uint32_t pc = 0;
    Mask lanes = 0;
    uint32_t frame = 0;  // index into Warp::frames
    uint32_t spins = 0;  // backward branches while others could run
    uint32_t penalty = 0;
    Wait wait = Wait::none;
    uint32_t wait_id = 0;  // barrier number, or the mask of a warp barrier
};

struct Frame {
    uint32_t parent = 0;
    uint32_t return_pc = 0;
    uint32_t call = 0;
    uint32_t depth = 0;
};

struct AsyncCopy {
    const uint8_t* source;
    uint32_t destination;
    uint32_t group;
    uint8_t lane, bytes, source_bytes;
};

struct InstrCount {
    uint64_t issued = 0, lanes = 0;
};

struct Cta;
struct Launch;

struct Warp {
    uint32_t* regs = nullptr;
    Cta* cta = nullptr;
    Launch* launch = nullptr;
    Counters* counters = nullptr;
    InstrCount* counts = nullptr;
    const Instr* code = nullptr;

    // The running group; `groups[current]` is stale while it runs.
    uint32_t pc = 0;
    Mask active = 0;
    uint32_t limit = ~0u;  // leave the inner loop at this pc; 0 asks to leave at once
    uint32_t frame = 0;
    uint32_t budget = 0;

    Mask live = 0;   // lanes that have not exited
    Mask carry = 0;  // condition code of add.cc and its kin
    int index = 0;
    size_t current = 0;
    size_t region_hint = 0;
    std::vector<Group> groups;
    std::vector<Frame> frames;
    std::vector<uint32_t> defined;  // per row: lanes that hold a value, where Taint is used
    std::vector<uint8_t> local;     // [lane][local_bytes]
    std::vector<AsyncCopy> copies;
    std::array<uint32_t, kLanes> committed{};  // cp.async groups closed so far, by lane
    std::vector<uint32_t> storage;

    template <class T>
    T* row(uint32_t offset) {
        return reinterpret_cast<T*>(regs + offset);
    }
    Mask& predicate(uint32_t offset) { return regs[offset]; }

    bool done() const { return groups.empty(); }
    bool runnable() const;
    void run(uint32_t max_instructions);
    void diverge(Mask lanes, uint32_t target);
    void exit_lanes(Mask lanes);
    void block(Wait wait, uint32_t id, bool repeat_instruction);
    // For instructions that want exactly `wanted` lanes together: true when they are here;
    // otherwise the group waits for those on their way, or the fault says who is missing.
    bool converged(Mask wanted, const char* what);
    void propagate(const Instr& in, Mask m);
    uint8_t* local_lane(int lane);

  private:
    bool select();
    void release_warp_barrier();
};

struct Barrier {
    uint32_t expected = 0;    // threads; 0: all of the CTA
    uint32_t arrived = 0;     // complete warps * 32
    std::vector<Mask> lanes;  // by warp: lanes that arrived
    SharedMemory::Clock clock;
    bool active = false;
    // bar.red: being gathered, and the outcome of the last one
    uint32_t popc = 0, result_popc = 0;
    bool all = true, any = false, result_all = true, result_any = false;
};

struct Cta {
    Launch* launch = nullptr;
    Dim3 id;
    uint64_t linear = 0;
    SharedMemory shared;
    std::vector<Warp> warps;
    std::array<Barrier, 16> barriers;
    std::minstd_rand rng;
    uint64_t instructions = 0;

    void start(Launch& launch, uint64_t linear, Counters& counters, InstrCount* counts);
    // Runs until done (true) or until about `slice` warp-instructions were executed.
    bool run(uint64_t slice);
    void barrier_arrive(Warp& warp, Mask lanes, uint32_t id, uint32_t threads, bool wait);
    void barrier_check(uint32_t id);
    bool finished() const;
    [[noreturn]] void stuck(const char* kind, const std::string& message) const;
};

struct LaunchConfig {
    Dim3 grid, block, cluster;
    uint32_t dynamic_smem = 0;
    uint64_t seed = 0;
    int threads = 0;  // host threads, 0: all
    SharedMemory::Options shared;
    uint64_t max_instructions = 1'000'000'000;  // warp-instructions of a CTA: more is a hang
};

struct Launch {
    const Program* program = nullptr;
    const Device* device = nullptr;
    LaunchConfig config;
    std::vector<uint8_t> params;
    std::vector<Region> regions;  // ascending
    std::atomic<bool> stop = false;

    // The region that holds [address, address + bytes), or null.
    Region* find(uint64_t address, uint64_t bytes, size_t& hint);
    [[noreturn]] void out_of_bounds(uint64_t address, uint64_t bytes, const char* what, int lane);
};

// Runs a grid; throws LaunchError with the report of the first fault.
struct LaunchError : std::runtime_error {
    using std::runtime_error::runtime_error;
    std::string kind;
};
Counters execute(Launch& launch, std::vector<InstrCount>* profile = nullptr);

}  // namespace emu
