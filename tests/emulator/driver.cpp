// The symbols of libcuda.so.1 that this project's host code and its tests call.
//
// Devices: MK_EMU_DEVICE names one (sm_80, sm_89, sm_90, sm_100); unset or "all" gives all four, in
// this order. Host memory is device memory; streams run their work at once, except while they
// capture a graph. A kernel that does something wrong makes the launch itself fail;
// emu_last_report() says why.

#include "driver.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <unordered_set>
#include <utility>

#include "runtime.h"

namespace {

using emu::Device;
using namespace emu::driver;

// ---- devices and contexts ----------------------------------------------------------------------

struct Context {
    int ordinal;
};

const std::vector<const Device*>& devices() {
    static const std::vector<const Device*> list = [] {
        const char* wanted = std::getenv("MK_EMU_DEVICE");
        std::vector<const Device*> found;
        for (const char* name : {"sm_80", "sm_89", "sm_90", "sm_100"})
            if (!wanted || !*wanted || std::string(wanted) == "all" ||
                emu::find_device(wanted) == emu::find_device(name))
                found.push_back(emu::find_device(name));
        return found;
    }();
    return list;
}

std::vector<Context>& primary_contexts() {
    static std::vector<Context> list = [] {
        std::vector<Context> all;
        for (size_t i = 0; i < devices().size(); ++i) all.push_back({static_cast<int>(i)});
        return all;
    }();
    return list;
}

std::atomic<bool> primary_is_active[8];  // of each device: it was retained
std::atomic<bool> initialised = false;
thread_local std::vector<Context*> context_stack;

Context* current() { return context_stack.empty() ? nullptr : context_stack.back(); }
bool bad_ordinal(int ordinal) {
    return ordinal < 0 || ordinal >= static_cast<int>(devices().size());
}

// ---- the last driver launch, for tests ---------------------------------------------------------

std::mutex last_mutex;
emu::Counters last_counters;
std::string last_report;
std::string launch_log;  // a line for each launch that was enqueued, as long as somebody listens
bool logs_launches = false;
std::atomic<uint64_t> launch_seed = 0;

void log_launch(const std::string& kernel, const emu::LaunchConfig& c, bool is_dependent) {
    std::lock_guard lock(last_mutex);
    if (!logs_launches) return;
    launch_log += kernel;
    for (const emu::Dim3& d : {c.grid, c.block})
        for (const uint32_t n : {d.x, d.y, d.z}) launch_log += " " + std::to_string(n);
    launch_log += " " + std::to_string(c.dynamic_smem) + " " + std::to_string(is_dependent) + "\n";
}

// Runs f; exceptions of the emulator become codes, their text the report.
template <class F>
int guarded(F f) {
    try {
        return f();
    } catch (const emu::LaunchError& e) {
        report(e.what());
        static const std::map<std::string, int> codes = {
            {"out of bounds", kIllegalAddress}, {"misaligned access", kMisalignedAddress},
            {"assertion failed", kAssert},      {"deadlock", kLaunchTimeout},
            {"hang", kLaunchTimeout},           {"write to read-only memory", kIllegalAddress}};
        auto it = codes.find(e.kind);
        return it == codes.end() ? kLaunchFailed : it->second;
    } catch (const emu::BadLaunch& e) {
        report(e.what());
        return std::string(e.what()).find("shared memory") == std::string::npos ? kInvalidValue
                                                                                : kOutOfResources;
    } catch (const emu::PtxError& e) {
        report(e.what());
        return std::string(e.what()).starts_with("wrong target") ? kNoBinaryForGpu : kInvalidPtx;
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    } catch (const std::exception& e) {
        report(e.what());
        return kUnknown;
    }
}

// ---- modules, libraries, functions -------------------------------------------------------------

struct Image;

// CUfunction and CUkernel: a kernel's name in an image; which device it runs on is the current
// context's.
struct Function {
    Image* image;
    std::string name;
};

// CUmodule and CUlibrary.
struct Image {
    emu::Image bytes;
    std::mutex mutex;
    std::map<int, std::unique_ptr<emu::LoadedModule>> by_device;
    std::map<std::string, std::unique_ptr<Function>> functions;

