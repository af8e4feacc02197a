#include <mpi.h>
#include <pybind11/functional.h>
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "communicator.h"
#include "dltensor.h"
#include "mpi_transport.h"
#include "sparse.h"

namespace py = pybind11;
using namespace fastdp::comm;

namespace {

// Python's lock in the midst of a SharedSum: whether it is kept, and where the thread's state is once it is not.
struct Lock {
  bool kept = false;
  PyThreadState* state = nullptr;
  void let_go() {
    if (kept && state == nullptr) state = PyEval_SaveThread();
  }
};
thread_local Lock lock;

// Called from waits, with Python's lock or without. A handler may call collectives of its own.
void check_python_signals() {
  py::gil_scoped_acquire gil;
  struct Aside {
    Lock mine = std::exchange(lock, {});
    ~Aside() { lock = mine; }
  } aside;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::unique_ptr<Communicator> make_communicator(MPI_Fint comm, double timeout_seconds, std::size_t segment_bytes) {
  const WaitPolicy policy{timeout_seconds, check_python_signals, [] { lock.let_go(); }};
  Wait wait(policy);
  return std::make_unique<Communicator>(std::make_unique<MpiTransport>(MPI_Comm_f2c(comm), wait), policy,
                                        segment_bytes);
}

// Called in the middle of a collective, without the GIL, or with it by whoever asks whether one has ended.
void* memory_from(const py::function& allocate, std::size_t elements) {
  py::gil_scoped_acquire gil;
  try {
    return reinterpret_cast<void*>(allocate(elements).cast<std::uintptr_t>());
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // Ctrl-C
    const std::string text = error.what();
    throw Failure("no memory for " + std::to_string(elements) + " elements: " + text.substr(0, text.find('\n')));
  }
}

// Its last copy may be destroyed without the GIL.
std::function<void*(std::size_t)> memory_of(py::function allocate) {
  std::shared_ptr<py::function> kept(new py::function(std::move(allocate)), [](py::function* function) {
    py::gil_scoped_acquire gil;
    delete function;
  });
  return [kept](std::size_t elements) { return memory_from(*kept, elements); };
}

// What a collective needs: the tensor that it writes to, or None, and whatever else must stay.
struct Kept {
  py::object written, others;
};

Communicator::Keep keep(py::object written, py::object others) {
  return std::shared_ptr<Kept>(new Kept{std::move(written), std::move(others)}, [](Kept* kept) {
    py::gil_scoped_acquire gil;
    delete kept;
  });
}

// Autograd must not use what it saved of a tensor that was written to since. torch.autograd.graph.increment_version
// without its wrapper, which costs as much as the sum of a small tensor.
void increment_version(const py::handle& tensor) {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> function;
  function.call_once_and_store_result(
      [] { return py::object(py::module_::import("torch").attr("_C").attr("_increment_version")); });
  function.get_stored()(py::make_tuple(tensor));
}

void settle(const std::vector<Communicator::Keep>& ended) {
  for (const Communicator::Keep& each : ended) {
    const py::object& written = static_cast<const Kept*>(each.get())->written;
    if (!written.is_none()) increment_version(written);
  }
}

void wait_for(Communicator& self, std::int64_t sequence) {
  std::vector<Communicator::Keep> ended;
  {
    py::gil_scoped_release release;
    ended = self.wait(sequence);
  }
  settle(ended);
}

bool has_ended(Communicator& self, std::int64_t sequence) {
  std::pair<bool, std::vector<Communicator::Keep>> found;
  {
    py::gil_scoped_release release;
    found = self.test(sequence);
  }
  settle(found.second);
  return found.first;
}

std::uintptr_t address_of(const void* memory) { return reinterpret_cast<std::uintptr_t>(memory); }

using ProcessPair = std::pair<std::int64_t, std::int64_t>;

std::unique_ptr<Hosts> make_hosts(Communicator& self, const std::vector<int>& host,
                                  std::shared_ptr<SharedMemory> memory, const std::vector<ProcessPair>& processes) {
  std::vector<Process> list;
  for (const auto& [id, began] : processes) list.push_back({id, began});
  return std::make_unique<Hosts>(self.transport(), host, std::move(memory), std::move(list));
}

void bind_memory(py::module_& m) {
  // As a buffer: tensors over it keep it mapped.
  py::class_<SharedMemory, std::shared_ptr<SharedMemory>>(m, "SharedMemory", py::buffer_protocol())
      .def_static("create", &SharedMemory::create, py::arg("bytes"))
      .def_static("open", &SharedMemory::open, py::arg("owner"), py::arg("file"), py::arg("bytes"))
      .def("reserve", &SharedMemory::reserve, py::arg("begin"), py::arg("bytes"),
           py::call_guard<py::gil_scoped_release>())
      .def("map", &SharedMemory::map)
      .def("touch", &SharedMemory::touch, py::call_guard<py::gil_scoped_release>())
      .def("close_file", &SharedMemory::close_file)
      .def_property_readonly("file", &SharedMemory::file)
      .def_property_readonly("address", [](const SharedMemory& self) { return address_of(self.data()); })
      .def_buffer([](const SharedMemory& self) {
        return py::buffer_info(reinterpret_cast<unsigned char*>(self.data()), static_cast<py::ssize_t>(self.bytes()));
      });
  m.def("process", [](std::int64_t id) {
    const Process process = Process::of(id);
    return ProcessPair{process.id, process.began};
  });
  m.def("team_bytes", &Team::bytes, py::arg("ranks"));
  // For benchmarks: what an all-reduce of float32 comes to without meetings, a part of it over all ranks and into all.
  m.def("sum_in_place", [](const std::vector<std::uintptr_t>& tensors, std::size_t begin, std::size_t end) {
    std::vector<float*> out;
    for (const std::uintptr_t address : tensors) out.push_back(reinterpret_cast<float*>(address) + begin);
    sum_ranks(const_cast<const float**>(out.data()), static_cast<int>(out.size()), out.data(),
              static_cast<int>(out.size()), end - begin);
  });
  m.attr("max_local_ranks") = Team::kMaxRanks;
  m.attr("max_segments") = Place::kSegments;
}

using RowAddresses = std::tuple<std::uintptr_t, std::size_t, std::uintptr_t>;

RowList rows_at(const RowAddresses& addresses) {
  const auto& [indices, count, values] = addresses;
  return {reinterpret_cast<const std::int64_t*>(indices), count, reinterpret_cast<const void*>(values)};
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

// all_reduce(x) of fastdp/comm.py for ranks that share memory, in place: without a Python frame, pybind11's dispatch
// and a release of the lock for waits that are short, 4 KiB take 0.9 µs instead of 1.4. Any other way of calling it
// goes to `otherwise`.
struct SharedSum {
  Communicator* communicator;
  py::object owner;  // keeps it
  TensorReader reader;
  py::object otherwise;

  // Up to here, Python's lock is kept until a wait is not short.
  static constexpr std::size_t kKeepLockBytes = 64 * 1024;
};

std::vector<Communicator::Keep> sum_now(const SharedSum& self, const TensorReader::Found& x) {
  lock = {.kept = true};
  if (x.count * item_bytes(x.dtype) > SharedSum::kKeepLockBytes) lock.let_go();
  struct Return {
    ~Return() {
      if (lock.state != nullptr) PyEval_RestoreThread(lock.state);
      lock = {};
    }
  } at_end;
  return self.communicator->sum_shared(x.data, x.data, x.count, x.dtype);
}

PyObject* call_shared_sum(PyObject* capsule, PyObject* const* arguments, Py_ssize_t count, PyObject* names) {
  auto& self = *static_cast<SharedSum*>(PyCapsule_GetPointer(capsule, nullptr));
  TensorReader::Found found;
  if (count != 1 || names != nullptr || !self.reader.find(arguments[0], found))
    return PyObject_Vectorcall(self.otherwise.ptr(), arguments, count, names);
  PyObject* x = arguments[0];
  try {
    settle(sum_now(self, found));
    increment_version(x);
    return Py_NewRef(x);
  } catch (const Failure& failure) {
    py::set_error(py::module_::import("fastdp.errors").attr("CommError"), failure.what());
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    py::set_error(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef shared_sum_method = {"all_reduce", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_shared_sum)),
                                 METH_FASTCALL | METH_KEYWORDS, "See fastdp.comm.Communicator.all_reduce."};

py::object shared_sum(const py::object& self, const py::object& tensor, const py::object& otherwise) {
  auto* sum = new SharedSum{&self.cast<Communicator&>(), self, TensorReader(tensor), otherwise};
  const py::capsule capsule(sum, [](void* pointer) { delete static_cast<SharedSum*>(pointer); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&shared_sum_method, capsule.ptr()));
}

}  // namespace

PYBIND11_MODULE(_mpi, m) {
  m.attr("__version__") = FASTDP_VERSION;
  m.attr("built_for") = built_for();
  m.attr("dtypes") = names_of(kDTypeNames);
  m.attr("summable_dtypes") = names_of(std::span(kDTypeNames).first(kSummableDTypes));
  m.attr("algorithms") = names_of(kAlgorithmNames);
  m.attr("operations") = names_of(kOperationNames);
  m.def("loaded_library", loaded_library);

  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Failure& failure) {
      py::set_error(py::module_::import("fastdp.errors").attr("CommError"), failure.what());
    }
  });

