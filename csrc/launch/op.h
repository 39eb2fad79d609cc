// What every op is made of, host side. An op is a struct of static functions:
//     using Params            its struct in minitron_kernels.h
//     check(params)           validates everything but the device; names the field
//     plan(params, device)    shapes -> launch: pure, assumes that check passed
//     args(params)            what the kernel takes, by value
//     shape(params)           one line for MK_PRINT_PLAN
#pragma once

#include <string>

#include "launch/device.h"

namespace mk {

mk_status check_device(const mk_device* device);
// Of mk_<op>, which has kernels for sm_90a only.
mk_status check_sm90a(const char* op, const mk_device& device);

// "bf16" for MK_BF16 and so on, as entry names spell it.
const char* dtype_name(int32_t dtype);
// Bytes of an element; 0 for a value that is no mk_dtype.
int32_t dtype_bytes(int32_t dtype);

// A plan for the entry mk_<op>_sm<NN>_<key>, with a 1x1x1 grid, block and cluster.
mk_plan make_plan(const char* op, const mk_device& device, const std::string& key);
// The key of entries that come in two forms: "bf16" with 16-byte accesses, or "bf16_unaligned".
std::string dtype_key(int32_t dtype, bool aligned);

// Enqueue `plan` with one by-value argument. MK_PRINT_PLAN=1: print it once per (plan, shape).
mk_status launch(const mk_plan& plan, const Device& device, const void* args, void* stream,
                 std::string (*shape)(const void* params), const void* params);

template <class Op>
mk_status run(const typename Op::Params* params, void* stream) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(Op::check(*params));
    const Device* device = nullptr;
    MK_TRY(current_device(&device));
    const auto args = Op::args(*params);
    return launch(
        Op::plan(*params, device->info), *device, &args, stream,
        [](const void* p) { return Op::shape(*static_cast<const typename Op::Params*>(p)); },
        params);
}

template <class Op>
mk_status plan(const typename Op::Params* params, const mk_device* device, mk_plan* plan) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_REQUIRE(plan, MK_ERR_NULL, "plan is NULL");
    MK_TRY(check_device(device));
    MK_TRY(Op::check(*params));
    *plan = Op::plan(*params, *device);
    return MK_OK;
}

// plan() of an op with kernels for sm_90a only: Op::kName is its name.
template <class Op>
mk_status plan_sm90a(const typename Op::Params* params, const mk_device* device, mk_plan* plan) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_REQUIRE(plan, MK_ERR_NULL, "plan is NULL");
    MK_TRY(check_device(device));
    MK_TRY(Op::check(*params));
    MK_TRY(check_sm90a(Op::kName, *device));
    *plan = Op::plan(*params, *device);
    return MK_OK;
}

template <class T>
constexpr T ceil_div(T a, T b) {
    return a / b + (a % b != 0);  // a + b - 1 could overflow
}

// ---- checks that ops share; `name` is the field ----

mk_status check_pointer(const char* name, const void* pointer, int32_t dtype);
// <name>_stride, between `count` things of `least` elements.
mk_status check_stride(const char* name, int64_t stride, int32_t count, int32_t least);
// A tensor whose rows are `row_elements` long, `stride` apart. Not looked at when `rows` is 0.
mk_status check_rows(const char* name, const void* pointer, int64_t stride, int32_t rows,
                     int32_t row_elements, int32_t dtype);
mk_status check_size(const char* name, int32_t size, int32_t low, int32_t high);
mk_status check_activation_dtype(int32_t dtype);  // MK_BF16 or MK_F16
// [count] of MK_I32 or MK_I64 in `dtype`, the field <name>_dtype.
mk_status check_indices(const char* name, const void* pointer, int32_t count, int32_t dtype);

// Whether a tensor can be read 16 bytes at a time: its address and each of its strides.
bool is_16_byte(const void* pointer, int32_t dtype, std::initializer_list<int64_t> strides);

}  // namespace mk