    emu::LoadedModule& on(int ordinal) {
        std::lock_guard lock(mutex);
        auto& module = by_device[ordinal];
        if (!module)
            module = std::make_unique<emu::LoadedModule>(bytes,
                                                         *devices()[static_cast<size_t>(ordinal)]);
        return *module;
    }
    Function* function(const std::string& name) {
        std::lock_guard lock(mutex);
        auto& f = functions[name];
        if (!f) f = std::make_unique<Function>(Function{this, name});
        return f.get();
    }
};

// The size of an image is not passed: text ends at its zero, a fatbin says it in its header, and
// nvcc's wrapper (magic, version, pointer) points to one.
std::vector<uint8_t> copy_image(const void* data) {
    struct Wrapper {
        uint32_t magic, version;
        const void* payload;
    };
    uint32_t magic;
    std::memcpy(&magic, data, 4);
    if (magic == 0x466243b1) return copy_image(static_cast<const Wrapper*>(data)->payload);
    const auto* bytes = static_cast<const uint8_t*>(data);
    if (magic != emu::kFatbinMagic)
        return {bytes, bytes + std::strlen(static_cast<const char*>(data)) + 1};
    uint16_t header;
    uint64_t payload;
    std::memcpy(&header, bytes + 6, 2);
    std::memcpy(&payload, bytes + 8, 8);
    return {bytes, bytes + header + payload};
}

int load_image(void** image, const void* data) {
    if (!image || !data) return kInvalidValue;
    return guarded([&] {
        auto loaded = std::make_unique<Image>();
        loaded->bytes = std::make_shared<const std::vector<uint8_t>>(copy_image(data));
        if (current()) loaded->on(current()->ordinal);
        *image = loaded.release();
        return kSuccess;
    });
}

int find_function(void** function, void* image, const char* name) {
    if (!function || !image || !name) return kInvalidValue;
    return guarded([&] {
        auto* from = static_cast<Image*>(image);
        const int ordinal = current() ? current()->ordinal : 0;
        if (!from->on(ordinal).kernel(name)) return kNotFound;
        *function = from->function(name);
        return kSuccess;
    });
}

emu::Kernel* resolve(void* function) {
    auto* f = static_cast<Function*>(function);
    return f->image->on(current()->ordinal).kernel(f->name);
}

// ---- streams and graphs ------------------------------------------------------------------------

struct Graph {
    std::vector<Work> nodes;
};
struct Stream {
    std::unique_ptr<Graph> capture;
};
struct Event {
    std::chrono::steady_clock::time_point time;
    bool recorded = false;
};

int launch_kernel(void* function, emu::LaunchConfig config, void* stream, void** params,
                  void** extra, bool is_dependent = false) {
    if (!current()) return kInvalidContext;
    if (!function) return kInvalidHandle;
    return guarded([&] {
        emu::Kernel* kernel = resolve(function);
        if (!kernel) return static_cast<int>(kNotFound);
        log_launch(kernel->program->name, config, is_dependent);
        // Parameters are copied at once, as a captured launch runs later.
        const emu::Program& program = *kernel->program;
        auto bytes = std::make_shared<std::vector<uint8_t>>(program.param_bytes);
        const uint8_t* packed = nullptr;
        for (void** e = extra; e && *e; e += 2)
            if (*e == reinterpret_cast<void*>(1)) packed = static_cast<const uint8_t*>(e[1]);
        for (size_t i = 0; i < program.params.size(); ++i) {
            const emu::ParamSlot slot = program.params[i];
            if (!packed && (!params || !params[i])) return static_cast<int>(kInvalidValue);
            std::memcpy(bytes->data() + slot.offset, packed ? packed + slot.offset : params[i],
                        slot.bytes);
        }
        return submit(stream, [=] {
            return guarded([&] {
                std::vector<void*> pointers;
                for (const emu::ParamSlot& slot : kernel->program->params)
                    pointers.push_back(bytes->data() + slot.offset);
                emu::LaunchConfig c = config;
                c.seed = launch_seed;
                c.is_dependent = is_dependent;
                if (const char* limit = std::getenv("MK_EMU_MAX_INSTRUCTIONS"))
                    c.max_instructions = std::strtoull(limit, nullptr, 10);
                const emu::Counters counters = emu::launch(*kernel, c, pointers.data(), {});
                std::lock_guard lock(last_mutex);
                last_counters = counters;
                last_report.clear();
                return kSuccess;
            });
        });
    });
}

// ---- attributes --------------------------------------------------------------------------------

struct LaunchAttribute {
    int id;
    char pad[4];
    uint32_t value[16];
};
struct KernelLaunchConfig {  // CUlaunchConfig
    uint32_t grid[3], block[3];
    uint32_t shared_bytes;
    void* stream;
    LaunchAttribute* attributes;
    uint32_t attribute_count;
};
constexpr int kAttributeCluster = 4, kAttributeDependent = 6;

int device_attribute(const Device& d, int attribute) {
    switch (attribute) {
        case 1:
            return 1024;  // threads per block
        case 2:
        case 3:
            return 1024;  // block x, y
        case 4:
            return 64;  // block z
        case 5:
            return 0x7fffffff;  // grid x
        case 6:
        case 7:
            return 65535;  // grid y, z
        case 8:
            return 48 << 10;  // shared memory per block
        case 9:
            return 64 << 10;  // constant memory
        case 10:
            return emu::kLanes;  // warp size
        case 12:
        case 82:
            return 65536;  // registers per block, per SM
        case 13:
            return 1750000;  // clock, kHz
        case 16:
            return d.sms;
        case 31:
        case 41:
        case 78:
        case 83:
        case 95:
        case 115:
            return 1;  // capabilities that are there
        case 38:
            return 40 << 20;  // L2 bytes
        case 39:
            return d.max_warps_per_sm * emu::kLanes;
        case 75:
            return d.capability / 10;
        case 76:
            return d.capability % 10;
        case 81:
            return static_cast<int>(d.smem_per_sm);
        case 97:
            return static_cast<int>(d.smem_per_cta);
        case 106:
            return d.capability == 89 ? 24 : 32;  // blocks per SM
        case 111:
            return 1024;  // reserved shared memory per block
        case 120:
            return d.capability >= 90;  // cluster launch
        default:
            return 0;
    }
}

}  // namespace

