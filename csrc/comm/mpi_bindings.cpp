#include <mpi.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "communicator.h"
#include "mpi_transport.h"

namespace py = pybind11;
using namespace fastdp::comm;

namespace {

// Called from waits that have released the GIL.
void check_python_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::unique_ptr<Communicator> make_communicator(MPI_Fint comm, double timeout_seconds, std::size_t segment_bytes) {
  const WaitPolicy policy{timeout_seconds, check_python_signals};
  Wait wait(policy);
  return std::make_unique<Communicator>(std::make_unique<MpiTransport>(MPI_Comm_f2c(comm), wait), policy,
                                        segment_bytes);
}

// Called in the middle of a collective, without the GIL.
void* memory_from(const py::function& allocate, std::size_t elements) {
  py::gil_scoped_acquire gil;
  try {
    return reinterpret_cast<void*>(allocate(elements).cast<std::uintptr_t>());
  } catch (const py::error_already_set& error) {
    const std::string text = error.what();
    throw Failure("no memory for " + std::to_string(elements) + " elements: " + text.substr(0, text.find('\n')));
  }
}

std::string loaded_library() {
  // 8192 is MPICH's MPI_MAX_LIBRARY_VERSION_STRING, Open MPI's is 256: when the library that is loaded is not the
  // one compiled for, and that is what this call finds out, the larger one is needed.
  char text[8192] = {};
  int length = 0;
  MPI_Get_library_version(text, &length);
  return text;
}

constexpr const char* built_for() {
#if defined(OPEN_MPI)
  return "Open MPI";
#else
  return "MPICH";  // and those that share its binary interface: Intel MPI, Cray MPICH, MVAPICH
#endif
}

py::tuple names_of(std::span<const std::string_view> names) {
  py::tuple result(names.size());
  for (std::size_t i = 0; i < names.size(); ++i) result[i] = py::str(std::string(names[i]));
  return result;
}

}  // namespace

PYBIND11_MODULE(_mpi, m) {
  m.attr("__version__") = FASTDP_VERSION;
  m.attr("built_for") = built_for();
  m.attr("dtypes") = names_of(kDTypeNames);
  m.attr("summable_dtypes") = names_of(std::span(kDTypeNames).first(kSummableDTypes));
  m.attr("algorithms") = names_of(kAlgorithmNames);
  m.def("loaded_library", loaded_library);

  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Failure& failure) {
      py::set_error(py::module_::import("fastdp.errors").attr("CommError"), failure.what());
    }
  });

  using release_gil = py::call_guard<py::gil_scoped_release>;
  py::class_<Communicator>(m, "Communicator")
      .def(py::init(&make_communicator), py::arg("fortran_handle"), py::arg("timeout"), py::arg("segment_bytes"),
           release_gil())
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("size", &Communicator::size)
      .def_property_readonly("failure", &Communicator::failure)
      .def_property_readonly("pending", &Communicator::pending)
      .def(
          "all_reduce",
          [](Communicator& self, std::uintptr_t data, std::size_t count, int dtype, int algorithm) {
            self.all_reduce(reinterpret_cast<void*>(data), count, static_cast<DType>(dtype),
                            static_cast<Algorithm>(algorithm));
          },
          py::arg("data"), py::arg("count"), py::arg("dtype"), py::arg("algorithm"), release_gil())
      .def(
          "reduce_scatter",
          [](Communicator& self, std::uintptr_t data, std::size_t count, int dtype) {
            self.reduce_scatter(reinterpret_cast<void*>(data), count, static_cast<DType>(dtype));
          },
          py::arg("data"), py::arg("count"), py::arg("dtype"), release_gil())
      .def(
          "all_gather",
          [](Communicator& self, std::uintptr_t part, std::size_t count, int dtype, std::int64_t out,
             const py::function& result) {
            self.all_gather(reinterpret_cast<const void*>(part), count, static_cast<DType>(dtype), out,
                            [&](std::size_t elements) { return memory_from(result, elements); });
          },
          py::arg("part"), py::arg("count"), py::arg("dtype"), py::arg("out"), py::arg("result"), release_gil())
      .def(
          "broadcast",
          [](Communicator& self, std::uintptr_t data, std::size_t count, int dtype, int root) {
            self.broadcast(reinterpret_cast<void*>(data), count, static_cast<DType>(dtype), root);
          },
          py::arg("data"), py::arg("count"), py::arg("dtype"), py::arg("root"), release_gil())
      .def("share_cores", &Communicator::share_cores)
      .def("barrier", &Communicator::barrier, release_gil());
}
