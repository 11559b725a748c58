// A fake accelerator for tests on the CPU: several devices, streams, events, a stream-ordered allocator, generators.
// Operators compute at once, by CPU kernels on the same memory; what is asynchronous is time, and what may be seen:
//  * happens-before: vector clocks per stream; every read and write of a storage is checked (reports());
//  * time: a stream is busy until a wall-clock time; synchronising sleeps until then (spend(), copies);
//  * what a non-blocking copy brings to pinned memory is poison until a synchronisation that covers it.
#include <torch/extension.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/Generator.h>
#include <chrono>
#include <deque>
#include <set>
#include <thread>
#include <unordered_map>

using c10::Device; using c10::DeviceIndex; using c10::DeviceType; using c10::Stream;
constexpr auto PU1 = DeviceType::PrivateUse1;
using Clock = std::vector<uint64_t>;
using Lock = std::lock_guard<std::recursive_mutex>;

static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
static int env_int(const char* n, int d) { const char* v = getenv(n); return v ? atoi(v) : d; }

struct Block;
struct Use { int stream = -1; uint64_t seq = 0; std::string op; };
struct StreamS { int device; Clock clock; double until = 0; double busy = 0; };
struct Ev { Clock clock; double until = 0; int device = 0; };
struct Pending { int stream; uint64_t seq; c10::Storage host; char* at; std::vector<char> bytes; bool arrives; };

struct Runtime {
  std::recursive_mutex mutex;
  int devices = env_int("GPIPE_SIMULATED_ACCELERATORS", 4);
  std::deque<StreamS> streams;
  Clock host;
  std::vector<size_t> live, peak; std::vector<int64_t> capacity;
  std::vector<std::string> reports;
  std::deque<Pending> pending;
  uint64_t syncs = 0, launches = 0, copies = 0, crossings = 0;
  double bandwidth = 0, latency = 0;   // bytes/s between devices, 0: at once
  bool raises = false, check = true;
  std::unordered_map<std::string, uint64_t> sync_ops;
  Runtime() : live(devices), peak(devices), capacity(devices, int64_t(1) << 60) {
    for (int d = 0; d < devices; d++) streams.push_back({d, {}});
  }
  static void raise_to(Clock& a, const Clock& b) {
    if (a.size() < b.size()) a.resize(b.size());
    for (size_t i = 0; i < b.size(); i++) a[i] = std::max(a[i], b[i]);
  }
  uint64_t tick(int s) { auto& c = streams[s].clock; if (c.size() <= size_t(s)) c.resize(s + 1); return ++c[s]; }
  uint64_t seq(int s) { auto& c = streams[s].clock; return c.size() <= size_t(s) ? 0 : c[s]; }
  bool after(int s, const Use& u) {  // whether what stream s does next comes after u
    if (u.stream < 0 || u.stream == s) return true;
    auto& c = streams[s].clock;
    if (size_t(u.stream) < c.size() && c[u.stream] >= u.seq) return true;
    return size_t(u.stream) < host.size() && host[u.stream] >= u.seq;
  }
  void report(const std::string& what) {
    reports.push_back(what);
    if (raises) { TORCH_CHECK(false, "fake accelerator: ", what); }
  }
  void settle(std::vector<Pending>& done) {  // destroy these without the lock: a storage may want the interpreter's
    for (auto it = pending.begin(); it != pending.end();) {
      if (size_t(it->stream) < host.size() && host[it->stream] >= it->seq) {
        if (it->arrives) memcpy(it->at, it->bytes.data(), it->bytes.size());
        else if (memcmp(it->at, it->bytes.data(), it->bytes.size()))
          report("pinned memory was written before the non-blocking copy from it had run");
        done.push_back(std::move(*it));
        it = pending.erase(it);
      } else ++it;
    }
  }
};
static Runtime& rt() { static auto* r = new Runtime; return *r; }