const Device* emu::driver::current_device() {
    return current() ? devices()[static_cast<size_t>(current()->ordinal)] : nullptr;
}

int emu::driver::submit(void* stream, Work work) {
    // 1 and 2 are the legacy and the per-thread default stream.
    if (reinterpret_cast<uintptr_t>(stream) > 2)
        if (auto* s = static_cast<Stream*>(stream); s->capture) {
            s->capture->nodes.push_back(std::move(work));
            return kSuccess;
        }
    return work();
}

void emu::driver::report(const std::string& text) {
    std::lock_guard lock(last_mutex);
    last_report = text;
}

#pragma GCC visibility push(default)
extern "C" {

// ---- for tests ---------------------------------------------------------------------------------

void emu_region_add(void* base, uint64_t bytes, const char* name) {
    emu::RegionTable::instance().add(emu::make_region(base, bytes, name));
}
int emu_region_remove(void* base) {
    return !emu::RegionTable::instance().remove(reinterpret_cast<uint64_t>(base));
}
void emu_set_seed(uint64_t seed) { launch_seed = seed; }
const char* emu_last_report() {
    thread_local std::string text;
    std::lock_guard lock(last_mutex);
    text = last_report;
    return text.c_str();
}
// Launches are logged from now on, or no longer; the log up to now, which starts anew.
const char* emu_log_launches(int logs) {
    thread_local std::string text;
    std::lock_guard lock(last_mutex);
    text = std::exchange(launch_log, {});
    logs_launches = logs;
    return text.c_str();
}
void emu_last_counters(uint64_t* counters) {
    std::lock_guard lock(last_mutex);
    emu::write_counters(last_counters, counters);
}

// ---- initialisation, devices -------------------------------------------------------------------

int cuInit(unsigned flags) {
    if (flags) return kInvalidValue;
    if (devices().empty()) return kInvalidDevice;
    initialised = true;
    return kSuccess;
}
int cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
int cuDeviceGetCount(int* count) {
    if (!initialised) return kNotInitialized;
    return *count = static_cast<int>(devices().size()), kSuccess;
}
int cuDeviceGet(int* device, int ordinal) {
    if (!initialised) return kNotInitialized;
    if (bad_ordinal(ordinal)) return kInvalidDevice;
    return *device = ordinal, kSuccess;
}
int cuDeviceGetName(char* name, int length, int device) {
    if (bad_ordinal(device)) return kInvalidDevice;
    std::snprintf(name, static_cast<size_t>(length), "%s",
                  devices()[static_cast<size_t>(device)]->name.c_str());
    return kSuccess;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    if (bad_ordinal(device)) return kInvalidDevice;
    return *bytes = size_t{16} << 30, kSuccess;
}
int cuDeviceGetUuid_v2(char* uuid, int device) {
    if (bad_ordinal(device)) return kInvalidDevice;
    std::memset(uuid, 0, 16);
    uuid[15] = static_cast<char>(device + 1);
    return kSuccess;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (bad_ordinal(device)) return kInvalidDevice;
    if (attribute < 1 || attribute > 200) return kInvalidValue;
    return *value = device_attribute(*devices()[static_cast<size_t>(device)], attribute), kSuccess;
}

// ---- contexts ----------------------------------------------------------------------------------

int cuDevicePrimaryCtxRetain(void** context, int device) {
    if (!initialised) return kNotInitialized;
    if (bad_ordinal(device)) return kInvalidDevice;
    primary_is_active[device] = true;
    return *context = &primary_contexts()[static_cast<size_t>(device)], kSuccess;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
    return bad_ordinal(device) ? kInvalidDevice : kSuccess;
}
int cuDevicePrimaryCtxReset_v2(int device) {
    return bad_ordinal(device) ? kInvalidDevice : kSuccess;
}
int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
    if (bad_ordinal(device)) return kInvalidDevice;
    return *flags = 0, *active = primary_is_active[device], kSuccess;
}
int cuCtxCreate_v2(void** context, unsigned, int device) {
    if (bad_ordinal(device)) return kInvalidDevice;
    *context = new Context{device};
    context_stack.push_back(static_cast<Context*>(*context));
    return kSuccess;
}
int cuCtxDestroy_v2(void* context) {
    std::erase(context_stack, static_cast<Context*>(context));
    delete static_cast<Context*>(context);
    return kSuccess;
}
int cuCtxPushCurrent_v2(void* context) {
    if (!context) return kInvalidContext;
    return context_stack.push_back(static_cast<Context*>(context)), kSuccess;
}
int cuCtxPopCurrent_v2(void** context) {
    if (!current()) return kInvalidContext;
    if (context) *context = current();
    return context_stack.pop_back(), kSuccess;
}
int cuCtxSetCurrent(void* context) {
    if (!context_stack.empty()) context_stack.pop_back();
    if (context) context_stack.push_back(static_cast<Context*>(context));
    return kSuccess;
}
int cuCtxGetCurrent(void** context) { return *context = current(), kSuccess; }
int cuCtxGetDevice(int* device) {
    if (!current()) return kInvalidContext;
    return *device = current()->ordinal, kSuccess;
}
int cuCtxSynchronize() { return current() ? kSuccess : kInvalidContext; }
int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    return *least = 0, *greatest = -5, kSuccess;
}

