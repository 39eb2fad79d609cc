// Loads kernels and launches them.
//
// A kernel file is a sequence of fatbins, one per entry file. Each becomes a CUlibrary, which the
// driver instantiates in whatever context a kernel of it is launched: so there is one set of
// libraries per architecture, whatever the number of devices and contexts.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "launch/op.h"

namespace mk {
namespace {

struct FatbinHeader {
    uint32_t magic;
    uint16_t version;
    uint16_t header_bytes;
    uint64_t payload_bytes;
};
constexpr uint32_t kFatbinMagic = 0xBA55ED50;

// Dynamic shared memory that a launch may have without asking for more.
constexpr int32_t kDefaultSmemBytes = 48 << 10;

struct Kernel {
    cuda::CUkernel handle;
    std::map<cuda::CUdevice, int32_t> smem_bytes;  // the limit asked for, if above the default
};

struct Kernels {
    std::vector<cuda::CUlibrary> libraries;
    // Those asked for so far. Looked up by C string: a launch allocates nothing.
    std::map<std::string, Kernel, std::less<>> kernels;
};

mk_status load_libraries(const cuda::Driver& driver, const char* arch, Kernels* kernels) {
    const std::string file = kernel_file(arch);
    std::ifstream stream(file, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(stream), {}};
    MK_REQUIRE(!bytes.empty(), MK_ERR_UNSUPPORTED, "%s cannot be read", file.c_str());
    for (size_t offset = 0; offset < bytes.size();) {
        FatbinHeader header{};
        const size_t left = bytes.size() - offset;
        if (left >= sizeof header) std::memcpy(&header, bytes.data() + offset, sizeof header);
        MK_REQUIRE(header.magic == kFatbinMagic && header.header_bytes <= left &&
                       header.payload_bytes <= left - header.header_bytes,
                   MK_ERR_UNSUPPORTED, "%s is damaged at byte %zu", file.c_str(), offset);
        const size_t size = header.header_bytes + header.payload_bytes;
        const std::vector<uint64_t> aligned = [&] {
            std::vector<uint64_t> copy(ceil_div<size_t>(size, 8));
            std::memcpy(copy.data(), bytes.data() + offset, size);
            return copy;
        }();
        cuda::CUlibrary library = nullptr;
        const cuda::CUresult result = driver.cuLibraryLoadData(&library, aligned.data(), nullptr,
                                                               nullptr, 0, nullptr, nullptr, 0);
        if (result != cuda::kSuccess) {
            int version = 0;
            driver.cuDriverGetVersion(&version);
            cuda::fail_driver(driver, "cuLibraryLoadData", result);
            return fail(MK_ERR_DRIVER,
                        "%s: %s. This driver is for CUDA up to %d.%d; kernels that a later one has "
                        "compiled need a later driver",
                        file.c_str(), std::string(mk_last_error()).c_str(), version / 1000,
                        version % 1000 / 10);
        }
        kernels->libraries.push_back(library);
        offset += size;
    }
    return MK_OK;
}

// Loading is not allowed in a stream that another thread captures in the global mode; the relaxed
// mode of this thread exempts it, so that a first launch may happen under capture.
class RelaxedCapture {
  public:
    explicit RelaxedCapture(const cuda::Driver& driver) : driver_(driver) {
        driver_.cuThreadExchangeStreamCaptureMode(&mode_);
    }
    ~RelaxedCapture() { driver_.cuThreadExchangeStreamCaptureMode(&mode_); }
    RelaxedCapture(const RelaxedCapture&) = delete;
    RelaxedCapture& operator=(const RelaxedCapture&) = delete;

