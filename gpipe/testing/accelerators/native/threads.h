// Names of threads, for reports.
#pragma once

#include "runtime.h"

#include <pthread.h>
#include <torch/csrc/utils/pybind.h>

namespace sim {

// Python's threads by number. Kept, as an import needs the builtins of whatever frame happens to free a tensor.
inline pybind11::dict& threads_by_number() {
  static auto* threads = new pybind11::dict(pybind11::module_::import("threading").attr("_active"));
  return *threads;
}

// Python's name of the calling thread; else, as for threads of the autograd engine, the operating system's.
inline std::string found_thread_name() {
  if (Py_IsInitialized()) {
    pybind11::gil_scoped_acquire interpreter;
    try {
      pybind11::int_ number(PyThread_get_thread_ident());
      auto& threads = threads_by_number();
      if (threads.contains(number)) return threads[number].attr("name").cast<std::string>();
    } catch (pybind11::error_already_set&) {  // nothing may come out of where memory is freed
    }
  }
  char name[64] = "";
  pthread_getname_np(pthread_self(), name, sizeof name);
  return name;
}

inline const std::string* thread_name() {
  static thread_local const std::string* name = nullptr;
  if (!name) name = interned(found_thread_name());
  return name;
}

}  // namespace sim
