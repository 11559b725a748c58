// Memory of the devices: blocks with their uses, a capacity, and the statistics of torch.accelerator.
#pragma once

#include "detector.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Storage.h>

#include <cstdlib>
#include <cstring>

namespace sim {

constexpr size_t kAlignment = 512;  // of CUDA's allocator
constexpr int kPoison = 0xFF;       // NaN as a floating point number, -1 as an integer

struct Block {
  DeviceIndex device;
  int stream;  // that it was allocated on
  size_t size;
  void* memory = nullptr;  // own, or
  c10::Storage adopted;    // the CPU memory in which an operator left its result
  Uses uses;
  std::set<int> recorded;  // by record_stream
};

struct Usage {
  int64_t capacity = 0, allocated = 0, peak = 0;
};

inline std::vector<Usage>& usage() {
  static auto* all = new std::vector<Usage>;
  return *all;
}

inline size_t rounded(size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

// Room for a block on the current stream of the device; OutOfMemoryError where there is none.
inline Block* new_block(DeviceIndex device, size_t size) {
  size = rounded(size);
  Lock lock(runtime().mutex);
  auto& used = usage()[device];
  TORCH_CHECK_WITH(
      OutOfMemoryError, used.allocated + int64_t(size) <= used.capacity, "simulated accelerator out of memory: sim:",
      int(device), " holds ", used.allocated, " of ", used.capacity, " bytes and was asked for ", size, " more");
  used.allocated += int64_t(size);
  used.peak = std::max(used.peak, used.allocated);
  return new Block{device, current_stream(device), size};
}

inline void free_block(void* context) {
  std::unique_ptr<Block> block(static_cast<Block*>(context));  // ends after the lock: what it adopted may enter Python
  auto* thread = thread_name();
  {
    Lock lock(runtime().mutex);
    usage()[block->device].allocated -= int64_t(block->size);
    if (block->size) frees(block->uses, block->stream, block->recorded, thread);
  }
  std::free(block->memory);
}

inline Block* block_of(const c10::DataPtr& pointer) {
  return pointer.get_deleter() == &free_block ? static_cast<Block*>(pointer.get_context()) : nullptr;
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    Block* block = new_block(current_device, size);
    if (block->size) {
      TORCH_CHECK(!posix_memalign(&block->memory, kAlignment, block->size), "the host has no memory left");
      std::memset(block->memory, kPoison, block->size);
    }
    return {block->memory, block, &free_block, Device(kSim, block->device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, size_t size) const override { std::memcpy(target, source, size); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& pointer, Stream stream) override {
    Lock lock(runtime().mutex);
    if (auto* block = block_of(pointer)) block->recorded.insert(index_of(stream));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    Lock lock(runtime().mutex);
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* bytes : {&stats.allocated_bytes[0], &stats.reserved_bytes[0], &stats.active_bytes[0]}) {
      bytes->current = usage()[device].allocated;
      bytes->peak = usage()[device].peak;
    }
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override {
    Lock lock(runtime().mutex);
    usage()[device].peak = usage()[device].allocated;
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    Lock lock(runtime().mutex);
    auto& used = usage()[device];
    return {size_t(std::max<int64_t>(0, used.capacity - used.allocated)), size_t(used.capacity)};
  }
};

inline Allocator* allocator() {
  static auto* made = new Allocator;
  return made;
}

// Lets the storage have so many bytes at another place, with what it held.
inline void grow(const c10::Storage& storage, size_t size) {
  c10::DeviceGuard guard(storage.device());
  auto fresh = allocator()->allocate(size);
  size_t kept = std::min(size, storage.nbytes());
  if (kept) std::memcpy(fresh.get(), storage.data(), kept);
  if (auto* before = block_of(storage.data_ptr())) block_of(fresh)->uses.write = before->uses.write;
  auto& changed = const_cast<c10::Storage&>(storage);
  changed.set_data_ptr_noswap(std::move(fresh));
  changed.set_nbytes(size);
}

}  // namespace sim