static thread_local DeviceIndex current_device = 0;
static thread_local std::vector<int> current_streams;
static int& stream_of(int d) {
  while (int(current_streams.size()) < rt().devices) current_streams.push_back(int(current_streams.size()));
  return current_streams[d];
}
static int index_of(const Stream& s) { return s.id() == 0 ? s.device_index() : int(s.id()); }
static Stream stream_at(int i) {
  int d = rt().streams[i].device;
  return Stream(Stream::UNSAFE, Device(PU1, d), i == d ? 0 : i);
}
static std::string name(int i) {
  return "stream " + std::to_string(i) + " of device " + std::to_string(rt().streams[i].device);
}
static void host_waits(const Clock& clock, double until, const char* why) {
  double left;
  { Lock l(rt().mutex); rt().syncs++; rt().sync_ops[why]++; left = until - now(); }
  if (left > 0) std::this_thread::sleep_for(std::chrono::duration<double>(left));
  std::vector<Pending> done;
  Lock l(rt().mutex);
  Runtime::raise_to(rt().host, clock);
  rt().settle(done);
}
static void sync_stream(int s, const char* why) {
  Clock c; double until;
  { Lock l(rt().mutex); c = rt().streams[s].clock; until = rt().streams[s].until; }
  host_waits(c, until, why);
}
static void sync_device(int d, const char* why) {
  Clock c; double until = 0;
  { Lock l(rt().mutex); for (auto& s : rt().streams) if (s.device == d) { Runtime::raise_to(c, s.clock); until = std::max(until, s.until); } }
  host_waits(c, until, why);
}
static void takes(int s, double seconds) {
  auto& st = rt().streams[s]; double t = now();
  st.until = std::max(st.until, t) + seconds; st.busy += seconds;
}
static void stream_waits(int s, const Clock& clock, double until) {
  Runtime::raise_to(rt().streams[s].clock, clock);
  rt().streams[s].until = std::max(rt().streams[s].until, until);
}

// --- memory -----------------------------------------------------------------------------------------------------------

struct Block {
  int device, stream; size_t size; void* memory; c10::Storage adopted;  // adopted: CPU memory an operator made
  Use write; std::vector<Use> reads; std::set<int> recorded;
};
static void freed(void* context) {
  auto* b = static_cast<Block*>(context);
  {
    Lock l(rt().mutex);
    rt().live[b->device] -= b->size;
    if (rt().check && b->size) {
      auto look = [&](const Use& u) {
        if (u.stream >= 0 && !b->recorded.count(u.stream) && !rt().after(b->stream, u))
          rt().reports.push_back("memory of " + name(b->stream) + " was freed while " + name(u.stream) + " may still use it in " + u.op +
                      ": no record_stream, and no wait");
      };
      look(b->write);
      for (auto& u : b->reads) look(u);
    }
  }
  if (b->memory) free(b->memory);
  delete b;
}
static Block* new_block(int device, size_t size, void* memory) {
  Lock l(rt().mutex);
  auto& r = rt();
  if (int64_t(r.live[device] + size) > r.capacity[device]) {
    if (memory) free(memory);
    TORCH_CHECK_WITH(OutOfMemoryError, false, "fake accelerator out of memory: device ", device, " holds ", r.live[device], " of ", r.capacity[device], " bytes and was asked for ", size);
  }
  r.live[device] += size;
  r.peak[device] = std::max(r.peak[device], r.live[device]);
  return new Block{device, stream_of(device), size, memory};
}
struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = nullptr;
    if (n) { TORCH_CHECK(!posix_memalign(&p, 512, (n + 511) / 512 * 512)); memset(p, 0xFF, n); }
    auto* b = new_block(current_device, (n + 511) / 512 * 512, p);
    return {p, b, &freed, Device(PU1, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* d, const void* s, size_t n) const override { memcpy(d, s, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& p, Stream s) override {
    if (p.get_deleter() != &freed) return;
    Lock l(rt().mutex);
    static_cast<Block*>(p.get_context())->recorded.insert(index_of(s));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex d) override {
    c10::CachingDeviceAllocator::DeviceStats s;
    Lock l(rt().mutex);
    s.allocated_bytes[0].current = rt().live[d]; s.allocated_bytes[0].peak = rt().peak[d];
    s.reserved_bytes[0].current = rt().live[d]; s.reserved_bytes[0].peak = rt().peak[d];
    return s;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex d) override { Lock l(rt().mutex); rt().peak[d] = rt().live[d]; }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex d) override { return {rt().capacity[d] - rt().live[d], rt().capacity[d]}; }
};
static Allocator* allocator() { static auto* a = new Allocator; return a; }

