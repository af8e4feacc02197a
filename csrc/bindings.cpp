// Thin: unpack, release the GIL, call. Tensors come as addresses, which fastdp/ops.py has checked.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops.h"
#include "threads.h"

namespace py = pybind11;

namespace fastdp {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

template <class T>
Rows<T> rows(Address a, int64_t count, int64_t n, int64_t stride) {
  return {at<const T>(a), count, n, stride};
}

Stream stream(Address key, Domain domain, int64_t step) {
  Stream s{{}, domain, static_cast<uint64_t>(step)};
  std::memcpy(s.key, at<const void>(key), sizeof s.key);
  return s;
}

template <class Call>
auto with_type(DType dtype, Call call) {
  switch (dtype) {
    case DType::f32: return call(float{});
    case DType::bf16: return call(bf16{});
    case DType::f64: return call(double{});
  }
  throw std::invalid_argument("dtype=" + std::to_string(static_cast<int>(dtype)));
}

template <class Call>
void with_step_type(DType dtype, Call call) {
  if (dtype == DType::f64) return call(double{});
  if (dtype == DType::f32) return call(float{});
  throw std::invalid_argument("dtype: must be float32 or float64");
}

py::array_t<int64_t> as_array(std::vector<int64_t>&& ids) {
  auto* owned = new std::vector<int64_t>(std::move(ids));
  py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  return py::array_t<int64_t>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

void bind_clipping(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "sq_norms",
      [](Address g, DType dtype, int64_t batch, int64_t n, int64_t stride, Address out, int threads) {
        with_type(dtype, [&](auto t) { sq_norms(rows<decltype(t)>(g, batch, n, stride), at<double>(out), threads); });
      },
      Release());
  // Of a and of b: address, n, and how far records and positions are apart; whether there is a bias.
  using Operand = std::tuple<Address, int64_t, int64_t, int64_t>;
  m.def(
      "linear_sq_norms",
      [](const std::vector<std::tuple<Operand, Operand, bool>>& layers, DType dtype, int64_t batch, int64_t positions,
         Address out, Address bounds, int threads) {
        with_type(dtype, [&](auto t) {
          using T = decltype(t);
          const auto sequences = [&](const Operand& x) {
            const auto& [address, n, records_apart, apart] = x;
            return Sequences<T>{at<const T>(address), batch, positions, n, records_apart, apart};
          };
          std::vector<LinearRows<T>> list;
          for (const auto& [a, b, bias] : layers) list.push_back({sequences(a), sequences(b), bias});
          linear_sq_norms(list, at<double>(out), at<SequenceBounds>(bounds), threads);
        });
      },
      Release());
  m.def(
      "layer_norm_gradients",
      [](Address a, Address b, DType dtype, int64_t batch, int64_t positions, int64_t n, double eps, bool centre,
         Address weight, Address bias, int threads) {
        with_type(dtype, [&](auto t) {
          using T = decltype(t);
          using F = typename SumOf<T>::type;
          const int64_t count = batch * positions;
          layer_norm_gradients(rows<T>(a, count, n, n), rows<T>(b, count, n, n), batch, eps, centre, at<F>(weight),
                               at<F>(bias), threads);
        });
      },
      Release());
  m.def(
      "group_norm_gradients",
      [](Address a, Address b, DType dtype, int64_t batch, int64_t channels, int64_t positions, int64_t groups,
         double eps, Address weight, Address bias, int threads) {
        with_type(dtype, [&](auto t) {
          using T = decltype(t);
          using F = typename SumOf<T>::type;
          const int64_t count = batch * channels;
          group_norm_gradients(rows<T>(a, count, positions, positions), rows<T>(b, count, positions, positions), batch,
                               groups, eps, at<F>(weight), at<F>(bias), threads);
        });
      },
      Release());
  m.def(
      "convolution_gradients",
      [](Address a, Address b, DType dtype, int64_t batch, int64_t groups, int64_t channels, int64_t outputs,
         const std::array<std::array<int64_t, 3>, 6>& sizes, Address out, int threads) {
        const auto& [input, kernel, output, stride, padding, dilation] = sizes;
        const ConvolutionShape s{batch, groups, channels, outputs, input, kernel, output, stride, padding, dilation};
        with_step_type(dtype, [&](auto t) {
          using F = decltype(t);
          convolution_gradients(s, at<const F>(a), at<const F>(b), at<F>(out), threads);
        });
      },
      Release());
  m.def(
      "clip_factors",
      [](Address sq, DType dtype, int64_t batch, double scale, double max_norm, Address out,
         std::optional<double> gamma) {
        return with_type(dtype, [&](auto t) {
          return clip_factors<decltype(t)>(at<const double>(sq), batch, scale, max_norm, at<double>(out), gamma);
        });
      },
      Release());
  m.def(
      "clip_sum",
      [](Address g, DType dtype, int64_t batch, int64_t n, int64_t stride, double max_norm, Address out, int threads) {
        with_type(dtype, [&](auto t) {
          using T = decltype(t);
          clip_sum(rows<T>(g, batch, n, stride), max_norm, at<typename SumOf<T>::type>(out), threads);
        });
      },
      Release());
  m.def(
      "sum_rows",
      [](Address g, DType dtype, int64_t batch, int64_t n, int64_t stride, Address factors, Address out, bool add,
         int threads) {
        with_type(dtype, [&](auto t) {
          using T = decltype(t);
          sum_rows(rows<T>(g, batch, n, stride), at<const double>(factors), at<typename SumOf<T>::type>(out), add,
                   threads);
        });
      },
      Release());
  m.def(
      "scale_rows",
      [](Address x, DType dtype, int64_t records, int64_t positions, int64_t n, int64_t records_apart, int64_t apart,
         Address factors, Address out, Address sums, int threads) {
        with_type(dtype, [&](auto t) {
          using T = decltype(t);
          scale_rows(Sequences<T>{at<const T>(x), records, positions, n, records_apart, apart},
                     at<const double>(factors), at<T>(out), at<typename SumOf<T>::type>(sums), threads);
        });
      },
      Release());
}

template <class Step>
void bind_step(py::module_& m) {
  using Parameter = std::tuple<Address, Address, Address, int64_t, uint64_t>;
  m.def("noise_step", [](const Step& h, const std::vector<Parameter>& parameters, Address flat, DType dtype,
                         Address key, int64_t step, const StepShare& share, int threads) {
    std::vector<StepParameter> list;
    for (const auto& [p, state0, state1, n, offset] : parameters) list.push_back({p, {state0, state1}, n, offset});
    const Stream s = stream(key, Domain::noise, step);
    py::gil_scoped_release release;
    with_step_type(dtype, [&](auto t) { noise_step(list, at<const decltype(t)>(flat), s, h, share, threads); });
  });
}

void bind_steps(py::module_& m) {
  py::class_<SgdStep>(m, "SgdStep")
      .def(py::init([](double std, double scale, double weight_decay, double lr, double momentum, double dampening,
                       bool nesterov, bool first) {
             return SgdStep{{std, scale, weight_decay}, lr, momentum, dampening, nesterov, first};
           }),
           py::kw_only(), py::arg("std"), py::arg("scale"), py::arg("weight_decay"), py::arg("lr"), py::arg("momentum"),
           py::arg("dampening"), py::arg("nesterov"), py::arg("first"));
  py::class_<AdamStep>(m, "AdamStep")
      .def(py::init([](double std, double scale, double weight_decay, double beta1, double beta2, double eps,
                       double keep, double step_size, double root) {
             return AdamStep{{std, scale, weight_decay}, beta1, beta2, eps, keep, step_size, root};
           }),
           py::kw_only(), py::arg("std"), py::arg("scale"), py::arg("weight_decay"), py::arg("beta1"), py::arg("beta2"),
           py::arg("eps"), py::arg("keep"), py::arg("step_size"), py::arg("root"));
  py::class_<StepShare>(m, "StepShare")
      .def(py::init<>())
      .def(py::init([](uint64_t begin, uint64_t end, int64_t sums, int64_t sums_apart, int64_t copies,
                       int64_t copies_apart, int64_t first_copy) {
             return StepShare{begin, end, sums, sums_apart, copies, copies_apart, first_copy};
           }),
           py::kw_only(), py::arg("begin"), py::arg("end"), py::arg("sums"), py::arg("sums_apart"), py::arg("copies"),
           py::arg("copies_apart"), py::arg("first_copy"));
  bind_step<SgdStep>(m);
  bind_step<AdamStep>(m);
}

// Of each tensor its address, and elements from row to row.
using Placed = std::pair<Address, int64_t>;

void bind_cells(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "lstm_forward",
      [](DType dtype, int64_t batch, int64_t n, const std::array<Placed, 4>& tensors, int threads) {
        with_step_type(dtype, [&](auto t) {
          using T = decltype(t);
          const auto x = [&](int k) { return MutableRows<T>{at<T>(tensors[k].first), batch, n, tensors[k].second}; };
          lstm_forward(x(0), x(1), x(2), x(3), threads);
        });
      },
      Release());
  m.def(
      "lstm_backward",
      [](DType dtype, int64_t batch, int64_t n, const std::array<Placed, 5>& tensors, int threads) {
        with_step_type(dtype, [&](auto t) {
          using T = decltype(t);
          const auto x = [&](int k) { return MutableRows<T>{at<T>(tensors[k].first), batch, n, tensors[k].second}; };
          lstm_backward(x(0), x(1), x(2), x(3), x(4), threads);
        });
      },
      Release());
}

