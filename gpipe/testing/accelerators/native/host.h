// The host's own reading of pinned memory into which a non-blocking copy is on its way.
#pragma once

#include "operators.h"

#include <ATen/record_function.h>

namespace sim {

// Whether an operator takes a tensor's values, and not only its shape.
inline bool reads_values(const c10::FunctionSchema& schema) {
  const auto& name = schema.name();
  auto ends_with = [&](const std::string& end) {
    return name.size() >= end.size() && !name.compare(name.size() - end.size(), end.size(), end);
  };
  return !is_view(schema) && !ends_with("_like") && name.rfind("aten::new_", 0) && name.rfind("aten::is_", 0);
}

// Reports, under the lock, an operator of the CPU that reads what has not arrived.
inline void host_reads(const std::string& operation, const std::string& thread, const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.device().is_cpu() || !tensor.has_storage() || !tensor.numel()) return;
  auto& storage = tensor.storage();
  for (auto& transfer : pinned().transfers) {
    if (!transfer.arrives || covers(runtime().host, transfer.launch)) continue;
    if (overlaps(transfer, storage.data(), storage.nbytes()))
      report(operation + " on the host (thread " + thread + ") reads pinned memory before " +
             described(transfer.launch) + " was waited for");
  }
}

// Called before every operator of any device, in every thread.
inline std::unique_ptr<at::ObserverContext> watch_host(const at::RecordFunction& call) {
  if (!arrivals()) return nullptr;
  auto schema = call.operator_schema();
  if (!schema || !reads_values(*schema)) return nullptr;
  auto ours = [](const c10::IValue& value) {
    return (value.isTensor() && is_ours(value.toTensor())) || (value.isDevice() && value.toDevice().type() == kSim);
  };
  auto inputs = call.inputs();
  if (std::any_of(inputs.begin(), inputs.end(), ours)) return nullptr;  // such as a copy to a device, which streams order
  auto& thread = *thread_name();
  Lock lock(runtime().mutex);
  for (size_t i = 0; i < inputs.size(); i++) {
    auto* alias = schema->arguments()[i].alias_info();
    if (alias && alias->isWrite()) continue;
    if (inputs[i].isTensor()) host_reads(schema->name(), thread, inputs[i].toTensor());
    if (!inputs[i].isTensorList()) continue;
    for (const at::Tensor& tensor : inputs[i].toTensorVector()) host_reads(schema->name(), thread, tensor);
  }
  return nullptr;
}

inline void start_watching_host() {
  at::addGlobalCallback(at::RecordFunctionCallback(&watch_host).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
}

}  // namespace sim