struct PinnedAllocator final : c10::Allocator {
  static std::set<std::pair<char*, size_t>>& all() { static auto* s = new std::set<std::pair<char*, size_t>>; return *s; }
  struct Piece { char* p; size_t n; };
  static void drop(void* c) {
    auto* q = static_cast<Piece*>(c);
    { Lock l(rt().mutex); all().erase({q->p, q->n}); }
    free(q->p); delete q;
  }
  c10::DataPtr allocate(size_t n) override {
    void* p; TORCH_CHECK(!posix_memalign(&p, 512, n + 512)); memset(p, 0xFF, n);
    Lock l(rt().mutex);
    all().insert({static_cast<char*>(p), n});
    return {p, new Piece{static_cast<char*>(p), n}, &drop, Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* d, const void* s, size_t n) const override { memcpy(d, s, n); }
  static bool has(const void* p) {
    Lock l(rt().mutex);
    auto it = all().upper_bound({const_cast<char*>(static_cast<const char*>(p)), SIZE_MAX});
    if (it == all().begin()) return false;
    --it; return p < it->first + std::max<size_t>(it->second, 1);
  }
};
static PinnedAllocator* pinned() { static auto* a = new PinnedAllocator; return a; }

// --- guard, generators, hooks -----------------------------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return PU1; }
  Device exchangeDevice(Device d) const override { Device old(PU1, current_device); setDevice(d); return old; }
  Device getDevice() const override { return Device(PU1, current_device); }
  void setDevice(Device d) const override { TORCH_CHECK(d.index() < rt().devices, "no fake device ", int(d.index())); if (d.index() >= 0) current_device = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override { if (d.index() >= 0) current_device = d.index(); }
  static int at(Device d) { return d.index() < 0 ? current_device : d.index(); }
  Stream getStream(Device d) const override { return stream_at(stream_of(at(d))); }
  Stream getDefaultStream(Device d) const override { return stream_at(at(d)); }
  Stream getNewStream(Device d, int) const override {
    Lock l(rt().mutex);
    rt().streams.push_back({at(d), {}});
    return stream_at(int(rt().streams.size()) - 1);
  }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return getNewStream(d, 0); }
  Stream exchangeStream(Stream s) const override {
    int& c = stream_of(s.device_index()); auto old = stream_at(c); c = index_of(s); return old;
  }
  void destroyEvent(void* e, DeviceIndex) const noexcept override { delete static_cast<Ev*>(e); }
  void record(void** e, const Stream& s, DeviceIndex, c10::EventFlag) const override {
    if (!*e) *e = new Ev;
    Lock l(rt().mutex); auto& st = rt().streams[index_of(s)];
    rt().tick(index_of(s));
    *static_cast<Ev*>(*e) = Ev{st.clock, std::max(st.until, now()), st.device};
  }
  void block(void* e, const Stream& s) const override {
    if (!e) return;
    Lock l(rt().mutex); auto* ev = static_cast<Ev*>(e);
    stream_waits(index_of(s), ev->clock, ev->until);
  }
  bool queryEvent(void* e) const override { if (!e) return true; Lock l(rt().mutex); return static_cast<Ev*>(e)->until <= now(); }
  DeviceIndex deviceCount() const noexcept override { return DeviceIndex(rt().devices); }
  bool queryStream(const Stream& s) const override { Lock l(rt().mutex); return rt().streams[index_of(s)].until <= now(); }
  void synchronizeStream(const Stream& s) const override { sync_stream(index_of(s), "stream"); }
  void synchronizeEvent(void* e) const override { if (!e) return; auto* ev = static_cast<Ev*>(e); host_waits(ev->clock, ev->until, "event"); }
  void synchronizeDevice(DeviceIndex d) const override { sync_device(d < 0 ? current_device : d, "device"); }
  void recordDataPtrOnStream(const c10::DataPtr& p, const Stream& s) const override { allocator()->recordStream(p, s); }
  double elapsedTime(void* a, void* b, DeviceIndex) const override { return 1e3 * (static_cast<Ev*>(b)->until - static_cast<Ev*>(a)->until); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct FakeGenerator final : c10::GeneratorImpl {
  at::Generator inner;
  explicit FakeGenerator(DeviceIndex i) : c10::GeneratorImpl(Device(PU1, i), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), inner(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t s) override { inner.set_current_seed(s); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& s) override { inner.unsafeGetGeneratorImpl()->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  FakeGenerator* clone_impl() const override { auto* g = new FakeGenerator(device_.index()); g->inner = inner.clone(); return g; }
};
static std::vector<at::Generator>& defaults() {
  static auto* v = [] { auto* v = new std::vector<at::Generator>; for (int d = 0; d < rt().devices; d++) v->push_back(at::make_generator<FakeGenerator>(DeviceIndex(d))); return v; }();
  return *v;
}
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DeviceIndex(rt().devices); }
  void setCurrentDevice(DeviceIndex d) const override { current_device = d; }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { auto o = current_device; current_device = d; return o; }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchangeDevice(d); }
  const at::Generator& getDefaultGenerator(DeviceIndex d) const override { return defaults()[d < 0 ? current_device : d]; }
  at::Generator getNewGenerator(DeviceIndex d) const override { return at::make_generator<FakeGenerator>(d < 0 ? current_device : d); }
  Device getDeviceFromPtr(void*) const override { return Device(PU1, current_device); }
  bool isPinnedPtr(const void* p) const override { return PinnedAllocator::has(p); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned(); }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    c10::DeviceGuard g(s.device());
    auto fresh = allocator()->allocate(n);
    memcpy(fresh.get(), s.data(), std::min(n, s.nbytes()));
    const_cast<c10::Storage&>(s).set_data_ptr_noswap(std::move(fresh));
    const_cast<c10::Storage&>(s).set_nbytes(n);
  }
};

