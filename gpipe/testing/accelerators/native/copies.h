// Copies: within a device, between devices over a link, and to and from the host.
#pragma once

#include "operators.h"

namespace sim {

inline void move_bytes(const at::Tensor& target, const at::Tensor& source) {
  c10::impl::ExcludeDispatchKeyGuard no_modes(
      c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  on_cpu(target).copy_(on_cpu(source));
}

// As torch's Copy.cu does: on the current stream of the source, after all that the current stream of the target has
// been given, which then waits for the copy.
inline void copy_between(const at::Tensor& source, const at::Tensor& target) {
  auto from = source.device().index(), to = target.device().index();
  auto* operation = interned(from == to ? "copy" : "copy from " + source.device().str() + " to " + target.device().str());
  auto* thread = thread_name();
  {
    Lock lock(runtime().mutex);
    runtime().counts.copies++;
    int stream = current_stream(from);
    Launch copy;
    if (from == to) {
      copy = launch(stream, operation, thread);
    } else {
      runtime().counts.crossings++;
      auto before = event_after(current_stream(to));
      stream_waits(stream, before.clock, before.moment);
      copy = launch_over(runtime().links[from * runtime().devices + to], target.nbytes(), stream, operation, thread);
    }
    if (auto* uses = uses_of(source)) reads(*uses, copy);
    if (auto* uses = uses_of(target)) writes(*uses, copy);
    if (from != to) {
      auto after = event_after(stream);
      stream_waits(current_stream(to), after.clock, after.moment);
    }
  }
  move_bytes(target, source);
}

// A copy to or from the host is non-blocking where CUDA's is: with pinned memory, or to the device.
inline void copy_with_host(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  bool to_host = is_ours(source);
  auto& ours = to_host ? source : target;
  auto& host = to_host ? target : source;
  auto *operation = interned(to_host ? "copy to the host" : "copy from the host"), *thread = thread_name();
  Launch copy;
  {
    Lock lock(runtime().mutex);
    runtime().counts.copies++;
    copy = launch(current_stream(ours.device().index()), operation, thread);
    if (auto* uses = uses_of(ours)) to_host ? reads(*uses, copy) : writes(*uses, copy);
  }
  bool plain = host.is_contiguous() && host.dtype() == ours.dtype() && host.numel() > 0;
  bool pinned = plain && is_pinned(host.const_data_ptr());
  if (pinned) uses_host(copy, host.const_data_ptr(), host.nbytes(), to_host);
  move_bytes(target, source);
  if (non_blocking && pinned) {
    start_transfer(copy, host.storage(), const_cast<void*>(host.const_data_ptr()), host.nbytes(), to_host);
  } else if (to_host || !non_blocking) {
    host_waits(end_of_stream(copy.stream), *operation);
  }
}

inline at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  if (is_ours(source) && is_ours(target)) {
    copy_between(source, target);
  } else {
    copy_with_host(source, target, non_blocking);
  }
  return target;
}

inline at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, false);
}

inline at::Scalar local_scalar(const at::Tensor& tensor) {
  auto *operation = interned("item"), *thread = thread_name();
  Launch copy;
  {
    Lock lock(runtime().mutex);
    copy = launch(current_stream(tensor.device().index()), operation, thread);
    if (auto* uses = uses_of(tensor)) reads(*uses, copy);
  }
  host_waits(end_of_stream(copy.stream), *operation);
  return on_cpu(tensor).item();
}

}  // namespace sim
