// Pinned memory of the host, and the non-blocking copies to and from it that are under way.
//
// What such a copy brings to the host is poison there until the host has waited for it. What it takes from the host is
// compared, once the host has waited for it, with what the host had: a difference was written too early.
#pragma once

#include "memory.h"

#include <atomic>

namespace sim {

struct Transfer {
  Launch launch;
  c10::Storage host;
  char* place;              // in the host's memory
  std::vector<char> bytes;  // what it brings or takes
  bool arrives;             // at the host
};

// All guarded by the runtime's lock.
struct Pinned {
  std::map<char*, size_t> allocated;
  std::deque<Transfer> transfers;
};

inline Pinned& pinned() {
  static auto* made = new Pinned;
  return *made;
}

// How many transfers are on their way to the host.
inline std::atomic<int>& arrivals() {
  static std::atomic<int> count{0};
  return count;
}

inline bool is_pinned(const void* pointer) {
  Lock lock(runtime().mutex);
  auto* place = static_cast<char*>(const_cast<void*>(pointer));
  auto next = pinned().allocated.upper_bound(place);
  if (next == pinned().allocated.begin()) return false;
  auto& [start, size] = *--next;
  return place < start + std::max<size_t>(size, 1);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* memory = nullptr;
    TORCH_CHECK(!posix_memalign(&memory, kAlignment, size + 1), "the host has no memory left");
    std::memset(memory, kPoison, size);
    Lock lock(runtime().mutex);
    pinned().allocated[static_cast<char*>(memory)] = size;
    return {memory, memory, &release, Device(c10::DeviceType::CPU)};
  }
  static void release(void* memory) {
    {
      Lock lock(runtime().mutex);
      pinned().allocated.erase(static_cast<char*>(memory));
    }
    std::free(memory);
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, size_t size) const override { std::memcpy(target, source, size); }
};

inline PinnedAllocator* pinned_allocator() {
  static auto* made = new PinnedAllocator;
  return made;
}

// Notes a copy that has just been made in the host's memory, and hides what it brought.
inline void start_transfer(const Launch& launch, const c10::Storage& host, void* at, size_t size, bool arrives) {
  auto* place = static_cast<char*>(at);
  Transfer transfer{launch, host, place, std::vector<char>(place, place + size), arrives};
  Lock lock(runtime().mutex);
  if (arrives) std::memset(place, kPoison, size);
  arrivals() += arrives;
  pinned().transfers.push_back(std::move(transfer));
}

// Whether the host has written into it while it was under way. The caller holds the lock, here and below.
inline bool overwritten(const Transfer& transfer) {
  if (!transfer.arrives) return std::memcmp(transfer.place, transfer.bytes.data(), transfer.bytes.size());
  return std::any_of(transfer.place, transfer.place + transfer.bytes.size(), [](char c) { return c != char(kPoison); });
}

inline void end(const Transfer& transfer) {
  if (overwritten(transfer))
    report("the host wrote into pinned memory before " + described(transfer.launch) + " was waited for");
  arrivals() -= transfer.arrives;
  if (transfer.arrives) std::memcpy(transfer.place, transfer.bytes.data(), transfer.bytes.size());
}

// Ends those for which `due` holds, and gives them to the caller, who lets them go without the lock.
template <class Due>
std::vector<Transfer> end_transfers(Due due) {
  std::vector<Transfer> ended;
  auto& transfers = pinned().transfers;
  for (auto it = transfers.begin(); it != transfers.end();) {
    if (!due(*it)) {
      ++it;
      continue;
    }
    end(*it);
    ended.push_back(std::move(*it));
    it = transfers.erase(it);
  }
  return ended;
}

inline void settle_transfers() {
  std::vector<Transfer> ended;
  Lock lock(runtime().mutex);
  ended = end_transfers([](const Transfer& t) { return covers(runtime().host, t.launch); });
}

inline bool overlaps(const Transfer& transfer, const void* at, size_t size) {
  auto* place = static_cast<const char*>(at);
  return place < transfer.place + transfer.bytes.size() && transfer.place < place + size;
}

// A copy reads or writes the host's memory: what is on its way there must come before it, and then has ended.
inline void uses_host(const Launch& launch, const void* at, size_t size, bool writes) {
  std::vector<Transfer> ended;
  Lock lock(runtime().mutex);
  auto meets = [&](const Transfer& t) { return overlaps(t, at, size) && (writes || t.arrives); };
  for (auto& transfer : pinned().transfers)
    if (meets(transfer) && !comes_after(launch.stream, transfer.launch))
      report(described(launch) + (writes ? " writes over" : " reads") + " pinned memory that " +
             described(transfer.launch) + (transfer.arrives ? " may not have written yet" : " may still read"));
  ended = end_transfers(meets);
}

}  // namespace sim
