// The C interface that tests/emulator/__init__.py calls through ctypes.

#include <cstring>

#include "runtime.h"

namespace {

thread_local std::string last_error;
thread_local std::string last_kind;

struct RegionArgument {
    void* base;
    uint64_t bytes;
    const char* name;
    uint64_t track_initialised;
};

template <class F>
int guarded(F f) {
    try {
        f();
        return 0;
    } catch (const emu::LaunchError& e) {
        last_error = e.what();
        last_kind = e.kind;
    } catch (const emu::BadLaunch& e) {
        last_error = e.what();
        last_kind = "bad launch";
    } catch (const std::exception& e) {
        last_error = e.what();
        last_kind = last_error.starts_with("wrong target")          ? "wrong target"
                    : last_error.starts_with("unknown instruction") ? "unknown instruction"
                                                                    : "bad module";
    }
    return 1;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* emu_error() { return last_error.c_str(); }
const char* emu_error_kind() { return last_kind.c_str(); }

int emu_device(const char* target, int* values) {
    const emu::Device* d = emu::find_device(target);
    if (!d) return 1;
    values[0] = d->capability, values[1] = d->sms;
    values[2] = static_cast<int>(d->smem_per_cta), values[3] = static_cast<int>(d->smem_per_sm);
    return 0;
}

int emu_module_load(const char* target, const uint8_t* image, uint64_t size, void** module) {
    return guarded([&] {
        *module = nullptr;
        *module =
            new emu::LoadedModule(std::make_shared<const std::vector<uint8_t>>(image, image + size),
                                  *emu::find_device(target));
    });
}
void emu_module_unload(void* module) { delete static_cast<emu::LoadedModule*>(module); }

const char* emu_module_kernels(void* module) {
    thread_local std::string names;
    names.clear();
    for (const std::string& name : static_cast<emu::LoadedModule*>(module)->kernel_names())
        names += name + "\n";
    return names.c_str();
}

int emu_module_variable(void* module, const char* name, uint64_t* address, uint64_t* bytes) {
    std::tie(*address, *bytes) = static_cast<emu::LoadedModule*>(module)->variable(name);
    return *address ? 0 : 1;
}

int emu_kernel(void* module, const char* name, void** kernel) {
    return guarded([&] {
        *kernel = static_cast<emu::LoadedModule*>(module)->kernel(name);
        if (!*kernel) throw emu::PtxError(std::string("no kernel named ") + name);
    });
}

// Sizes in bytes of the parameters, at most `limit` of them; returns their number.
int emu_kernel_params(void* kernel, uint32_t* bytes, int limit) {
    const auto& params = static_cast<emu::Kernel*>(kernel)->program->params;
    for (int i = 0; i < limit && i < static_cast<int>(params.size()); ++i)
        bytes[i] = params[static_cast<size_t>(i)].bytes;
    return static_cast<int>(params.size());
}

uint32_t emu_kernel_static_smem(void* kernel) {
    return static_cast<emu::Kernel*>(kernel)->program->static_smem;
}

// dims: grid, block, cluster; counters: see Counters in __init__.py.
int emu_launch(void* kernel, const uint32_t* dims, uint32_t smem, uint64_t seed, int threads,
               uint32_t options, uint64_t max_instructions, void* const* params,
               const RegionArgument* regions, uint64_t region_count, uint64_t* counters) {
    return guarded([&] {
        auto& k = *static_cast<emu::Kernel*>(kernel);
        emu::LaunchConfig config;
        config.grid = {dims[0], dims[1], dims[2]};
        config.block = {dims[3], dims[4], dims[5]};
        config.cluster = {dims[6], dims[7], dims[8]};
        config.dynamic_smem = smem;
        config.seed = seed;
        config.threads = threads;
        config.max_instructions = max_instructions;
        config.shared.allow_uninitialised = options & 1;
        config.shared.check_races = !(options & 2);
        k.max_dynamic_smem = k.module->device().smem_per_cta;
        std::vector<emu::Region> list;
        for (uint64_t i = 0; i < region_count; ++i)
            list.push_back(emu::make_region(regions[i].base, regions[i].bytes, regions[i].name,
                                            regions[i].track_initialised));
        emu::write_counters(emu::launch(k, config, params, list), counters);
    });
}

// One line per PTX statement of the last launch: issued, lanes, class, source line, text.
const char* emu_profile(void* kernel) {
    thread_local std::string text;
    text.clear();
    const auto& k = *static_cast<emu::Kernel*>(kernel);
    for (size_t i = 0; i < k.profile.size(); ++i) {
        const emu::Instr& in = k.program->code[i];
        if (in.cls == emu::Class::internal) continue;
        const emu::StatementText& s = k.program->statements[in.statement];
        text += std::to_string(k.profile[i].issued) + "\t" + std::to_string(k.profile[i].lanes) +
                "\t" + emu::kClassNames[static_cast<int>(in.cls)] + "\t" +
                std::to_string(s.file_line) + "\t" + std::string(s.text) + "\n";
    }
    return text.c_str();
}

}  // extern "C"
#pragma GCC visibility pop