  bind_memory(m);
  m.def(
      "row_outside",
      [](std::uintptr_t indices, std::size_t count, std::int64_t table) {
        return row_outside(reinterpret_cast<const std::int64_t*>(indices), count, table);
      },
      py::arg("indices"), py::arg("count"), py::arg("table"));
  py::class_<RowSum>(m, "RowSum")
      .def(py::init([](const std::vector<RowAddresses>& lists, std::int64_t table) {
             std::vector<RowList> rows;
             for (const RowAddresses& addresses : lists) rows.push_back(rows_at(addresses));
             return RowSum(std::move(rows), table);
           }),
           py::arg("lists"), py::arg("table"))
      .def_property_readonly("count", &RowSum::count)
      .def(
          "write",
          [](const RowSum& self, std::size_t width, bool wide, std::uintptr_t indices, std::uintptr_t sums) {
            auto* to = reinterpret_cast<std::int64_t*>(indices);
            if (wide)
              self.write(width, to, reinterpret_cast<double*>(sums));
            else
              self.write(width, to, reinterpret_cast<float*>(sums));
          },
          py::arg("width"), py::arg("wide"), py::arg("indices"), py::arg("sums"),
          py::call_guard<py::gil_scoped_release>());
  py::class_<Communicator>(m, "Communicator")
      .def(py::init(&make_communicator), py::arg("fortran_handle"), py::arg("timeout"), py::arg("segment_bytes"),
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("size", &Communicator::size)
      .def_property_readonly("failure", &Communicator::failure)
      .def_property_readonly("pending", &Communicator::pending)
      .def_property_readonly("noted", &Communicator::noted)
      .def("set_note", &Communicator::set_note, py::arg("note"))
      .def("leave", &Communicator::leave)
      .def("forked", &Communicator::forked)
      .def("share_cores", &Communicator::share_cores)
      .def("fail", &Communicator::fail, py::arg("reason"))
      .def(
          "leave_rows",
          [](Communicator& self, const RowAddresses& rows, std::size_t row_bytes) {
            leave_rows(self.team(), rows_at(rows), row_bytes);
          },
          py::arg("rows"), py::arg("row_bytes"))
      .def(
          "rows_left",
          [](Communicator& self, std::size_t row_bytes) {
            std::vector<RowAddresses> lists;
            for (const RowList& rows : rows_left(self.team(), row_bytes))
              lists.emplace_back(address_of(rows.indices), rows.count, address_of(rows.values));
            return lists;
          },
          py::arg("row_bytes"))
      .def(
          "join",
          [](Communicator& self, const std::vector<int>& host, const std::shared_ptr<SharedMemory>& memory,
             const std::vector<ProcessPair>& processes) { self.join(make_hosts(self, host, memory, processes)); },
          py::arg("host"), py::arg("memory"), py::arg("processes"))
      .def("segments", [](Communicator& self) { return self.segments().kept(); })
      .def(
          "add_segment",
          [](Communicator& self, const std::shared_ptr<SharedMemory>& memory, std::int64_t number,
             std::size_t part_bytes, int local_rank) { self.segments().add(memory, number, part_bytes, local_rank); },
          py::arg("memory"), py::arg("number"), py::arg("part_bytes"), py::arg("local_rank"))
      .def("shared_sum", &shared_sum, py::arg("tensor"), py::arg("otherwise"))
      .def(
          "sum",
          [](Communicator& self, int operation, std::uintptr_t data, std::uintptr_t out, std::size_t count, int dtype,
             int algorithm, py::object written, py::object others, bool later) {
            const std::int64_t number = self.start_sum(static_cast<Operation>(operation), reinterpret_cast<void*>(data),
                                                       reinterpret_cast<void*>(out), count, static_cast<DType>(dtype),
                                                       static_cast<Algorithm>(algorithm), keep(written, others));
            if (!later) wait_for(self, number);  // here, so that no signal handler raises in between
            return number;
          },
          py::arg("operation"), py::arg("data"), py::arg("out"), py::arg("count"), py::arg("dtype"),
          py::arg("algorithm"), py::arg("written"), py::arg("others"), py::arg("later"))
      .def(
          "all_gather",
          [](Communicator& self, std::uintptr_t part, std::size_t count, int dtype, std::int64_t out,
             const py::function& result, py::object others) {
            const auto* data = reinterpret_cast<const void*>(part);
            wait_for(self, self.start_all_gather(data, count, static_cast<DType>(dtype), out, memory_of(result),
                                                 keep(py::none(), std::move(others))));
          },
          py::arg("part"), py::arg("count"), py::arg("dtype"), py::arg("out"), py::arg("result"), py::arg("others"))
      .def(
          "broadcast",
          [](Communicator& self, std::uintptr_t data, std::size_t count, int dtype, int root, py::object written) {
            wait_for(self, self.start_broadcast(reinterpret_cast<void*>(data), count, static_cast<DType>(dtype), root,
                                                keep(std::move(written), py::none())));
          },
          py::arg("data"), py::arg("count"), py::arg("dtype"), py::arg("root"), py::arg("written"))
      .def(
          "meet",
          [](Communicator& self, int operation, std::size_t count, int dtype, std::int64_t width) {
            wait_for(self,
                     self.start_meeting(static_cast<Operation>(operation), count, static_cast<DType>(dtype), width));
          },
          py::arg("operation"), py::arg("count"), py::arg("dtype"), py::arg("width"))
      .def("test", &has_ended, py::arg("sequence"))
      .def("wait", &wait_for, py::arg("sequence"));
  m.def("unfinished", [] { return Communicator::unfinished.load(); });
}
