// Modules, the registry of memory regions, and launching: what the C API (api.cpp) and the driver
// API (driver.cpp) share.
#pragma once

#include <span>

#include "machine.h"

namespace emu {

// Memory that kernels may touch. Host memory is device memory: an address is its own.
class RegionTable {
  public:
    static RegionTable& instance();
    void add(Region region);
    bool remove(uint64_t base);
    // The region that holds an address, or nothing.
    std::optional<Region> at(uint64_t address);
    // All regions and `more`, ascending, overlapping ones joined.
    std::vector<Region> snapshot(std::span<const Region> more);

  private:
    std::mutex mutex_;
    std::multimap<uint64_t, Region> regions_;  // by base; views may share one
};

Region make_region(void* base, uint64_t bytes, std::string name, bool track_initialised = false);

struct Kernel;

constexpr uint32_t kFatbinMagic = 0xba55ed50;  // its first word

using Image = std::shared_ptr<const std::vector<uint8_t>>;

class LoadedModule {
  public:
    // PTX text, or one or several fatbins in a row. Of their texts a kernel is parsed when it is
    // asked for, and nothing else: a syntax tree takes many times their bytes. Throws PtxError.
    LoadedModule(Image image, const Device& device);
    ~LoadedModule();
    LoadedModule(const LoadedModule&) = delete;

    Kernel* kernel(const std::string& name);  // null if there is none
    std::vector<std::string> kernel_names();
    // Address and size of a module variable; {0, 0} if there is none.
    std::pair<uint64_t, uint64_t> variable(const std::string& name);
    const Device& device() const { return device_; }

  private:
    struct Unit {  // one PTX text with its variables
        std::string_view text;
        bool is_parsed = false;
        Module module;  // without entries, in a fatbin
        std::vector<std::unique_ptr<uint64_t[]>> storage;
        std::vector<uint64_t> addresses;  // by variable; 0 for those that have none of their own
        std::pair<uint64_t, uint64_t> variable(const std::string& name) const;
    };
    Module parse(std::string_view text) const;
    void prepare(Unit& unit);
    void place_variables(Unit& unit);

    const Device& device_;
    Image image_;  // that the texts are in
    bool is_fatbin_ = false;
    std::vector<std::unique_ptr<Unit>> units_;
    std::mutex mutex_;
    std::map<std::string, std::unique_ptr<Kernel>> kernels_;
};

struct Kernel {
    LoadedModule* module;
    Module syntax;      // of a fatbin's text, with this one entry: its head
    std::string words;  // of its statements, likewise
    std::unique_ptr<Program> program;
    uint32_t max_dynamic_smem = 48 << 10;  // cuFuncSetAttribute raises it
    std::vector<InstrCount> profile;       // of the last launch
    std::mutex mutex;
};

// Raised for a launch that a real driver would refuse.
struct BadLaunch : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// params[i] points to the bytes of parameter i. Throws BadLaunch or LaunchError.
Counters launch(Kernel& kernel, LaunchConfig config, void* const* params,
                std::span<const Region> regions);

// All counters as numbers, in the order of CLASSES and MEMORY in __init__.py.
void write_counters(const Counters& counters, uint64_t* out);

// The PTX for a device: the text itself, or the best fit out of each fatbin. Throws PtxError if a
// fatbin has none.
std::vector<std::string_view> extract_ptx(std::span<const uint8_t> image, const Device& device);

}  // namespace emu