// --- operators --------------------------------------------------------------------------------------------------------

static Block* block_of(const at::Tensor& t) {
  auto& p = t.storage().data_ptr();
  return p.get_deleter() == &freed ? static_cast<Block*>(p.get_context()) : nullptr;
}
static at::Tensor as_cpu(const at::Tensor& t) {
  if (!t.defined() || t.device().type() != PU1) return t;
  auto& s = t.storage();
  auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), s.nbytes(), c10::DataPtr(s.mutable_data(), Device(DeviceType::CPU)), c10::GetCPUAllocator(), true);
  auto out = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return out;
}
static at::Tensor on_storage(const c10::Storage& s, const at::Tensor& like) {
  auto out = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(s), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), like.dtype());
  out.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return out;
}
static at::Tensor adopted(const at::Tensor& cpu, int device) {
  auto& s = cpu.storage();
  auto* b = new_block(device, (s.nbytes() + 511) / 512 * 512, nullptr);
  b->adopted = s;
  c10::DataPtr p(s.mutable_data(), b, &freed, Device(PU1, DeviceIndex(device)));
  c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), s.nbytes(), std::move(p), allocator(), true));
  return on_storage(storage, cpu);
}
static void followed(const at::Tensor& t, const at::Tensor& cpu) {  // a CPU kernel may have resized what it writes to
  if (!t.defined() || t.device().type() != PU1) return;
  if (t.storage().data() != cpu.storage().data() || t.storage().nbytes() < cpu.storage().nbytes()) {
    auto* b = new_block(t.device().index(), (cpu.storage().nbytes() + 511) / 512 * 512, nullptr);
    b->adopted = cpu.storage(); b->write = block_of(t) ? block_of(t)->write : Use{};
    auto& st = const_cast<c10::Storage&>(t.storage());
    st.set_data_ptr_noswap(c10::DataPtr(cpu.storage().mutable_data(), b, &freed, t.device()));
    st.set_nbytes(cpu.storage().nbytes());
  }
  if (t.sizes() != cpu.sizes() || t.strides() != cpu.strides()) t.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
}
static void reads(Block* b, int s, uint64_t seq, const std::string& op) {
  if (!b || !rt().check) return;
  if (!rt().after(s, b->write)) rt().report(op + " on " + name(s) + " reads what " + b->write.op + " on " + name(b->write.stream) + " may not have written yet");
  for (auto& u : b->reads) if (u.stream == s) { u.seq = seq; u.op = op; return; }
  b->reads.push_back({s, seq, op});
}
static void writes(Block* b, int s, uint64_t seq, const std::string& op) {
  if (!b) return;
  if (rt().check) {
    if (!rt().after(s, b->write)) rt().report(op + " on " + name(s) + " writes over what " + b->write.op + " on " + name(b->write.stream) + " may not have written yet");
    for (auto& u : b->reads) if (!rt().after(s, u)) rt().report(op + " on " + name(s) + " writes over what " + u.op + " on " + name(u.stream) + " may still read");
  }
  b->write = {s, seq, op}; b->reads.clear();
}
static const std::set<std::string>& waiting_ops() {
  static auto* s = new std::set<std::string>{"aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::_local_scalar_dense", "aten::repeat_interleave"};
  return *s;
}

