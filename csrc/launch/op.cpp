#include "launch/op.h"

#include <cstdio>
#include <cstring>

#include "minitron_kernels_fp8.h"

namespace mk {

mk_status check_device(const mk_device* device) {
    MK_REQUIRE(device, MK_ERR_NULL, "device is NULL");
    const int32_t sm = device->sm;
    MK_REQUIRE(sm == 80 || sm == 89 || sm == 90 || sm == 100, MK_ERR_UNSUPPORTED,
               "device.sm must be 80, 89, 90 or 100, got %d", sm);
    return check_size("device.num_sms", device->num_sms, 1, 1 << 16);
}

mk_status check_sm90a(const char* op, const mk_device& device) {
    MK_REQUIRE(device.sm == 90, MK_ERR_UNSUPPORTED,
               "mk_%s has kernels for sm_90a only, those of this device are sm_%d's", op,
               device.sm);
    return MK_OK;
}

const char* dtype_name(int32_t dtype) {
    switch (dtype) {
        case MK_BF16:
            return "bf16";
        case MK_F16:
            return "f16";
        case MK_F32:
            return "f32";
        case MK_I32:
            return "i32";
        case MK_I64:
            return "i64";
        case MK_E4M3:
            return "e4m3";
    }
    return "invalid";
}

int32_t dtype_bytes(int32_t dtype) {
    switch (dtype) {
        case MK_BF16:
        case MK_F16:
            return 2;
        case MK_F32:
        case MK_I32:
            return 4;
        case MK_I64:
            return 8;
        case MK_E4M3:
            return 1;
    }
    return 0;
}

mk_plan make_plan(const char* op, const mk_device& device, const std::string& key) {
    mk_plan plan{};
    std::snprintf(plan.entry, sizeof plan.entry, "mk_%s_sm%d_%s", op, device.sm, key.c_str());
    for (int i = 0; i < 3; ++i) plan.grid[i] = plan.block[i] = plan.cluster[i] = 1;
    plan.pdl = device.sm >= 90;
    return plan;
}

std::string dtype_key(int32_t dtype, bool aligned) {
    return std::string(dtype_name(dtype)) + (aligned ? "" : "_unaligned");
}

mk_status check_size(const char* name, int32_t size, int32_t low, int32_t high) {
    MK_REQUIRE(low <= size && size <= high, MK_ERR_SHAPE, "%s must be %d ... %d, got %d", name, low,
               high, size);
    return MK_OK;
}

mk_status check_activation_dtype(int32_t dtype) {
    MK_REQUIRE(dtype == MK_BF16 || dtype == MK_F16, MK_ERR_DTYPE,
               "dtype must be MK_BF16 (1) or MK_F16 (2), got %d", dtype);
    return MK_OK;
}

mk_status check_indices(const char* name, const void* pointer, int32_t count, int32_t dtype) {
    MK_REQUIRE(dtype == MK_I32 || dtype == MK_I64, MK_ERR_DTYPE,
               "%s_dtype must be MK_I32 (4) or MK_I64 (5), got %d", name, dtype);
    return check_rows(name, pointer, 1, count, 1, dtype);
}

mk_status check_pointer(const char* name, const void* pointer, int32_t dtype) {
    MK_REQUIRE(pointer, MK_ERR_NULL, "%s is NULL", name);
    const int32_t bytes = dtype_bytes(dtype);
    MK_REQUIRE(reinterpret_cast<uintptr_t>(pointer) % bytes == 0, MK_ERR_ALIGNMENT,
               "%s = %p is not aligned to its %d-byte elements", name, pointer, bytes);
    return MK_OK;
}

mk_status check_stride(const char* name, int64_t stride, int32_t count, int32_t least) {
    MK_REQUIRE(count <= 1 || stride >= least, MK_ERR_STRIDE,
               "%s_stride must be at least the %d elements it steps over, got %lld", name, least,
               static_cast<long long>(stride));
    return MK_OK;
}

mk_status check_rows(const char* name, const void* pointer, int64_t stride, int32_t rows,
                     int32_t row_elements, int32_t dtype) {
    if (rows == 0) return MK_OK;
    MK_TRY(check_pointer(name, pointer, dtype));
    return check_stride(name, stride, rows, row_elements);
}

bool is_16_byte(const void* pointer, int32_t dtype, std::initializer_list<int64_t> strides) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16) return false;
    for (const int64_t stride : strides) {
        if (stride * dtype_bytes(dtype) % 16) return false;
    }
    return true;
}

}  // namespace mk

extern "C" int32_t mk_plan_format(const mk_plan* plan, char* text, size_t size) {
    const auto& [entry, grid, block, cluster, smem_bytes, pdl] = *plan;
    char clusters[40] = "";
    if (cluster[0] * cluster[1] * cluster[2] != 1) {
        std::snprintf(clusters, sizeof clusters, " cluster %dx%dx%d", cluster[0], cluster[1],
                      cluster[2]);
    }
    return std::snprintf(text, size, "%s grid %dx%dx%d block %dx%dx%d%s smem %d%s", entry, grid[0],
                         grid[1], grid[2], block[0], block[1], block[2], clusters, smem_bytes,
                         pdl ? " pdl" : "");
}