  private:
    const cuda::Driver& driver_;
    int mode_ = cuda::kCaptureModeRelaxed;
};

mk_status look_up(const cuda::Driver& driver, const char* arch, const char* entry, Kernels* kernels,
                  Kernel** kernel) {
    if (const auto found = kernels->kernels.find(entry); found != kernels->kernels.end()) {
        *kernel = &found->second;
        return MK_OK;
    }
    for (const cuda::CUlibrary library : kernels->libraries) {
        cuda::CUkernel handle = nullptr;
        const cuda::CUresult result = driver.cuLibraryGetKernel(&handle, library, entry);
        if (result == cuda::kNotFound) continue;
        if (result != cuda::kSuccess) {
            return cuda::fail_driver(driver, "cuLibraryGetKernel", result);
        }
        *kernel = &kernels->kernels.emplace(entry, Kernel{handle, {}}).first->second;
        return MK_OK;
    }
    return fail(MK_ERR_UNSUPPORTED, "%s has no kernel %s", kernel_file(arch).c_str(), entry);
}

// The kernel of `plan` (null: only load the libraries), loading on first use, and allowed the
// shared memory of the plan.
mk_status find_kernel(const cuda::Driver& driver, const Device& device, const mk_plan* plan,
                      cuda::CUkernel* handle) {
    const char* const arch = device.arch;
    static std::mutex mutex;
    static std::map<std::string, Kernels, std::less<>> loaded;
    const std::lock_guard lock(mutex);
    auto archs = loaded.find(arch);
    if (archs == loaded.end()) {
        const RelaxedCapture relaxed(driver);
        Kernels kernels;
        MK_TRY(load_libraries(driver, arch, &kernels));
        archs = loaded.emplace(arch, std::move(kernels)).first;
    }
    if (!plan) return MK_OK;
    Kernel* kernel = nullptr;
    MK_TRY(look_up(driver, arch, plan->entry, &archs->second, &kernel));
    if (plan->smem_bytes > kDefaultSmemBytes) {
        // The limit only grows, so that no other thread's launch loses what it was given.
        int32_t& limit = kernel->smem_bytes[device.ordinal];
        if (plan->smem_bytes > limit) {
            MK_CUDA(driver, cuKernelSetAttribute, cuda::kKernelMaxDynamicSmem, plan->smem_bytes,
                    kernel->handle, device.ordinal);
            limit = plan->smem_bytes;
        }
    }
    *handle = kernel->handle;
    return MK_OK;
}

cuda::CUlaunchConfig launch_config(const mk_plan& plan, void* stream,
                                   cuda::CUlaunchAttribute (&attributes)[2]) {
    unsigned num_attributes = 0;
    if (plan.pdl) {
        cuda::CUlaunchAttribute& pdl = attributes[num_attributes++];
        pdl.id = cuda::kLaunchProgrammaticStreamSerialization;
        pdl.value.programmatic_stream_serialization = 1;
    }
    if (plan.cluster[0] * plan.cluster[1] * plan.cluster[2] > 1) {
        cuda::CUlaunchAttribute& cluster = attributes[num_attributes++];
        cluster.id = cuda::kLaunchCluster;
        for (int i = 0; i < 3; ++i) {
            cluster.value.cluster_dim[i] = static_cast<unsigned>(plan.cluster[i]);
        }
    }
    cuda::CUlaunchConfig config{};
    for (int i = 0; i < 3; ++i) {
        config.grid[i] = static_cast<unsigned>(plan.grid[i]);
        config.block[i] = static_cast<unsigned>(plan.block[i]);
    }
    config.smem_bytes = static_cast<unsigned>(plan.smem_bytes);
    config.stream = stream;
    config.attributes = attributes;
    config.num_attributes = num_attributes;
    return config;
}

void print_once(const mk_plan& plan, const std::string& shape) {
    static std::mutex mutex;
    static std::set<std::string> printed;
    char text[256];
    mk_plan_format(&plan, text, sizeof text);
    const std::string line = shape + " -> " + text;
    const std::lock_guard lock(mutex);
    if (printed.insert(line).second) std::fprintf(stderr, "%s\n", line.c_str());
}

}  // namespace

int32_t clusters_of_4(const cuda::Driver& driver, const Device& device) {
    if (device.info.sm != 90) return 0;
    // Any kernel will do that leaves no room for a second block.
    mk_plan plan = make_plan("linear", device.info, "bf16_m128_n256");
    plan.block[0] = 384;
    plan.grid[0] = plan.cluster[0] = 4;
    plan.smem_bytes = 128 << 10;
    plan.pdl = 0;  // it has no say in this
    cuda::CUkernel kernel = nullptr;
    if (find_kernel(driver, device, &plan, &kernel) != MK_OK) return 0;
    cuda::CUlaunchAttribute attributes[2] = {};
    const cuda::CUlaunchConfig config = launch_config(plan, nullptr, attributes);
    int clusters = 0;
    return driver.cuOccupancyMaxActiveClusters(&clusters, kernel, &config) == cuda::kSuccess
               ? clusters
               : 0;
}

mk_status launch(const mk_plan& plan, const Device& device, const void* args, void* stream,
                 std::string (*shape)(const void* params), const void* params) {
    static const bool print_plans = [] {
        const char* value = std::getenv("MK_PRINT_PLAN");
        return value && std::strcmp(value, "1") == 0;
    }();
    if (print_plans) print_once(plan, shape(params));
    if (plan.grid[0] == 0 || plan.grid[1] == 0 || plan.grid[2] == 0) return MK_OK;

    const cuda::Driver* driver = nullptr;
    MK_TRY(cuda::get_driver(&driver));
    cuda::CUkernel kernel = nullptr;
    MK_TRY(find_kernel(*driver, device, &plan, &kernel));

    cuda::CUlaunchAttribute attributes[2] = {};
    const cuda::CUlaunchConfig config = launch_config(plan, stream, attributes);
    void* kernel_params[] = {const_cast<void*>(args)};
    MK_CUDA(*driver, cuLaunchKernelEx, &config, kernel, kernel_params, nullptr);
    return MK_OK;
}

}  // namespace mk

extern "C" mk_status mk_load(void) {
    const mk::Device* device = nullptr;
    MK_TRY(mk::current_device(&device));
    const mk::cuda::Driver* driver = nullptr;
    MK_TRY(mk::cuda::get_driver(&driver));
    return mk::find_kernel(*driver, *device, nullptr, nullptr);
}