static void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t n = schema.arguments().size(), begin = stack->size() - n;
  std::vector<c10::IValue> given(stack->begin() + begin, stack->end());
  int device = -1;
  std::vector<std::pair<at::Tensor, at::Tensor>> written;
  std::vector<std::pair<at::Tensor, bool>> used;   // tensor on a device, written
  auto see = [&](const at::Tensor& t, bool write) {
    if (!t.defined() || t.device().type() != PU1) return;
    int d = t.device().index();
    TORCH_CHECK(device < 0 || device == d || (!write && t.dim() == 0), "Expected all tensors to be on the same device, but ", schema.name(), " got sim:", device, " and sim:", d);
    if (device < 0) device = d;
    used.emplace_back(t, write);
  };
  bool generator = false, host_tensor = false;
  for (size_t i = 0; i < n; i++) {
    auto& v = given[i];
    const auto* alias = schema.arguments()[i].alias_info();
    bool write = alias && alias->isWrite();
    if (v.isTensor()) {
      see(v.toTensor(), write);
      if (v.toTensor().defined() && v.toTensor().device().is_cpu() && v.toTensor().dim()) host_tensor = true;
      auto cpu = as_cpu(v.toTensor());
      if (write) written.emplace_back(v.toTensor(), cpu);
      (*stack)[begin + i] = cpu;
    } else if (v.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : v.toTensorVector()) { see(t, write); list.push_back(as_cpu(t)); }
      (*stack)[begin + i] = list;
    } else if (v.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (std::optional<at::Tensor> t : v.toOptionalTensorList()) {
        if (t.has_value() && t->defined()) { see(*t, write); list.push_back(as_cpu(*t)); } else list.push_back(t);
      }
      (*stack)[begin + i] = list;
    } else if (v.isGenerator()) {
      auto g = v.toGenerator();
      if (g.defined() && g.device().type() == PU1) { (*stack)[begin + i] = g.get<FakeGenerator>()->inner; generator = true; }
    } else if (v.isDevice()) {
      if (v.toDevice().type() == PU1) { if (device < 0) device = Guard::at(v.toDevice()); (*stack)[begin + i] = Device(DeviceType::CPU); }
    }
  }
  if (device < 0) device = current_device;
  TORCH_CHECK(!host_tensor || schema.name() == "aten::index" || schema.name() == "aten::index_put_" || schema.name() == "aten::_index_put_impl_" || used.empty(), "Expected all tensors to be on the same device, but ", schema.name(), " got the CPU and sim:", device);
  c10::DeviceGuard guard(Device(PU1, DeviceIndex(device)));
  int s; uint64_t seq;
  {
    Lock l(rt().mutex);
    rt().launches++;
    s = stream_of(device); seq = rt().tick(s);
    takes(s, 0);
    for (auto& [t, w] : used) reads(block_of(t), s, seq, schema.name());
    for (auto& [t, w] : used) if (w) writes(block_of(t), s, seq, schema.name());
  }
  {
    c10::impl::ExcludeDispatchKeyGuard no_modes(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::AutocastCPU}));
    at::AutoDispatchBelowADInplaceOrView below;
    bool draws = op.hasTag(at::Tag::nondeterministic_seeded);
    for (size_t i = 0; i < n && !generator; i++)
      if (schema.arguments()[i].name() == "generator" && given[i].isNone()) { (*stack)[begin + i] = defaults()[device].get<FakeGenerator>()->inner; draws = false; }
    TORCH_CHECK(generator || !draws || schema.name() == "aten::_fused_sdp_choice", "the fake accelerator cannot draw for ", schema.name());
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  for (auto& [t, cpu] : written) followed(t, cpu);
  const size_t outs = schema.returns().size(), first = stack->size() - outs;
  auto home = [&](const at::Tensor& cpu) -> at::Tensor {
    if (!cpu.defined()) return cpu;
    if (cpu.has_storage() && cpu.storage().nbytes())
      for (auto& [t, w] : used) if (t.storage().data() == cpu.storage().data()) return on_storage(t.storage(), cpu);
    auto out = adopted(cpu, device);
    Lock l(rt().mutex);
    writes(block_of(out), s, seq, schema.name());
    return out;
  };
  for (size_t i = 0; i < outs; i++) {
    auto& v = (*stack)[first + i];
    const auto* alias = schema.returns()[i].alias_info();
    if (alias && alias->isWrite()) {
      for (size_t a = 0; a < n; a++) {
        const auto* other = schema.arguments()[a].alias_info();
        if (other && *alias == *other) { v = given[a]; break; }
      }
    } else if (v.isTensor()) {
      v = home(v.toTensor());
    } else if (v.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : v.toTensorVector()) list.push_back(home(t));
      v = list;
    }
  }
  if (waiting_ops().count(schema.name())) sync_stream(s, schema.name().c_str());
}