// ---- modules -----------------------------------------------------------------------------------

int cuModuleLoadData(void** module, const void* image) {
    if (!current()) return kInvalidContext;
    return load_image(module, image);
}
int cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}
int cuModuleLoadFatBinary(void** module, const void* image) {
    return cuModuleLoadData(module, image);
}
int cuModuleUnload(void* module) { return delete static_cast<Image*>(module), kSuccess; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
    return find_function(function, module, name);
}
int cuModuleGetGlobal_v2(uint64_t* address, size_t* bytes, void* module, const char* name) {
    if (!current()) return kInvalidContext;
    const auto [at, size] = static_cast<Image*>(module)->on(current()->ordinal).variable(name);
    if (!at) return kNotFound;
    if (address) *address = at;
    if (bytes) *bytes = size;
    return kSuccess;
}
int cuLibraryLoadData(void** library, const void* code, int*, void**, unsigned, int*, void**,
                      unsigned) {
    if (!initialised) return kNotInitialized;
    return load_image(library, code);
}
int cuLibraryUnload(void* library) { return delete static_cast<Image*>(library), kSuccess; }
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    return find_function(kernel, library, name);
}
int cuLibraryGetModule(void** module, void* library) { return *module = library, kSuccess; }
int cuKernelGetFunction(void** function, void* kernel) { return *function = kernel, kSuccess; }

