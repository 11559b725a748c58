// Time and order: streams, events, links, and what the host has waited for.
//
// Operators compute at once, by the CPU's kernels. What is asynchronous is time (a stream is busy until some moment of
// the wall clock, and who waits for it sleeps until then) and order (a vector clock for each stream tells which launches
// of which streams come before what it does next).
//
// One lock guards all state. Nothing is called under it that may enter Python, such as the end of a tensor: a thread
// that waits for the interpreter's lock must not hold this one.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace sim {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

constexpr auto kSim = c10::DeviceType::PrivateUse1;

// For each stream, how many of its launches have ended.
using Clock = std::vector<uint64_t>;

inline void advance(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); i++) clock[i] = std::max(clock[i], other[i]);
}

// A kernel or a copy that a thread has put on a stream.
struct Launch {
  int stream = -1;  // its index in Runtime::streams
  uint64_t number = 0;
  const std::string* operation = nullptr;
  const std::string* thread = nullptr;
};

inline bool covers(const Clock& clock, const Launch& launch) {
  return size_t(launch.stream) < clock.size() && clock[launch.stream] >= launch.number;
}

struct StreamState {
  DeviceIndex device;
  Clock clock;
  double busy_until = 0;
};

// What a stream had been given when the event was recorded, and when it will have done it.
struct Event {
  Clock clock;
  double moment = 0;
};

struct Link {
  double bandwidth = 0;  // bytes a second; 0: no time
  double latency = 0;    // seconds
  double free_at = 0;
};

struct Counts {
  uint64_t kernels = 0, copies = 0, crossings = 0, host_waits = 0;
  std::map<std::string, uint64_t> waits;  // host_waits by what waited
};

struct Runtime {
  std::mutex mutex;
  int devices = 0;
  std::deque<StreamState> streams;  // the first ones are the devices' default streams
  std::vector<Link> links;          // by source * devices + target
  Clock host;                       // what some thread of the host has waited for
  Counts counts;
  std::vector<std::string> reports;
};

inline Runtime& runtime() {
  static auto* made = new Runtime;  // for ever: tensors are freed until the very end of the process
  return *made;
}

using Lock = std::lock_guard<std::mutex>;

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A string that lives for ever, so that a Launch may point to it.
inline const std::string* interned(const std::string& text) {
  static std::mutex mutex;
  static auto* all = new std::unordered_map<std::string, std::string>;
  Lock lock(mutex);
  return &all->emplace(text, text).first->second;
}

// The name of the calling thread; it may enter Python the first time (threads.h), so it is called without the lock.
const std::string* thread_name();

// --- current device and streams of a thread --------------------------------------------------------------------------

inline thread_local DeviceIndex current_device = 0;

inline int& current_stream(int device) {
  static thread_local std::vector<int> streams;
  while (int(streams.size()) < runtime().devices) streams.push_back(int(streams.size()));
  return streams[device];
}

inline DeviceIndex numbered(Device device) { return device.index() < 0 ? current_device : device.index(); }

inline int index_of(const Stream& stream) { return stream.id() == 0 ? stream.device_index() : int(stream.id()); }

inline Stream stream_at(int index) {
  auto device = runtime().streams[index].device;
  return Stream(Stream::UNSAFE, Device(kSim, device), index == device ? 0 : index);
}

inline std::string name_of(int stream) {
  auto device = runtime().streams[stream].device;
  return (stream == device ? "the default stream" : "stream " + std::to_string(stream)) + " of sim:" + std::to_string(device);
}

// --- what streams do; the caller holds the lock ----------------------------------------------------------------------

inline Launch launch(int stream, const std::string* operation, const std::string* thread, double seconds = 0) {
  auto& state = runtime().streams[stream];
  if (state.clock.size() <= size_t(stream)) state.clock.resize(stream + 1);
  state.busy_until = std::max(state.busy_until, now()) + seconds;
  return {stream, ++state.clock[stream], operation, thread};
}

inline void stream_waits(int stream, const Clock& clock, double moment) {
  auto& state = runtime().streams[stream];
  advance(state.clock, clock);
  state.busy_until = std::max(state.busy_until, moment);
}

// Gives a copy of so many bytes its turn on the link: it begins when both the stream and the link are free.
inline Launch launch_over(Link& link, size_t bytes, int stream, const std::string* operation, const std::string* thread) {
  auto& state = runtime().streams[stream];
  state.busy_until = std::max({state.busy_until, link.free_at, now()});
  double transfer = link.bandwidth ? double(bytes) / link.bandwidth : 0;
  link.free_at = state.busy_until + transfer;
  return launch(stream, operation, thread, link.latency + transfer);
}

inline Event event_after(int stream) {
  auto& state = runtime().streams[stream];
  return {state.clock, std::max(state.busy_until, now())};
}

// --- what the host waits for -----------------------------------------------------------------------------------------

// Ends the copies to and from pinned memory that the host has now waited for (pinned.h).
void settle_transfers();

inline void host_knows(const Event& event) {
  {
    Lock lock(runtime().mutex);
    advance(runtime().host, event.clock);
  }
  settle_transfers();
}

inline void host_waits(const Event& event, const std::string& why) {
  {
    Lock lock(runtime().mutex);
    runtime().counts.host_waits++;
    runtime().counts.waits[why]++;
  }
  double left = event.moment - now();
  if (left > 0) std::this_thread::sleep_for(std::chrono::duration<double>(left));
  host_knows(event);
}

// Whether all of it has happened; the host then knows.
inline bool happened(const Event& event) {
  if (event.moment > now()) return false;
  host_knows(event);
  return true;
}

inline Event end_of_stream(int stream) {
  Lock lock(runtime().mutex);
  auto& state = runtime().streams[stream];
  return {state.clock, state.busy_until};
}

inline Event end_of_device(int device) {
  Lock lock(runtime().mutex);
  Event end;
  for (auto& state : runtime().streams) {
    if (state.device != device) continue;
    advance(end.clock, state.clock);
    end.moment = std::max(end.moment, state.busy_until);
  }
  return end;
}

}  // namespace sim