static at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  Device d(PU1, DeviceIndex(Guard::at(device.value_or(Device(PU1)))));
  c10::DeviceGuard g(d);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}
static at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  Device d(PU1, DeviceIndex(Guard::at(device.value_or(Device(PU1)))));
  c10::DeviceGuard g(d);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}
static void plain_copy(const at::Tensor& to, const at::Tensor& from) {
  c10::impl::ExcludeDispatchKeyGuard no_modes(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot}));
  at::AutoDispatchBelowADInplaceOrView below;
  as_cpu(to).copy_(as_cpu(from));
}
static at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
  auto& r = rt();
  bool from = self.device().type() == PU1, to = dst.device().type() == PU1;
  int source = from ? self.device().index() : -1, target = to ? dst.device().index() : -1;
  std::string what = "copy";
  if (from && to) {
    Lock l(r.mutex);
    r.copies++;
    int s = stream_of(source);
    if (source == target) {
      auto seq = r.tick(s); takes(s, 0);
      reads(block_of(self), s, seq, what); writes(block_of(dst), s, seq, what);
    } else {  // as CUDA: on the source's current stream, after and before all that the target's current stream has
      r.crossings++;
      int t = stream_of(target);
      stream_waits(s, r.streams[t].clock, r.streams[t].until);
      auto seq = r.tick(s);
      takes(s, r.latency + (r.bandwidth ? dst.nbytes() / r.bandwidth : 0));
      what = "copy from sim:" + std::to_string(source) + " to sim:" + std::to_string(target);
      reads(block_of(self), s, seq, what); writes(block_of(dst), s, seq, what);
      stream_waits(t, r.streams[s].clock, r.streams[s].until);
    }
    plain_copy(dst, self);
  } else {
    int d = from ? source : target; int s; uint64_t seq;
    auto& host = from ? dst : self;
    bool async = non_blocking && host.has_storage() && PinnedAllocator::has(host.storage().data()) && host.is_contiguous() && host.dtype() == (from ? self : dst).dtype();
    {
      Lock l(r.mutex);
      r.copies++;
      s = stream_of(d); seq = r.tick(s);
      takes(s, r.latency + (r.bandwidth ? host.nbytes() / r.bandwidth : 0));
      if (from) reads(block_of(self), s, seq, "copy to the host"); else writes(block_of(dst), s, seq, "copy from the host");
    }
    plain_copy(dst, self);  // without the lock: what it frees may want the interpreter's
    if (async) {
      char* at = static_cast<char*>(host.mutable_data_ptr());
      Pending p{s, seq, host.storage(), at, std::vector<char>(at, at + host.nbytes()), from};
      Lock l(r.mutex);
      if (from) memset(at, 0xFF, host.nbytes());
      r.pending.push_back(std::move(p));
    }
    if (!async && !(to && non_blocking)) sync_stream(s, from ? "copy to the host" : "copy from the host");
  }
  return dst;
}
static at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) { dst.resize_(self.sizes()); return copy_from(self, dst, false); }
static at::Scalar local_scalar(const at::Tensor& self) {
  int s; { Lock l(rt().mutex); s = stream_of(self.device().index()); auto seq = rt().tick(s); reads(block_of(self), s, seq, "item"); }
  sync_stream(s, "item");
  return at::_local_scalar_dense(as_cpu(self));
}
static const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (self.sizes() == sizes) return self;
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  size_t need = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (need > self.storage().nbytes()) {
    c10::DeviceGuard g(self.device());
    auto fresh = allocator()->allocate(need);
    auto& st = const_cast<c10::Storage&>(self.storage());
    if (st.nbytes()) memcpy(fresh.get(), st.data(), st.nbytes());
    st.set_data_ptr_noswap(std::move(fresh)); st.set_nbytes(need);
  }
  return self;
}
static void record_stream(at::Tensor& self, Stream s) { allocator()->recordStream(self.storage().data_ptr(), s); }
static at::Tensor spend(const at::Tensor& x, double seconds) {
  if (x.device().type() == PU1) { Lock l(rt().mutex); takes(stream_of(x.device().index()), seconds); }
  else std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  return x.clone();
}
static at::Tensor conv(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b, at::IntArrayRef stride, at::IntArrayRef pad, at::IntArrayRef dil, bool tr, at::IntArrayRef op, int64_t g) {
  static auto h = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
  torch::jit::Stack stack{x, w, b, stride, pad, dil, tr, op, g};
  run(h, &stack);
  return stack.back().toTensor();
}
static std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_back(const at::Tensor& g, const at::Tensor& x, const at::Tensor& w, at::IntArrayRef stride, at::IntArrayRef pad, at::IntArrayRef dil, bool tr, at::IntArrayRef op, int64_t groups, std::array<bool, 3> mask) {
  static auto h = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution_backward", "");
  std::optional<at::IntArrayRef> bias; std::vector<int64_t> bias_size{tr ? w.size(1) * groups : w.size(0)};
  torch::jit::Stack stack{g, x, w, c10::IValue(bias_size), stride, pad, dil, tr, op, groups, c10::List<bool>({mask[0], mask[1], mask[2]})};
  run(h, &stack);
  auto n = stack.size();
  return {stack[n - 3].toTensor(), stack[n - 2].toTensor(), stack[n - 1].toTensor()};
}

