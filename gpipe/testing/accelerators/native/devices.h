// What torch asks of a device: the guard (current device, streams, events), generators, and the hooks.
#pragma once

#include "pinned.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace sim {

inline void check_device(DeviceIndex device) {
  TORCH_CHECK(device < runtime().devices, "there is no sim:", int(device), ": this process has ", runtime().devices,
              " simulated accelerators");
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kSim; }
  Device getDevice() const override { return Device(kSim, current_device); }
  void setDevice(Device device) const override {
    check_device(device.index());
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = numbered(device); }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return DeviceIndex(runtime().devices); }
  void synchronizeDevice(DeviceIndex device) const override {
    host_waits(end_of_device(numbered(Device(kSim, device))), "device");
  }

  Stream getStream(Device device) const override {
    check_device(device.index());
    int stream = current_stream(numbered(device));
    Lock lock(runtime().mutex);
    return stream_at(stream);
  }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, Device(kSim, numbered(device))); }
  // A stream of its own each time, with any priority: streams that share a queue, as CUDA's may, would hide races.
  Stream getNewStream(Device device, int) const override {
    check_device(device.index());
    Lock lock(runtime().mutex);
    runtime().streams.push_back({numbered(device), {}});
    return stream_at(int(runtime().streams.size()) - 1);
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream exchangeStream(Stream stream) const override {
    Lock lock(runtime().mutex);
    int& current = current_stream(stream.device_index());
    Stream before = stream_at(current);
    current = index_of(stream);
    return before;
  }
  bool queryStream(const Stream& stream) const override { return happened(end_of_stream(index_of(stream))); }
  void synchronizeStream(const Stream& stream) const override { host_waits(end_of_stream(index_of(stream)), "stream"); }
  void recordDataPtrOnStream(const c10::DataPtr& pointer, const Stream& stream) const override {
    allocator()->recordStream(pointer, stream);
  }

  void record(void** event, const Stream& stream, DeviceIndex, c10::EventFlag) const override {
    Lock lock(runtime().mutex);
    if (!*event) *event = new Event;
    *static_cast<Event*>(*event) = event_after(index_of(stream));
  }
  void block(void* event, const Stream& stream) const override {
    if (!event) return;
    Lock lock(runtime().mutex);
    stream_waits(index_of(stream), static_cast<Event*>(event)->clock, static_cast<Event*>(event)->moment);
  }
  bool queryEvent(void* event) const override { return !event || happened(copied(event)); }
  void synchronizeEvent(void* event) const override {
    if (event) host_waits(copied(event), "event");
  }
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* start, void* end, DeviceIndex) const override {
    return 1e3 * (copied(end).moment - copied(start).moment);
  }

 private:
  static Event copied(void* event) {
    Lock lock(runtime().mutex);
    return *static_cast<Event*>(event);
  }
};

// As CUDA's: the state is a seed and an offset, which each operator that draws moves on; what is drawn depends on no
// more. The numbers are those of a CPU generator with a seed made of both.
struct Generator final : c10::GeneratorImpl {
  uint64_t seed_ = c10::default_rng_seed_val, offset_ = 0;

  explicit Generator(DeviceIndex device)
      : c10::GeneratorImpl(Device(kSim, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}

  // The generator of one operator.
  at::Generator draw() {
    std::lock_guard<std::mutex> lock(mutex_);
    uint64_t seed = seed_ + 0x9E3779B97F4A7C15 * (offset_ / 4);
    offset_ += 4;  // philox draws four numbers at once
    return at::detail::createCPUGenerator(seed);
  }
  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    offset_ = 0;
  }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }
  void set_offset(uint64_t offset) override {
    TORCH_CHECK(offset % 4 == 0, "the offset of a generator of sim is a multiple of 4, and ", offset, " was given");
    offset_ = offset;
  }
  uint64_t get_offset() const override { return offset_; }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto state = at::empty({16}, at::kByte);
    std::memcpy(state.mutable_data_ptr(), &seed_, 8);
    std::memcpy(static_cast<char*>(state.mutable_data_ptr()) + 8, &offset_, 8);
    return state.getIntrusivePtr();
  }
  void set_state(const c10::TensorImpl& state) override {
    at::detail::check_rng_state(state);
    TORCH_CHECK(state.numel() == 16, "the state of a generator of sim has 16 bytes, and ", state.numel(), " were given");
    std::memcpy(&seed_, state.data(), 8);
    std::memcpy(&offset_, static_cast<const char*>(state.data()) + 8, 8);
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device_.index());
    copy->seed_ = seed_;
    copy->offset_ = offset_;
    return copy;
  }
};

inline std::vector<at::Generator>& default_generators() {
  static auto* all = [] {
    auto* made = new std::vector<at::Generator>;
    for (int device = 0; device < runtime().devices; device++) made->push_back(at::make_generator<Generator>(device));
    return made;
  }();
  return *all;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DeviceIndex(runtime().devices); }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex device) const override { Guard().setDevice(Device(kSim, device)); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return Guard().exchangeDevice(Device(kSim, device)).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override {
    return default_generators()[numbered(Device(kSim, device))];
  }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<Generator>(numbered(Device(kSim, device)));
  }
  Device getDeviceFromPtr(void*) const override { return Device(kSim, current_device); }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override { grow(storage, size); }
};

}  // namespace sim