int cuFuncGetAttribute(int* value, int attribute, void* function) {
    if (!current()) return kInvalidContext;
    return guarded([&] {
        const emu::Kernel& k = *resolve(function);
        const emu::Function& f = *k.program->entry;
        switch (attribute) {
            case 0:
                *value =
                    f.max_threads[0]
                        ? static_cast<int>(f.max_threads[0] * f.max_threads[1] * f.max_threads[2])
                        : 1024;
                break;
            case 1:
                *value = static_cast<int>(k.program->static_smem);
                break;
            case 3:
                *value = static_cast<int>(k.program->local_bytes);
                break;
            case 4:
                *value = 0;
                break;  // registers: unknown before ptxas
            case 5:
            case 6:
                *value = k.module->device().capability;
                break;
            case 8:
                *value = static_cast<int>(k.max_dynamic_smem);
                break;
            default:
                *value = 0;
        }
        return kSuccess;
    });
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (!current()) return kInvalidContext;
    return guarded([&] {
        emu::Kernel& k = *resolve(function);
        if (attribute != 8)
            return kSuccess;  // carve-outs and cluster permissions change nothing here
        if (value < 0 ||
            static_cast<uint32_t>(value) + k.program->static_smem > k.module->device().smem_per_cta)
            return kInvalidValue;
        k.max_dynamic_smem = static_cast<uint32_t>(value);
        return kSuccess;
    });
}
int cuKernelGetAttribute(int* value, int attribute, void* kernel, int) {
    return cuFuncGetAttribute(value, attribute, kernel);
}
int cuKernelSetAttribute(int attribute, int value, void* kernel, int) {
    return cuFuncSetAttribute(kernel, attribute, value);
}
int cuFuncSetCacheConfig(void*, int) { return kSuccess; }
int cuFuncGetName(const char** name, void* function) {
    return *name = static_cast<Function*>(function)->name.c_str(), kSuccess;
}

int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned smem, void* stream, void** params, void** extra) {
    emu::LaunchConfig config;
    config.grid = {gx, gy, gz};
    config.block = {bx, by, bz};
    config.dynamic_smem = smem;
    return launch_kernel(f, config, stream, params, extra);
}
int cuLaunchCooperativeKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                              unsigned by, unsigned bz, unsigned smem, void* stream,
                              void** params) {
    return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, smem, stream, params, nullptr);
}
int cuLaunchKernelEx(const KernelLaunchConfig* c, void* f, void** params, void** extra) {
    if (!c) return kInvalidValue;
    emu::LaunchConfig config;
    config.grid = {c->grid[0], c->grid[1], c->grid[2]};
    config.block = {c->block[0], c->block[1], c->block[2]};
    config.dynamic_smem = c->shared_bytes;
    bool is_dependent = false;  // programmatic stream serialization
    for (uint32_t i = 0; i < c->attribute_count; ++i) {
        const LaunchAttribute& a = c->attributes[i];
        if (a.id == kAttributeCluster) config.cluster = {a.value[0], a.value[1], a.value[2]};
        if (a.id == kAttributeDependent) is_dependent = a.value[0];
    }
    return launch_kernel(f, config, c->stream, params, extra, is_dependent);
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads,
                                                size_t smem) {
    if (!current()) return kInvalidContext;
    return guarded([&] {
        const emu::Kernel& k = *resolve(function);
        const Device& d = k.module->device();
        const int by_warps = d.max_warps_per_sm / std::max(1, (threads + 31) / 32);
        const int by_smem =
            static_cast<int>(d.smem_per_sm / (k.program->static_smem + smem + 1024));
        *blocks = std::min({by_warps, by_smem, device_attribute(d, 106)});
        return kSuccess;
    });
}
int cuOccupancyMaxActiveClusters(int* clusters, void* function, const KernelLaunchConfig* c) {
    if (!current()) return kInvalidContext;
    return guarded([&] {
        int size = 1;  // the blocks get an SM each, 16 of a GPC
        for (uint32_t i = 0; i < c->attribute_count; ++i) {
            const auto& [id, unused, value] = c->attributes[i];
            if (id == kAttributeCluster) size = static_cast<int>(value[0] * value[1] * value[2]);
        }
        *clusters = resolve(function)->module->device().sms / 16 * (16 / size);
        return kSuccess;
    });
}

