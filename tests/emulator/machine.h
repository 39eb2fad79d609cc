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
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "ptx.h"
#include "shared_memory.h"

namespace emu {

constexpr int kLanes = 32;
constexpr Mask kAllLanes = ~0u;
constexpr uint32_t kNone = ~0u;

// Generic addresses of shared and local memory; host addresses never reach so high.
constexpr uint64_t kSharedWindow = 1ull << 56;
constexpr uint64_t kLocalWindow = 2ull << 56;
// Shared addresses have the rank of the CTA in its cluster in bits 24 and up.
constexpr int kRankShift = 24;
constexpr uint32_t kOffsetMask = (1u << kRankShift) - 1;
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
struct LaunchError : std::runtime_error {
    using std::runtime_error::runtime_error;
    std::string kind;
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

// Registers (as row / 32) that a wgmma may be using when an instruction runs, see hazards.h.
struct RegisterHazard {
    std::vector<uint32_t> reads, writes;
    std::vector<std::pair<uint32_t, uint32_t>> moves;  // to, from
    std::vector<uint32_t> touches;  // written, with no wgmma.fence before the wgmma that uses them
};

// Definedness of registers that may be read before they are written, see Warp::propagate.
struct Taint {
    std::vector<uint32_t> sources;
    std::vector<uint32_t> results;
    bool consumes = false;  // an undefined source is an error here, not passed on
    bool crosses_lanes = false;
    std::unique_ptr<RegisterHazard> hazard;  // registers that a wgmma may be using
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
    shared_base,  // the CTA's rank in its cluster, in bits 24 and up
    param_base,
    shared_base_wide,
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
    std::vector<StatementText> statements;
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
    std::map<uint32_t, std::string> row_names;    // of registers with a Taint
    std::map<uint32_t, std::string> wgmma_names;  // by row / 32, in programs with wgmma
    uint32_t param_bytes = 0;
    uint32_t local_bytes = 0;
    uint32_t static_smem = 0;
    uint32_t dynamic_smem_at = 0;
    bool tracks_undefined = false;
    bool async = false;     // has mbarriers, bulk copies or wgmma
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
    uint64_t between_mmas = 0;  // issued, without mov, by warps with no wgmma under way after one

