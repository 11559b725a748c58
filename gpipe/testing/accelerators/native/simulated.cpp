// Simulated accelerators for torch: devices, streams, memory and operators over the CPU, with a race detector.
//
// Read in this order: runtime.h (time and order), detector.h (races), memory.h and pinned.h, devices.h (what torch asks
// of a device), operators.h, copies.h, host.h, autocast.h; here all of it is registered.
#include "autocast.h"
#include "copies.h"
#include "host.h"
#include "threads.h"

#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/csrc/Generator.h>
#include <torch/library.h>

namespace sim {

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// --- operators that are not the CPU's kernels ------------------------------------------------------------------------

using OptionalDevice = std::optional<Device>;
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 OptionalDevice device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(Device(kSim)));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, OptionalDevice device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(Device(kSim)));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), allocator(),
                                           kKeys, c10::dtype_or_default(dtype));
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* tensor = self.unsafeGetTensorImpl();
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (self.sizes() == sizes) return self;
  tensor->set_sizes_contiguous(sizes);
  size_t needed = (tensor->numel() + tensor->storage_offset()) * tensor->itemsize();
  if (needed > self.storage().nbytes()) grow(self.storage(), needed);
  return self;
}

void record_stream(at::Tensor& self, Stream stream) { allocator()->recordStream(self.storage().data_ptr(), stream); }

// The CPU's has no argument for a generator.
std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& x, double p, std::optional<bool> train) {
  if (x.numel() == 0 || !train.value_or(true) || p == 0) return {x.clone(), at::ones_like(x, at::kBool)};
  auto kept = at::empty_like(x).bernoulli_(1 - p);
  return {x.mul(kept).mul_(p == 1 ? 0. : 1. / (1 - p)), kept.to(at::kBool)};
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  torch::jit::Stack stack{x, weight, bias, stride, padding, dilation, transposed, output_padding, groups};
  run("aten::convolution", &stack);
  return stack.back().toTensor();
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  std::vector<int64_t> bias_size{transposed ? weight.size(1) * groups : weight.size(0)};
  torch::jit::Stack stack{gradient, x, weight, bias_size, stride, padding, dilation, transposed, output_padding, groups,
                          c10::List<bool>({wanted[0], wanted[1], wanted[2]})};
  run("aten::convolution_backward", &stack);
  return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor()};
}

// Which kernel attention takes: the one that it takes on the CPU.
int64_t attention_kernel(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const std::optional<at::Tensor>& mask, double dropout, bool causal, std::optional<double> scale,
                         bool grouped) {
  if (mask && mask->requires_grad()) return int64_t(at::SDPBackend::math);
  auto on_cpu_if_given = mask ? std::optional<at::Tensor>(on_cpu(*mask)) : std::nullopt;
  return at::_fused_sdp_choice(on_cpu(query), on_cpu(key), on_cpu(value), on_cpu_if_given, dropout, causal, scale, grouped);
}

// torch takes cells in one piece for nn.LSTM and nn.GRU on a device that is not the CPU. These are compositions, through
// which autograd sees; the last of their results is what torch's own derivative would need.
using OptionalTensor = std::optional<at::Tensor>;

at::Tensor with_bias(const at::Tensor& gates, const OptionalTensor& bias) { return bias ? gates + *bias : gates; }

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(const at::Tensor& input, const at::Tensor& hidden,
                                                         const at::Tensor& cell, const OptionalTensor& input_bias,
                                                         const OptionalTensor& hidden_bias) {
  auto gates = with_bias(input, input_bias) + with_bias(hidden, hidden_bias);
  auto parts = gates.chunk(4, 1);  // in, forget, cell, out
  auto next = parts[1].sigmoid() * cell + parts[0].sigmoid() * parts[2].tanh();
  return {parts[3].sigmoid() * next.tanh(), next, gates};
}