// ---- streams, events, graphs -------------------------------------------------------------------

int cuStreamCreate(void** stream, unsigned) {
    if (!current()) return kInvalidContext;
    return *stream = new Stream, kSuccess;
}
int cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
    return cuStreamCreate(stream, flags);
}
int cuStreamDestroy_v2(void* stream) { return delete static_cast<Stream*>(stream), kSuccess; }
int cuStreamSynchronize(void* stream) {
    if (reinterpret_cast<uintptr_t>(stream) > 2 && static_cast<Stream*>(stream)->capture)
        return kCaptureUnsupported;
    return kSuccess;
}
int cuStreamQuery(void* stream) { return cuStreamSynchronize(stream); }
int cuStreamWaitEvent(void*, void*, unsigned) { return kSuccess; }
int cuStreamBeginCapture_v2(void* stream, int) {
    if (reinterpret_cast<uintptr_t>(stream) <= 2) return kCaptureUnsupported;
    auto* s = static_cast<Stream*>(stream);
    if (s->capture) return kInvalidValue;
    return s->capture = std::make_unique<Graph>(), kSuccess;
}
int cuStreamEndCapture(void* stream, void** graph) {
    auto* s = static_cast<Stream*>(stream);
    if (reinterpret_cast<uintptr_t>(stream) <= 2 || !s->capture) return kInvalidValue;
    return *graph = s->capture.release(), kSuccess;
}
int cuStreamIsCapturing(void* stream, int* status) {
    return *status =
               reinterpret_cast<uintptr_t>(stream) > 2 && static_cast<Stream*>(stream)->capture,
           kSuccess;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
    thread_local int current_mode = 0;
    return std::swap(*mode, current_mode), kSuccess;
}
int cuGraphGetNodes(void* graph, void**, size_t* count) {
    return *count = static_cast<Graph*>(graph)->nodes.size(), kSuccess;
}
int cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) {
    return *exec = new Graph(*static_cast<Graph*>(graph)), kSuccess;
}
int cuGraphLaunch(void* exec, void*) {
    for (const Work& work : static_cast<Graph*>(exec)->nodes)
        if (const int status = work()) return status;
    return kSuccess;
}
int cuGraphExecDestroy(void* exec) { return delete static_cast<Graph*>(exec), kSuccess; }
int cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), kSuccess; }

int cuEventCreate(void** event, unsigned) { return *event = new Event, kSuccess; }
int cuEventDestroy_v2(void* event) { return delete static_cast<Event*>(event), kSuccess; }
int cuEventRecord(void* event, void* stream) {
    return submit(stream, [=] {
        *static_cast<Event*>(event) = {std::chrono::steady_clock::now(), true};
        return kSuccess;
    });
}
int cuEventSynchronize(void*) { return kSuccess; }
int cuEventQuery(void*) { return kSuccess; }
int cuEventElapsedTime(float* ms, void* from, void* to) {
    const auto *a = static_cast<Event*>(from), *b = static_cast<Event*>(to);
    if (!a->recorded || !b->recorded) return kInvalidHandle;
    return *ms = std::chrono::duration<float, std::milli>(b->time - a->time).count(), kSuccess;
}

// ---- entry points -------------------------------------------------------------------------------

int cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* status) {
    static void* self = [] {
        Dl_info info;
        return dladdr(reinterpret_cast<void*>(&cuInit), &info)
                   ? dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD)
                   : nullptr;
    }();
    *function = nullptr;
    for (const char* suffix : {"_v2", ""})
        if (!*function) *function = dlsym(self, (std::string(symbol) + suffix).c_str());
    if (status) *status = *function ? 0 : 1;  // found; not found
    return *function ? kSuccess : kNotFound;
}

}  // extern "C"
#pragma GCC visibility pop
