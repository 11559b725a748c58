// Operators: each runs at once, by the CPU's kernel on the same memory, and is a launch on the device's current stream.
#pragma once

#include "devices.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>

namespace sim {

inline bool is_ours(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kSim; }

inline Uses* uses_of(const at::Tensor& tensor) {
  if (!tensor.has_storage()) return nullptr;
  auto* block = block_of(tensor.storage().data_ptr());
  return block ? &block->uses : nullptr;
}

// --- the same memory as a tensor of the CPU, and as one of a device --------------------------------------------------

inline at::Tensor like(const at::Tensor& tensor, c10::Storage storage, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}

inline c10::Storage storage_of(c10::DataPtr memory, size_t size, c10::Allocator* grows_by) {
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), size, std::move(memory), grows_by, /*resizable=*/true);
}

inline at::Tensor on_cpu(const at::Tensor& tensor) {
  if (!is_ours(tensor)) return tensor;
  auto& storage = tensor.storage();
  c10::DataPtr borrowed(storage.mutable_data(), Device(c10::DeviceType::CPU));
  auto same = storage_of(std::move(borrowed), storage.nbytes(), c10::GetCPUAllocator());
  return like(tensor, std::move(same), c10::DispatchKey::CPU);
}

// Memory of the CPU as that of the device; copied where it does not start as the device's own does.
inline c10::DataPtr adopted(const c10::Storage& storage, DeviceIndex device) {
  Block* block = new_block(device, storage.nbytes());
  if (block->size && reinterpret_cast<uintptr_t>(storage.data()) % kAlignment) {
    TORCH_CHECK(!posix_memalign(&block->memory, kAlignment, block->size), "the host has no memory left");
    std::memcpy(block->memory, storage.data(), storage.nbytes());
    return {block->memory, block, &free_block, Device(kSim, device)};
  }
  block->adopted = storage;
  return {const_cast<c10::Storage&>(storage).mutable_data(), block, &free_block, Device(kSim, device)};
}

// A CPU kernel may have given another size, or other memory, to what it wrote to.
inline void follow(const at::Tensor& ours, const at::Tensor& cpu) {
  auto& storage = const_cast<c10::Storage&>(ours.storage());
  if (storage.data() != cpu.storage().data()) {
    auto memory = adopted(cpu.storage(), ours.device().index());
    if (auto* before = uses_of(ours)) block_of(memory)->uses.write = before->write;
    storage.set_data_ptr_noswap(std::move(memory));
    storage.set_nbytes(cpu.storage().nbytes());
  }
  if (ours.sizes() != cpu.sizes() || ours.strides() != cpu.strides())
    ours.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
}

// --- what differs from operator to operator ---------------------------------------------------------------------------

// Those whose result has a size that depends on values, so that the host waits for it.
inline bool host_needs_result(const std::string& name, const std::vector<c10::IValue>& arguments) {
  static const auto* names = new std::set<std::string>{
      "aten::nonzero",   "aten::equal",      "aten::is_nonzero",         "aten::masked_select",
      "aten::_unique2",  "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave"};
  if (names->count(name)) return true;
  if (name.rfind("aten::index", 0) || arguments.size() < 2 || !arguments[1].isOptionalTensorList()) return false;
  for (std::optional<at::Tensor> index : arguments[1].toOptionalTensorList())  // a mask: by way of nonzero
    if (index && index->defined() && (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte)) return true;
  return false;
}

inline bool takes_host_tensors(const std::string& name) {
  return name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
}

// Marked as one that draws, which it does not on the CPU: with dropout another kernel is chosen.
inline bool is_attention(const std::string& name) {
  return name == "aten::_fused_sdp_choice" || name == "aten::_scaled_dot_product_flash_attention_for_cpu";
}

inline bool is_written(const c10::FunctionSchema& schema, size_t argument) {
  auto* alias = schema.arguments()[argument].alias_info();
  if (alias && alias->isWrite()) return true;  // and what this schema does not say: running_mean and running_var
  return schema.name() == "aten::native_batch_norm" && (argument == 3 || argument == 4);
}

inline bool is_view(const c10::FunctionSchema& schema) {
  return std::any_of(schema.returns().begin(), schema.returns().end(), [](const c10::Argument& result) {
    return result.alias_info() && !result.alias_info()->isWrite();
  });
}

// --- one call of an operator -----------------------------------------------------------------------------------------

