// Thin, as csrc/bindings.cpp: tensors come as addresses, which fastdp/cuda.py has checked. The key is read here, by the
// CPU, and goes to the kernels among their arguments: it is never in the GPU's memory.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "api.h"

namespace py = pybind11;

namespace fastdp::cuda {
namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

Stream stream(Address key, Domain domain, int64_t step) {
  Stream s{{}, domain, static_cast<uint64_t>(step)};
  std::memcpy(s.key, at<const void>(key), sizeof s.key);
  return s;
}

using TableOf = std::tuple<Address, int64_t, int64_t, int64_t>;
Table table(const TableOf& of) {
  const auto& [data, rows, n, stride] = of;
  return {at<const void>(data), rows, n, stride};
}

using SequencesOf = std::tuple<Address, int64_t, int64_t, int64_t, int64_t, int64_t>;
TableOfSequences sequences(const SequencesOf& of) {
  const auto& [data, records, positions, n, records_apart, apart] = of;
  return {at<const void>(data), records, positions, n, records_apart, apart};
}

template <class Step>
void bind_step(py::module_& m, const char* name) {
  using Tensor = std::tuple<Address, Address, Address, int64_t, uint64_t>;
  m.def(name, [](const Place& place, const Step& h, const std::vector<Tensor>& tensors, Address flat, Address key,
                 int64_t step) {
    std::vector<StepTensor> list;
    for (const auto& [p, state0, state1, n, offset] : tensors)
      list.push_back({at<float>(p), {at<float>(state0), at<float>(state1)}, n, offset});
    noise_step(place, list, at<const float>(flat), stream(key, Domain::noise, step), h);
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("__version__") = FASTDP_VERSION;
  py::module_::import("fastdp._kernels");  // SgdStep and AdamStep are its
  py::enum_<Element>(m, "Element").value("f32", Element::f32).value("bf16", Element::bf16).value("f16", Element::f16);
  // memory(bytes): the address of so much, of the device.
  py::class_<Place>(m, "Place").def(py::init([](Address stream, std::function<Address(std::size_t)> memory) {
    return Place{stream, [memory](std::size_t bytes) { return at<void>(memory(bytes)); }};
  }));
  m.def("sq_norms", [](const Place& place, Element type, const TableOf& g, Address out) {
    sq_norms(place, type, table(g), at<double>(out));
  });
  m.def("clip_sum", [](const Place& place, Element type, const TableOf& g, double max_norm, Address out) {
    clip_sum(place, type, table(g), max_norm, at<float>(out));
  });
  m.def("clip_factors",
        [](const Place& place, Address sq, int64_t batch, double scale, double max_norm, double gamma, Address out) {
          clip_factors(place, at<const double>(sq), batch, scale, max_norm, gamma, at<double>(out));
        });
  m.def("sum_rows", [](const Place& place, Element type, const TableOf& g, Address factors, Address out, bool add) {
    sum_rows(place, type, table(g), at<const double>(factors), at<float>(out), add);
  });
  m.def("scale_rows", [](const Place& place, const SequencesOf& x, Address factors, Address out) {
    scale_rows(place, sequences(x), at<const double>(factors), at<float>(out));
  });
  m.def("linear_sq_norms", [](const Place& place, Element type, const SequencesOf& a, const SequencesOf& b, bool bias,
                              Address out, Address bounds) {
    linear_sq_norms(place, type, sequences(a), sequences(b), bias, at<double>(out), at<SequenceBounds>(bounds));
  });
  m.def("embedding_sq_norms",
        [](const Place& place, Element type, Address index, const SequencesOf& b, int64_t padding_index, Address out) {
          embedding_sq_norms(place, type, at<const int64_t>(index), sequences(b), padding_index, at<double>(out));
        });
  m.def("gaussian_noise", [](const Place& place, Element type, Address x, int64_t n, double std, Address key,
                             int64_t step, int64_t first) {
    gaussian_noise(place, type, at<void>(x), n, stream(key, Domain::noise, step), static_cast<uint64_t>(first), std);
  });
  bind_step<SgdStep>(m, "noise_step");
  bind_step<AdamStep>(m, "noise_step");
  m.def("poisson_sample", [](const Place& place, int64_t n, double rate, Address key, int64_t step, Address ids,
                             int64_t room, Address total) {
    poisson_sample(place, n, rate, stream(key, Domain::sampling, step), at<int64_t>(ids), room, at<int64_t>(total));
  });
}

}  // namespace fastdp::cuda