static std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& x, double p, std::optional<bool> train) {
  if (x.numel() == 0 || !train.value_or(true) || p == 0) return {x.clone(), at::ones_like(x, x.options().dtype(at::kBool))};
  auto kept = at::empty_like(x).bernoulli_(1 - p);
  return {x.mul(kept).mul_(p == 1 ? 0. : 1. / (1 - p)), kept.to(at::kBool)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", resize);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("record_stream", record_stream);
  m.impl("native_dropout", native_dropout);
  m.impl("convolution_overrideable", conv);
  m.impl("convolution_backward_overrideable", conv_back);
}
TORCH_LIBRARY(gpipe_sim, m) { m.def("spend(Tensor x, float seconds) -> Tensor"); }
TORCH_LIBRARY_IMPL(gpipe_sim, CompositeExplicitAutograd, m) { m.impl("spend", spend); }

using namespace at::autocast;
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(mse_loss, fp32)
}

// Functional forms of structured operators go to the CPU's as they are, not by way of their out= forms.
static void structured() {
  static auto* lib = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto& d = c10::Dispatcher::singleton();
  for (auto& n : d.getAllOpNames()) {
    if (n.name.rfind("aten::", 0)) continue;
    auto op = d.findOp(n);
    if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional) || !op->hasKernelForDispatchKey(c10::DispatchKey::CPU) || op->hasKernelForDispatchKey(c10::DispatchKey::PrivateUse1)) continue;
    bool view = false;
    for (auto& r : op->schema().returns()) view |= r.alias_info() && !r.alias_info()->isWrite();
    if (view) continue;
    auto full = n.name.substr(6) + (n.overload_name.empty() ? "" : "." + n.overload_name);
    lib->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&run>());
  }
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  structured();
  c10::SetAllocator(PU1, allocator());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  m.def("device_count", [] { return rt().devices; });
  m.def("current_device", [] { return int(current_device); });
  m.def("set_device", [](int d) { TORCH_CHECK(d < rt().devices); current_device = DeviceIndex(d); });
  m.def("default_generators", [] { return defaults(); });
  m.def("reports", [] { Lock l(rt().mutex); return rt().reports; });
  m.def("clear", [] { Lock l(rt().mutex); auto& r = rt(); r.reports.clear(); r.sync_ops.clear(); r.syncs = r.launches = r.copies = r.crossings = 0; for (auto& s : r.streams) s.busy = 0; });
  m.def("raises", [](bool on) { rt().raises = on; });
  m.def("checks", [](bool on) { rt().check = on; });
  m.def("counts", [] { Lock l(rt().mutex); auto& r = rt(); return std::map<std::string, uint64_t>{{"host_waits", r.syncs}, {"kernels", r.launches}, {"copies", r.copies}, {"crossings", r.crossings}}; });
  m.def("sync_ops", [] { Lock l(rt().mutex); return rt().sync_ops; });
  m.def("link", [](double bandwidth, double latency) { rt().bandwidth = bandwidth; rt().latency = latency; });
  m.def("capacity", [](int d, int64_t bytes) { rt().capacity[d] = bytes; });
  m.def("busy", [](int d) { Lock l(rt().mutex); double b = 0; for (auto& s : rt().streams) if (s.device == d) b += s.busy; return b; });
}
