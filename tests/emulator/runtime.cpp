#include "runtime.h"

#include <algorithm>
#include <cstdlib>

namespace emu {

// ---- regions ------------------------------------------------------------------------------------

RegionTable& RegionTable::instance() {
    static RegionTable table;
    return table;
}

void RegionTable::add(Region region) {
    std::lock_guard lock(mutex_);
    const uint64_t base = region.base;
    regions_.emplace(base, std::move(region));
}

bool RegionTable::remove(uint64_t base) {
    std::lock_guard lock(mutex_);
    auto it = regions_.find(base);
    if (it == regions_.end()) return false;
    regions_.erase(it);
    return true;
}

std::optional<Region> RegionTable::at(uint64_t address) {
    std::lock_guard lock(mutex_);
    auto it = regions_.upper_bound(address);
    if (it == regions_.begin()) return std::nullopt;
    --it;
    if (address >= it->second.base + it->second.bytes) return std::nullopt;
    return it->second;
}

std::vector<Region> RegionTable::snapshot(std::span<const Region> more) {
    std::vector<Region> all(more.begin(), more.end());
    {
        std::lock_guard lock(mutex_);
        for (auto& [base, region] : regions_) all.push_back(region);
    }
    std::erase_if(all, [](const Region& r) { return r.bytes == 0; });
    std::sort(all.begin(), all.end(),
              [](const Region& a, const Region& b) { return a.base < b.base; });
    std::vector<Region> joined;
    for (Region& r : all) {
        if (joined.empty() || r.base >= joined.back().base + joined.back().bytes) {
            joined.push_back(std::move(r));
            continue;
        }
        Region& last = joined.back();  // views of one buffer
        if (r.name != last.name) last.name += "+" + r.name;
        if (r.base != last.base || r.bytes != last.bytes || r.valid != last.valid)
            last.valid = nullptr;
        last.bytes = std::max(last.base + last.bytes, r.base + r.bytes) - last.base;
        last.writable |= r.writable;
    }
    return joined;
}

Region make_region(void* base, uint64_t bytes, std::string name, bool track_initialised) {
    Region r;
    r.base = reinterpret_cast<uint64_t>(base);
    r.bytes = bytes;
    r.name = std::move(name);
    if (track_initialised) r.valid = std::shared_ptr<uint8_t[]>(new uint8_t[bytes]());
    return r;
}

// ---- modules ------------------------------------------------------------------------------------

namespace {

// sm_80 code runs on everything newer, sm_90a only on 9.0, sm_100f on 10.x.
void check_target(const std::string& target, const Device& device) {
    int number = 0;
    char suffix = 0;
    if (std::sscanf(target.c_str(), "sm_%d%c", &number, &suffix) < 1)
        throw PtxError("unknown .target " + target);
    const bool fits = suffix == 'a' ? number == device.capability
                      : suffix == 'f'
                          ? number / 10 == device.capability / 10 && number <= device.capability
                          : number <= device.capability;
    if (!fits)
        throw PtxError("wrong target: the module is for " + target + ", the device is sm_" +
                       std::to_string(device.capability));
}

constexpr std::string_view kEntry = ".entry ";

// The names of a text's entries, perhaps with others that a comment has.
std::vector<std::string_view> entries_of(std::string_view text) {
    std::vector<std::string_view> names;
    for (size_t at = 0; (at = text.find(kEntry, at)) != text.npos;) {
        at += kEntry.size();
        names.push_back(text.substr(at, text.find_first_of("( \t\n", at) - at));
    }
    return names;
}

// Where the braces that open first in text[at ...] are closed.
size_t end_of_body(std::string_view text, size_t at) {
    int depth = 0;
    for (; at < text.size(); ++at) {
        if (text[at] == '/' && text.substr(at, 2) == "//") at = text.find('\n', at);
        if (at == text.npos) break;
        if (text[at] == '{') ++depth;
        if (text[at] == '}' && --depth == 0) return at + 1;
    }
    return text.size();
}

// The text without its entries but one. Lines keep their numbers.
std::string with_one_entry(std::string_view text, std::string_view name) {
    constexpr std::string_view kStart = "\n.visible .entry ";
    std::string left;
    for (size_t at = 0;;) {
        const size_t start = text.find(kStart, at);
        left += text.substr(at, start - at);
        if (start == text.npos) return left;
        const size_t named = start + kStart.size();
        at = end_of_body(text, start);
        const std::string_view entry = text.substr(start, at - start);
        if (text.substr(named, text.find('(', named) - named) == name)
            left += entry;
        else
            left.append(static_cast<size_t>(std::count(entry.begin(), entry.end(), '\n')), '\n');
    }
}

// Frees what only the decoder reads, of a syntax tree that nobody else uses.
void shed(Kernel& kernel) {
    std::vector<StatementText>& statements = kernel.program->statements;
    size_t total = 0;
    for (const StatementText& s : statements) total += s.text.size();
    kernel.words.reserve(total);
    for (StatementText& s : statements) {
        const std::string_view text(kernel.words.data() + kernel.words.size(), s.text.size());
        kernel.words += s.text;
        s.opcode = text.substr(s.text.find(s.opcode), s.opcode.size());
        s.text = text;
    }
    for (Function& f : kernel.syntax.functions) f.statements = {}, f.registers = {};
}

}  // namespace

LoadedModule::LoadedModule(Image image, const Device& device)
    : device_(device), image_(std::move(image)) {
    uint32_t magic = 0;
    std::memcpy(&magic, image_->data(), std::min(image_->size(), sizeof magic));
    is_fatbin_ = magic == kFatbinMagic;
    for (const std::string_view text : extract_ptx(*image_, device)) {
        units_.push_back(std::make_unique<Unit>());
        units_.back()->text = text;
        if (!is_fatbin_) prepare(*units_.back());
    }
}

Module LoadedModule::parse(std::string_view text) const {
    Module module = parse_ptx(text);
    check_target(module.target, device_);
    return module;
}

void LoadedModule::prepare(Unit& unit) {
    if (unit.is_parsed) return;
    unit.module = is_fatbin_ ? parse(with_one_entry(unit.text, {})) : parse(unit.text);
    place_variables(unit);
    unit.is_parsed = true;
}

void LoadedModule::place_variables(Unit& unit) {
    for (Variable& v : unit.module.variables) {
        uint64_t address = 0;
        if (v.space == Space::global || v.space == Space::constant) {
            const uint64_t align = std::max<uint64_t>(v.align, 16);
            auto memory = std::make_unique<uint64_t[]>((v.bytes + align) / 8 + 2);
            address = (reinterpret_cast<uint64_t>(memory.get()) + align - 1) / align * align;
            if (!v.data.empty())
                std::memcpy(reinterpret_cast<void*>(address), v.data.data(), v.data.size());
            unit.storage.push_back(std::move(memory));
        }
        unit.addresses.push_back(address);
    }
    for (size_t i = 0; i < unit.addresses.size(); ++i) {
        const Variable& v = unit.module.variables[i];
        for (const Reference& r : v.references) {
            const auto [target, size] = unit.variable(r.symbol);
            if (!target)
                throw PtxError("initialiser of " + v.name + " names unknown symbol " + r.symbol);
            const uint64_t value = target + static_cast<uint64_t>(r.addend);
            std::memcpy(reinterpret_cast<uint8_t*>(unit.addresses[i]) + r.at, &value,
                        static_cast<size_t>(r.bytes));
        }
        if (!unit.addresses[i]) continue;
        Region region = make_region(reinterpret_cast<void*>(unit.addresses[i]), v.bytes, v.name);
        region.writable = v.writable;
        RegionTable::instance().add(region);
    }
}

LoadedModule::~LoadedModule() {
    for (auto& unit : units_)
        for (uint64_t address : unit->addresses)
            if (address) RegionTable::instance().remove(address);
}

Kernel* LoadedModule::kernel(const std::string& name) {
    std::lock_guard lock(mutex_);
    auto known = kernels_.find(name);
    if (known != kernels_.end()) return known->second.get();
    for (auto& unit : units_) {
        if (is_fatbin_) {
            const auto names = entries_of(unit->text);
            if (std::find(names.begin(), names.end(), name) == names.end()) continue;
        }
        prepare(*unit);
        auto kernel = std::make_unique<Kernel>();
        kernel->module = this;
        if (is_fatbin_) kernel->syntax = parse(with_one_entry(unit->text, name));
        Module& syntax = is_fatbin_ ? kernel->syntax : unit->module;
        auto it = syntax.function_index.find(name);
        if (it == syntax.function_index.end() || !syntax.functions[it->second].is_entry) continue;
        std::vector<uint64_t> addresses;
        for (const Variable& v : syntax.variables)
            addresses.push_back(v.space == Space::global || v.space == Space::constant
                                    ? unit->variable(v.name).first
                                    : 0);
        kernel->program = decode(syntax, it->second, addresses, device_);
        if (is_fatbin_) shed(*kernel);
        return (kernels_[name] = std::move(kernel)).get();
    }
    return nullptr;
}

std::vector<std::string> LoadedModule::kernel_names() {
    std::lock_guard lock(mutex_);
    std::vector<std::string> names;
    for (auto& unit : units_) {
        if (is_fatbin_)
            for (const std::string_view name : entries_of(unit->text)) names.emplace_back(name);
        for (const Function& f : unit->module.functions)
            if (f.is_entry && f.has_body) names.push_back(f.name);
    }
    return names;
}

std::pair<uint64_t, uint64_t> LoadedModule::Unit::variable(const std::string& name) const {
    for (size_t i = 0; i < addresses.size(); ++i)
        if (addresses[i] && module.variables[i].name == name)
            return {addresses[i], module.variables[i].bytes};
    return {0, 0};
}

std::pair<uint64_t, uint64_t> LoadedModule::variable(const std::string& name) {
    std::lock_guard lock(mutex_);
    for (auto& unit : units_) {
        prepare(*unit);
        if (auto found = unit->variable(name); found.first) return found;
    }
    return {0, 0};
}

void write_counters(const Counters& c, uint64_t* out) {
    out = std::copy_n(c.issued, kClasses, out);
    out = std::copy_n(c.lanes, kClasses, out);
    for (uint64_t v :
         {c.read_requests, c.read_sectors, c.read_bytes, c.unique_read_sectors, c.write_requests,
          c.write_sectors, c.write_bytes, c.unique_write_sectors, c.shared_requests,
          c.shared_wavefronts, c.shared_wavefronts_min, c.between_mmas})
        *out++ = v;
}

// ---- launch -------------------------------------------------------------------------------------

Counters launch(Kernel& kernel, LaunchConfig config, void* const* params,
                std::span<const Region> regions) {
    const Program& p = *kernel.program;
    const Device& device = kernel.module->device();
    const Function& f = *p.entry;
    auto require = [&](bool ok, const std::string& what) {
        if (!ok) throw BadLaunch("launch of " + p.name + ": " + what);
    };
    auto text = [](Dim3 d) {
        return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
               ")";
    };
    const uint64_t threads = config.block.count();
    require(config.grid.count() > 0 && config.grid.y <= 65535 && config.grid.z <= 65535 &&
                config.grid.x <= 0x7fffffff,
            "grid " + text(config.grid) + " is outside (2^31-1, 65535, 65535)");
    require(threads > 0 && threads <= 1024 && config.block.x <= 1024 && config.block.y <= 1024 &&
                config.block.z <= 64,
            "block " + text(config.block) + " has more than 1024 threads or none");
    const uint64_t max_threads = uint64_t{f.max_threads[0]} * f.max_threads[1] * f.max_threads[2];
    require(
        !f.max_threads[0] || threads <= max_threads,
        std::to_string(threads) + " threads, but .maxntid allows " + std::to_string(max_threads));
    require(!f.required_threads[0] || (config.block.x == f.required_threads[0] &&
                                       config.block.y == f.required_threads[1] &&
                                       config.block.z == f.required_threads[2]),
            "block " + text(config.block) + " differs from .reqntid");
    const uint32_t total = std::max(p.static_smem, p.dynamic_smem_at + config.dynamic_smem);
    require(total <= device.smem_per_cta, std::to_string(total) +
                                              " bytes of shared memory, the device has " +
                                              std::to_string(device.smem_per_cta) + " per CTA");
    require(config.dynamic_smem <= kernel.max_dynamic_smem,
            std::to_string(config.dynamic_smem) +
                " bytes of dynamic shared memory; cuFuncSetAttribute allows " +
                std::to_string(kernel.max_dynamic_smem));
    const Dim3 needed{f.required_cluster[0], f.required_cluster[1], f.required_cluster[2]};
    if (needed.x && config.cluster.count() == 1) config.cluster = needed;
    require(!needed.x || (config.cluster.x == needed.x && config.cluster.y == needed.y &&
                          config.cluster.z == needed.z),
            "cluster " + text(config.cluster) + " differs from .reqnctapercluster");
    require(config.cluster.count() == 1 || device.capability >= 90, "clusters need sm_90");
    require(config.cluster.count() >= 1 && config.cluster.count() <= 16,
            "cluster " + text(config.cluster) + " has more than 16 CTAs or none");
    require(config.grid.x % config.cluster.x == 0 && config.grid.y % config.cluster.y == 0 &&
                config.grid.z % config.cluster.z == 0,
            "grid is not a multiple of the cluster");

    Launch l;
    l.program = &p;
    l.device = &device;
    l.config = config;
    l.param_storage.resize((p.param_bytes + 127) / 128);
    l.params = {reinterpret_cast<uint8_t*>(l.param_storage.data()), p.param_bytes};
    for (size_t i = 0; i < p.params.size(); ++i) {
        require(params && params[i], "parameter " + std::to_string(i) + " is missing");
        std::memcpy(l.params.data() + p.params[i].offset, params[i], p.params[i].bytes);
    }
    std::vector<Region> own(regions.begin(), regions.end());
    Region param_region = make_region(l.params.data(), l.params.size(), "kernel parameters");
    param_region.writable = false;
    own.push_back(param_region);
    l.regions = RegionTable::instance().snapshot(own);
    for (Region& r : l.regions)  // calloc: pages that are never touched cost nothing
        r.touched = std::shared_ptr<uint8_t[]>(
            static_cast<uint8_t*>(std::calloc(r.bytes / 32 + 2, 1)), std::free);
    std::lock_guard lock(kernel.mutex);
    return execute(l, &kernel.profile);
}

}  // namespace emu