class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), schema_(op.schema()), name_(schema_.name()), stack_(stack) {
    size_t count = schema_.arguments().size();
    first_ = stack->size() - count;
    given_.assign(stack->begin() + first_, stack->end());
  }

  void run() {
    for (size_t i = 0; i < given_.size(); i++) argument(i) = taken(i);
    if (device_ < 0) device_ = current_device;
    TORCH_CHECK(used_.empty() || !host_tensor_ || takes_host_tensors(name_), "Expected all tensors to be on the same ",
                "device, but found at least two devices, sim:", int(device_), " and cpu! (in ", name_, ")");
    c10::DeviceGuard guard(Device(kSim, device_));
    put_on_stream();
    draw();
    run_on_cpu();
    for (auto& [ours, cpu] : written_) follow(ours, cpu);
    bring_home();
    if (host_needs_result(name_, given_)) host_waits(end_of_stream(launch_.stream), name_);
  }

 private:
  struct Used {
    at::Tensor tensor;
    bool written;
  };

  c10::IValue& argument(size_t i) { return (*stack_)[first_ + i]; }

  // What the CPU's kernel takes for this argument.
  c10::IValue taken(size_t i) {
    auto& value = given_[i];
    bool written = is_written(schema_, i);
    if (value.isTensor()) return taken(value.toTensor(), written);
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(taken(tensor, written));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional<at::Tensor>(taken(*tensor, written)) : tensor);
      return list;
    }
    if (value.isGenerator() && value.toGenerator().device().type() == kSim) return drawn(value.toGenerator());
    if (value.isDevice() && value.toDevice().type() == kSim) {
      if (device_ < 0) device_ = numbered(value.toDevice());
      return Device(c10::DeviceType::CPU);
    }
    return value;
  }

  at::Tensor taken(const at::Tensor& tensor, bool written) {
    if (!is_ours(tensor)) {
      host_tensor_ |= tensor.defined() && tensor.device().is_cpu() && tensor.dim() > 0;
      return tensor;
    }
    auto device = tensor.device().index();
    TORCH_CHECK(device_ < 0 || device_ == device, "Expected all tensors to be on the same device, but found at least two ",
                "devices, sim:", int(device_), " and sim:", int(device), "! (in ", name_, ")");
    device_ = device;
    used_.push_back({tensor, written});
    auto cpu = on_cpu(tensor);
    if (written) written_.emplace_back(tensor, cpu);
    return cpu;
  }

  void put_on_stream() {
    auto *operation = interned(name_), *thread = thread_name();
    Lock lock(runtime().mutex);
    runtime().counts.kernels++;
    launch_ = launch(current_stream(device_), operation, thread);
    if (is_view(schema_)) return;
    for (auto& [tensor, written] : used_)
      if (auto* uses = uses_of(tensor); uses && !written) reads(*uses, launch_);
    for (auto& [tensor, written] : used_)
      if (auto* uses = uses_of(tensor); uses && written) writes(*uses, launch_);
  }

  c10::IValue drawn(const at::Generator& generator) {
    draws_ = true;
    return generator.get<Generator>()->draw();
  }

  void draw() {
    for (size_t i = 0; i < given_.size() && !draws_; i++)
      if (schema_.arguments()[i].name() == "generator" && given_[i].isNone()) argument(i) = drawn(default_generators()[device_]);
    TORCH_CHECK(draws_ || is_attention(name_) || !op_.hasTag(at::Tag::nondeterministic_seeded),
                "a simulated accelerator cannot draw random numbers in ", name_);
  }

  void run_on_cpu() {
    c10::impl::ExcludeDispatchKeyGuard no_modes(c10::DispatchKeySet(
        {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::AutocastCPU}));
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
  }

  void bring_home() {
    size_t count = schema_.returns().size(), first = stack_->size() - count;
    for (size_t i = 0; i < count; i++) {
      auto& value = (*stack_)[first + i];
      auto* alias = schema_.returns()[i].alias_info();
      if (alias && alias->isWrite()) {
        value = argument_with(*alias, value);
      } else if (value.isTensor()) {
        value = home(value.toTensor());
      } else if (value.isTensorList()) {
        c10::List<at::Tensor> list;
        for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(home(tensor));
        value = list;
      }
    }
  }

  c10::IValue argument_with(const c10::AliasInfo& alias, const c10::IValue& otherwise) {
    for (size_t i = 0; i < given_.size(); i++)
      if (auto* other = schema_.arguments()[i].alias_info(); other && *other == alias) return given_[i];
    return otherwise;
  }

  // The CPU's result as a tensor of the device: a view of an argument, or memory of its own.
  at::Tensor home(const at::Tensor& cpu) {
    if (!cpu.defined()) return cpu;
    for (auto& [tensor, written] : used_)
      if (cpu.storage().nbytes() && tensor.storage().data() == cpu.storage().data())
        return like(cpu, tensor.storage(), c10::DispatchKey::PrivateUse1);
    auto size = cpu.storage().nbytes();
    auto ours = like(cpu, storage_of(adopted(cpu.storage(), device_), size, allocator()), c10::DispatchKey::PrivateUse1);
    Lock lock(runtime().mutex);
    writes(*uses_of(ours), launch_);
    return ours;
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  const std::string& name_;
  torch::jit::Stack* stack_;
  size_t first_;
  std::vector<c10::IValue> given_;
  std::vector<Used> used_;                                  // of a device
  std::vector<std::pair<at::Tensor, at::Tensor>> written_;  // ours, and the same memory on the CPU
  DeviceIndex device_ = -1;
  bool host_tensor_ = false, draws_ = false;
  Launch launch_;
};

inline void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Call(op, stack).run(); }

// Runs an operator by name, with the arguments on the stack, and leaves its results there.
inline void run(const char* name, torch::jit::Stack* stack) {
  run(c10::Dispatcher::singleton().findSchemaOrThrow(name, ""), stack);
}

}  // namespace sim
