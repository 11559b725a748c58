// Names of threads, for reports.
#pragma once

#include "runtime.h"

#include <pthread.h>
#include <torch/csrc/utils/pybind.h>

namespace sim {

// Python's name of the calling thread; else, as for threads of the autograd engine, the operating system's.
inline std::string found_thread_name() {
  if (Py_IsInitialized()) {
    pybind11::gil_scoped_acquire interpreter;
    auto threading = pybind11::module_::import("threading");
    auto thread = threading.attr("_active").attr("get")(threading.attr("get_ident")());  // current_thread() may make one
    if (!thread.is_none()) return thread.attr("name").cast<std::string>();
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
