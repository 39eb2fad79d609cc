#include "launch/op.h"
#include "sampling/sampling_tiles.h"

namespace mk {
namespace {

// argmax and sample have the fields of the logits in common, and their launch.
template <class P>
mk_status check_logits(const P& p) {
    MK_REQUIRE(p.dtype == MK_BF16 || p.dtype == MK_F16 || p.dtype == MK_F32, MK_ERR_DTYPE,
               "dtype must be MK_BF16 (1), MK_F16 (2) or MK_F32 (3), got %d", p.dtype);
    MK_TRY(check_size("rows", p.rows, 0, INT32_MAX));
    MK_TRY(check_size("vocab", p.vocab, 1, kSamplingMaxVocab));
    MK_TRY(check_rows("logits", p.logits, p.logits_stride, p.rows, p.vocab, p.dtype));
    return check_rows("out", p.out, 1, p.rows, 1, MK_I64);
}

template <class P>
mk_plan plan_logits(const char* op, const P& p, const mk_device& device) {
    const bool aligned = p.vocab % 8 == 0 && is_16_byte(p.logits, p.dtype, {p.logits_stride});
    mk_plan plan = make_plan(op, device, dtype_key(p.dtype, aligned));
    plan.grid[0] = p.rows;
    plan.block[0] = kSamplingThreads;
    return plan;
}

template <class P>
std::string logits_shape(const char* op, const P& p) {
    return std::string(op) + " " + dtype_name(p.dtype) + " rows " + std::to_string(p.rows) +
           " vocab " + std::to_string(p.vocab);
}

struct Argmax {
    using Params = mk_argmax_params;
    static mk_status check(const Params& p) { return check_logits(p); }
    static mk_plan plan(const Params& p, const mk_device& d) { return plan_logits("argmax", p, d); }
    static const Params& args(const Params& p) { return p; }
    static std::string shape(const Params& p) { return logits_shape("argmax", p); }
};

struct Sample {
    using Params = mk_sample_params;
    static mk_status check(const Params& p) {
        MK_TRY(check_logits(p));
        return check_rows("sampling", p.sampling, 1, p.rows, 1, MK_I64);
    }
    static mk_plan plan(const Params& p, const mk_device& d) { return plan_logits("sample", p, d); }
    static const Params& args(const Params& p) { return p; }
    static std::string shape(const Params& p) { return logits_shape("sample", p); }
};

}  // namespace
}  // namespace mk

extern "C" {

mk_status mk_argmax(const mk_argmax_params* params, void* stream) {
    return mk::run<mk::Argmax>(params, stream);
}

mk_status mk_argmax_plan(const mk_argmax_params* params, const mk_device* device, mk_plan* plan) {
    return mk::plan<mk::Argmax>(params, device, plan);
}

mk_status mk_sample(const mk_sample_params* params, void* stream) {
    return mk::run<mk::Sample>(params, stream);
}

mk_status mk_sample_plan(const mk_sample_params* params, const mk_device* device, mk_plan* plan) {
    return mk::plan<mk::Sample>(params, device, plan);
}

}  // extern "C"
