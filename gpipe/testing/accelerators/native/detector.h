// The race detector: what was launched on which stream for a piece of memory, and what may overtake it.
#pragma once

#include "runtime.h"

#include <set>

namespace sim {

// What has been done with a piece of memory since it was last written.
struct Uses {
  Launch write;
  std::vector<Launch> reads;
};

// Whether what the stream does next comes after that launch. The caller holds the lock, here and below.
inline bool comes_after(int stream, const Launch& earlier) {
  if (earlier.stream < 0 || earlier.stream == stream) return true;
  return covers(runtime().streams[stream].clock, earlier) || covers(runtime().host, earlier);
}

inline std::string described(const Launch& launch) {
  return *launch.operation + " on " + name_of(launch.stream) + " (thread " + *launch.thread + ")";
}

inline void report(const std::string& what) { runtime().reports.push_back(what); }

inline void reads(Uses& uses, const Launch& launch) {
  if (!comes_after(launch.stream, uses.write))
    report(described(launch) + " reads what " + described(uses.write) + " may not have written yet");
  for (auto& read : uses.reads) {
    if (read.stream != launch.stream) continue;
    read = launch;
    return;
  }
  uses.reads.push_back(launch);
}

inline void writes(Uses& uses, const Launch& launch) {
  if (!comes_after(launch.stream, uses.write))
    report(described(launch) + " writes over what " + described(uses.write) + " may not have written yet");
  for (auto& read : uses.reads)
    if (!comes_after(launch.stream, read))
      report(described(launch) + " writes over what " + described(read) + " may still read");
  uses.write = launch;
  uses.reads.clear();
}

// Memory goes back to the stream it was allocated on, whose next allocation may be the same memory. Other streams must
// have been waited for by then, be named by record_stream, or be waited for by one that is.
inline void frees(const Uses& uses, int stream, const std::set<int>& recorded, const std::string* thread) {
  auto check = [&](const Launch& use) {
    if (comes_after(stream, use)) return;
    for (int other : recorded)
      if (comes_after(other, use)) return;
    report("memory of " + name_of(stream) + " was freed (thread " + *thread + ") while " + described(use) +
           " may still use it: call record_stream, or let the stream that it was allocated on wait first");
  };
  check(uses.write);
  for (auto& read : uses.reads) check(read);
}

}  // namespace sim
