// Calls of CPU ops, recorded while they are made and played back without Python. Included by
// native.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "minitron_kernels.h"

// A list of calls with the pointers and sizes that they had. Whoever records keeps the memory.
class CpuRecording {
  public:
    ~CpuRecording() { stop(); }

    // Records the calling thread's calls from now on.
    void start() {
        if (current) throw std::runtime_error("this thread is recording already");
        current = this;
    }
    void stop() {
        if (current == this) current = nullptr;
    }
    // Makes the calls again, up to the first that fails.
    mk_status replay() const {
        for (const auto& call : calls_) {
            if (const mk_status status = call(); status != MK_OK) return status;
        }
        return MK_OK;
    }
    size_t size() const { return calls_.size(); }

    // Makes a call, and records it if this thread does so and it succeeds.
    template <class Call>
    static mk_status run(Call call) {
        mk_status status;
        {
            const pybind11::gil_scoped_release release;
            status = call();
        }
        if (current && status == MK_OK) current->calls_.push_back(std::move(call));
        return status;
    }

  private:
    std::vector<std::function<mk_status()>> calls_;
    static inline thread_local CpuRecording* current = nullptr;
};

// `check` raises the exception that stands for a status.
inline void def_recording(pybind11::module_& m, void (*check)(mk_status)) {
    namespace py = pybind11;
    py::class_<CpuRecording>(m, "CpuRecording")
        .def(py::init())
        .def("start", &CpuRecording::start)
        .def("stop", &CpuRecording::stop)
        .def("replay",
             [check](const CpuRecording& recording) {
                 mk_status status;
                 {
                     const py::gil_scoped_release release;
                     status = recording.replay();
                 }
                 check(status);
             })
        .def("__len__", &CpuRecording::size);
}