    void add(const Counters& other);
};

// ---- execution --------------------------------------------------------------------------------

enum class Wait : uint8_t {
    none,
    peers,  // for lanes of the same warp to come to the same instruction
    cta_barrier,
    warp_barrier,
    mbarrier,  // for a phase to end: polling, so it may also give up
    cluster_barrier,
    warpgroup,  // for the other warps of the warpgroup to issue their part of a wgmma
    registers,  // for setmaxnreg.dec of other warps
};

// Lanes of a warp at the same pc with the same call stack.
struct Group {
    uint32_t pc = 0;
    Mask lanes = 0;
    uint32_t frame = 0;  // index into Warp::frames
    uint32_t spins = 0;  // backward branches while others could run
    uint32_t penalty = 0;
    Wait wait = Wait::none;
    uint32_t wait_id = 0;    // barrier number, the mask of a warp barrier, or an mbarrier's address
    bool timed_out = false;  // the wait for an mbarrier has given up
};

struct Frame {
    uint32_t parent = 0;
    uint32_t return_pc = 0;
    uint32_t call = 0;
    uint32_t depth = 0;
};

struct AsyncCopy {
    uint32_t number;  // of the lane, from 0
    const uint8_t* source;
    uint32_t destination;
    uint32_t group;
    uint8_t lane, bytes, source_bytes;
};

// A bulk copy out of shared memory. The bytes are read at once, as what would change them later is
// reported; what they do lands when the group was waited for, at the latest when the CTA ends.
struct BulkStore {
    uint32_t group;   // of the lane
    uint32_t number;  // of the warp's reader
    uint8_t lane;
    bool read_over = false;
    std::function<void()> land;
};

struct InstrCount {
    uint64_t issued = 0, lanes = 0, between_mmas = 0;
};

// What a warp has issued of wgmma, counted in instructions from 1.
struct WgmmaState {
    uint32_t issued = 0, retired = 0;
    uint64_t is_between = 0;       // 1: the last one has retired
    uint32_t base = 0;             // what the warpgroup's reader had counted before
    bool waits = false;            // for the other warps to issue
    std::vector<uint32_t> groups;  // `issued` at each commit
    uint32_t fences = 0;           // executed
    uint64_t path = 0;             // of fence, commit_group and wait_group, up to here
    // By row / 32, sized in programs that need it: the wgmma that writes the register, and the
    // last one that reads it; `fences` when something else wrote it.
    std::vector<uint32_t> writes, reads, touched;
};

struct Cta;
struct Cluster;
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
    Mask early = 0;  // lanes that have not waited for earlier kernels (griddepcontrol)
    int index = 0;
    int agent = 0;  // in the clocks of the cluster
    size_t current = 0;
    size_t region_hint = 0;
    std::vector<Group> groups;
    std::vector<Frame> frames;
    std::vector<uint32_t> defined;  // per row: lanes that hold a value, where Taint is used
    std::vector<uint8_t> local;     // [lane][local_bytes]
    std::vector<AsyncCopy> copies;
    std::array<uint32_t, kLanes> issued_copies{};
    std::array<uint32_t, kLanes> committed{};  // cp.async groups closed so far, by lane
    std::vector<BulkStore> bulk_stores;
    std::array<uint32_t, kLanes> bulk_committed{};
    // Of fences, for relaxed arrivals and waits: what the last one released, whether it reaches the
    // cluster, and what waits have seen that the next one acquires.
    SharedMemory::Clock released, to_acquire;
    bool released_to_cluster = false;
    Mask cluster_arrived = 0;    // lanes between barrier.cluster.arrive and .wait
    Mask cluster_pending = 0;    // ... whose phase is not over
    uint32_t max_registers = 0;  // setmaxnreg; 0: as launched
    WgmmaState wgmma;
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
    void check_hazard(const RegisterHazard& hazard);
    uint8_t* local_lane(int lane);
    void land_copies(int lane, uint32_t count);  // cp.async: the lane's first `count`
    LaunchError report(const Fault& fault, const Instr& in) const;

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

struct Mbarrier {
    int init_warp = 0, init_lane = 0;  // agent and lane that initialised it, and when
    uint32_t init_time = 0;
    bool fenced = false;         // by a fence.mbarrier_init of theirs
    uint32_t published = ~0u;    // ... by the end of this phase of barrier.cluster
    uint32_t expected = 0;       // arrivals of the next phase
    uint32_t pending = 0;        // arrivals that this phase still needs
    int32_t tx = 0;              // bytes that this phase still needs
    uint32_t phase = 0;          // phases that are over
    int engine = 0;              // of the copies that complete here
    bool copies = false;         // something was copied in this phase
    bool unseen_copies = false;  // ... in the last one, for which nobody has waited
    // What arrivals publish in this phase, and published up to the last one: to every wait, and
    // from other CTAs with .cluster scope to waits of that scope.
    SharedMemory::Clock clock, completed;
    SharedMemory::Clock remote, remote_completed;
    std::string describe(uint32_t address) const;
    void arrive(uint32_t count, int32_t bytes, uint32_t address, int lane);
};

// B of a wgmma, unpacked for the four warps of a warpgroup.
struct WgmmaOperand {
    uint32_t number = 0;
    uint64_t a_bits = 0, b_bits = 0;  // descriptors
    uint64_t path = 0;                // of the first warp (WgmmaState)
    std::vector<double> values;
    std::vector<uint32_t> pages;  // of shared memory, that it lies in
};
constexpr size_t kWgmmaSlots = 8;  // how far apart the warps may be and still share it

struct Cta {
    Launch* launch = nullptr;
    Cluster* cluster = nullptr;
    uint32_t rank = 0;  // in the cluster
    Dim3 id;
    uint64_t linear = 0;
    SharedMemory shared;
    std::vector<Warp> warps;
    std::array<Barrier, 16> barriers;
    std::map<uint32_t, Mbarrier> mbarriers;
    int mbarriers_made = 0;
    std::vector<uint32_t> visits;  // by agent of another CTA: when it was here last, + 1
    std::vector<std::array<WgmmaOperand, kWgmmaSlots>> wgmma_operands;  // by warpgroup