std::tuple<at::Tensor, at::Tensor> gru_cell(const at::Tensor& input, const at::Tensor& hidden, const at::Tensor& state,
                                            const OptionalTensor& input_bias, const OptionalTensor& hidden_bias) {
  auto in = with_bias(input, input_bias).chunk(3, 1), own = with_bias(hidden, hidden_bias).chunk(3, 1);
  auto proposed = (in[2] + (in[0] + own[0]).sigmoid() * own[2]).tanh();
  return {proposed + (in[1] + own[1]).sigmoid() * (state - proposed), input};
}

at::Tensor spend(const at::Tensor& x, double seconds) {
  if (is_ours(x)) {
    Lock lock(runtime().mutex);
    auto& busy_until = runtime().streams[current_stream(x.device().index())].busy_until;
    busy_until = std::max(busy_until, now()) + seconds;
  } else {
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  }
  return x.clone();
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("record_stream", record_stream);
  m.impl("native_dropout", native_dropout);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_gru_cell", gru_cell);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_gru_cell", gru_cell);
}

TORCH_LIBRARY(gpipe_sim, m) { m.def("spend(Tensor x, float seconds) -> Tensor"); }
TORCH_LIBRARY_IMPL(gpipe_sim, CompositeExplicitAutograd, m) { m.impl("spend", spend); }

// Where torch has a composition of other operators for devices without a kernel, the CPU's own kernel is taken if there
// is one: the bits are then the CPU's, and a call is one launch.
void prefer_cpu_kernels() {
  static auto* library =
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (auto& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("aten::", 0)) continue;
    auto op = dispatcher.findOp(name);
    if (!op || is_view(op->schema()) || op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1) ||
        !op->hasKernelForDispatchKey(c10::DispatchKey::CPU))
      continue;
    if (!op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional) &&
        !op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd))
      continue;
    auto full = name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name);
    library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&run>());
  }
}

// --- what Python calls -----------------------------------------------------------------------------------------------

void start(int devices, int64_t memory) {
  auto& all = runtime();
  all.devices = devices;
  for (int device = 0; device < devices; device++) all.streams.push_back({DeviceIndex(device), {}});
  all.links.resize(size_t(devices) * devices);
  usage().assign(devices, {memory, 0, 0});
  c10::SetAllocator(kSim, allocator());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  prefer_cpu_kernels();
  start_watching_host();
}

std::vector<std::string> reports() {
  Lock lock(runtime().mutex);
  return runtime().reports;
}

void clear() {
  Lock lock(runtime().mutex);
  runtime().reports.clear();
  runtime().counts = {};
}

std::map<std::string, uint64_t> counts() {
  Lock lock(runtime().mutex);
  auto& c = runtime().counts;
  return {{"kernels", c.kernels}, {"copies", c.copies}, {"crossings", c.crossings}, {"host_waits", c.host_waits}};
}

std::map<std::string, uint64_t> waits() {
  Lock lock(runtime().mutex);
  return runtime().counts.waits;
}

void set_link(int source, int target, double bandwidth, double latency) {
  Lock lock(runtime().mutex);
  runtime().links[source * runtime().devices + target] = {bandwidth, latency, 0};
}

// Streams by device and id; moments in seconds of the monotonic clock, which all processes of a machine share.
double free_at(int device, int64_t stream) {
  Lock lock(runtime().mutex);
  return event_after(stream ? int(stream) : device).moment;
}

void hold(int device, int64_t stream, double moment) {
  Lock lock(runtime().mutex);
  stream_waits(stream ? int(stream) : device, {}, moment);
}

void set_capacity(int device, int64_t size) {
  Lock lock(runtime().mutex);
  usage()[device].capacity = size;
}

}  // namespace sim

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &sim::attention_kernel)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  sim::threads_by_number();
  m.def("start", &sim::start);
  m.def("device_count", [] { return sim::runtime().devices; });
  m.def("default_generators", &sim::default_generators);
  m.def("reports", &sim::reports);
  m.def("clear", &sim::clear);
  m.def("counts", &sim::counts);
  m.def("waits", &sim::waits);
  m.def("set_link", &sim::set_link);
  m.def("free_at", &sim::free_at);
  m.def("hold", &sim::hold);
  m.def("set_capacity", &sim::set_capacity);
}