void bind_noise(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  const auto def_noise = [&m](const char* name, Domain domain, auto add) {
    m.def(
        name,
        [=](Address x, DType dtype, int64_t n, double std, Address key, int64_t step, int64_t first, int threads) {
          const Stream s = stream(key, domain, step);
          with_type(dtype, [&](auto t) { add(at<decltype(t)>(x), n, s, static_cast<uint64_t>(first), std, threads); });
        },
        Release());
  };
  def_noise("gaussian_noise", Domain::noise, [](auto... of) { gaussian_noise(of...); });
  def_noise("secure_noise", Domain::secure_noise, [](auto... of) { secure_noise(of...); });
  m.def("poisson_sample", [](int64_t n, double rate, Address key, int64_t step) {
    const Stream s = stream(key, Domain::sampling, step);
    std::vector<int64_t> ids;
    {
      py::gil_scoped_release release;
      ids = poisson_sample(n, rate, s);
    }
    return as_array(std::move(ids));
  });
  py::class_<Stack>(m, "Stack")
      .def(py::init<std::vector<Address>, std::vector<int64_t>, int64_t>())
      .def(
          "gather",
          [](const Stack& stack, Address ids, int64_t n, Address out, int threads) {
            return gather(stack, at<const int64_t>(ids), n, at<char>(out), threads);
          },
          Release());
  m.def(
      "read_memory",
      [](Address words, int64_t n, int threads) { return read_memory(at<const uint64_t>(words), n, threads); },
      Release());
  // For tests: the generator against RFC 8439, and the transform on words of the test's choice.
  m.def("keystream", [](Address key, uint32_t domain, uint64_t step, uint64_t first, int64_t blocks, Address words) {
    kernels().keystream(stream(key, Domain{domain}, static_cast<int64_t>(step)), first, blocks, at<uint32_t>(words));
  });
  m.def("normals_from_words", [](Address words, int64_t n, Address z) {
    kernels().normals_from_words(at<const uint32_t>(words), n, at<float>(z));
  });
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  m.attr("__version__") = FASTDP_VERSION;
  py::enum_<DType>(m, "DType").value("f32", DType::f32).value("bf16", DType::bf16).value("f64", DType::f64);
  m.def("isa", [] { return kernels().name; });
  m.def("threads_available", &threads_available);
  bind_clipping(m);
  bind_noise(m);
  bind_steps(m);
  bind_cells(m);
}

}  // namespace fastdp