    void end();  // what the CTA that ran here left behind
    void start(Launch& launch, Cluster& cluster, uint32_t rank, Dim3 id, Counters& counters,
               InstrCount* counts);
    void barrier_arrive(Warp& warp, Mask lanes, uint32_t id, uint32_t threads, bool wait);
    void barrier_check(uint32_t id);
    // The barrier at an address; a fault if there is none.
    Mbarrier& mbarrier(const Warp& warp, uint32_t address, int lane);
    void fence_mbarrier_init(const Warp& warp, Mask lanes);
    void mbarrier_check(uint32_t address);                                 // is its phase over?
    void mbarrier_complete(uint32_t address, int engine, uint32_t bytes);  // complete_tx of a copy
    bool finished() const;
    void finish();  // its last warp has ended
    void check_visits() const;
};

// Work under way in the asynchronous proxy.
struct AsyncWork {
    uint64_t due;  // round of the scheduler
    std::function<void()> land;
    const Warp* warp;  // that issued it, for reports
    const Instr* instruction;
    const Cta* target;  // whose shared memory it writes
};

// The CTAs of a cluster (one, without clusters), which run interleaved on one host thread.
struct Cluster {
    Launch* launch = nullptr;
    std::vector<std::unique_ptr<Cta>> ctas;
    Clocks clocks;
    std::minstd_rand rng;
    uint64_t instructions = 0;
    uint64_t round = 0;
    std::vector<AsyncWork> under_way;
    // What may free somebody who waits: counted, to tell a deadlock from a slow poll.
    uint64_t progress = 0;
    SharedMemory::Clock clock, completed;  // of barrier.cluster: this phase, the last one

    void start(Launch& launch, uint64_t linear, Counters& counters, InstrCount* counts);
    // Runs until done (true) or until about `slice` warp-instructions were executed.
    bool run(uint64_t slice);
    bool finished() const;
    // Something that takes until some later round, or until nobody can go on without it.
    void defer(const Warp& warp, const Cta* target, std::function<void()> land);
    void wake(Wait wait, const Cta* cta, uint32_t id);
    void barrier_arrive(Warp& warp, Mask lanes, bool release);
    void barrier_check();
    [[noreturn]] void stuck(const char* kind, const std::string& message) const;

  private:
    void land_due();
    bool wake_pollers();
    uint64_t seen_progress_ = 0;
    int idle_rounds_ = 0;
};

struct LaunchConfig {
    Dim3 grid, block, cluster;
    uint32_t dynamic_smem = 0;
    bool is_dependent = false;  // programmatic stream serialization: earlier kernels may still run
    uint64_t seed = 0;
    int threads = 0;  // host threads, 0: all
    SharedMemory::Options shared;
    uint64_t max_instructions = 1'000'000'000;  // warp-instructions of a CTA: more is a hang
};

struct Launch {
    const Program* program = nullptr;
    const Device* device = nullptr;
    LaunchConfig config;
    struct alignas(128) ParamBlock {  // tensor maps are aligned
        uint8_t bytes[128];
    };
    std::vector<ParamBlock> param_storage;
    std::span<uint8_t> params;
    std::vector<Region> regions;  // ascending
    std::atomic<bool> stop = false;

    // The region that holds [address, address + bytes), or null.
    Region* find(uint64_t address, uint64_t bytes, size_t& hint);
    [[noreturn]] void out_of_bounds(uint64_t address, uint64_t bytes, const char* what, int lane);
};

// Runs a grid; throws LaunchError with the report of the first fault.
Counters execute(Launch& launch, std::vector<InstrCount>* profile = nullptr);

}  // namespace emu
