#include "device/emulator.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <utility>

#include "core/error.h"
#include "core/rng.h"
#include "device/fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(p, n) (static_cast<void>(p), static_cast<void>(n))
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

// The program itself, by the linker: constants of kernel files lie in it.
extern "C" const char __executable_start, end;

namespace vqkv::device::emulated {
namespace {

constexpr unsigned kMostThreads = 1024;
constexpr size_t kStack = size_t{128} << 10, kMostFaults = 50;

struct Gathering {
  Meeting kind;
  unsigned mask = 0, arrived = 0, leaving = 0;
  Site site;
  Deposits brought;
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  size_t bytes;
  int group;
};

enum class State : uint8_t { kReady, kAtBarrier, kMeeting, kDone };

struct Thread {
  Fiber fiber;
  State state = State::kReady;
  dim3 index;
  std::shared_ptr<Gathering> gathering;
  Site site;
  std::vector<Copy> copies;
  int group = 0;
};

class Machine {
 public:
  Machine()
      : stacks_(static_cast<unsigned char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    VQKV_CHECK(stacks_ != MAP_FAILED);
  }
  ~Machine() { munmap(stacks_, kMostThreads * kStack); }

  Options options;
  Memory memory;
  Profile profile;

  std::vector<std::string> take_faults() {
    told_.clear();
    return std::exchange(faults_, {});
  }
  void run(const Launch& launch);
  void thread_main();
  unsigned current() const { return current_; }

  void barrier(Site site);
  void fence() { order_.fence(current_, alive_); }
  const Deposits& meet(Meeting kind, unsigned mask, const void* brought, size_t bytes, Site site, unsigned& present);
  void leave();
  void* take_shared(size_t& pieces, size_t& used, size_t bytes, Site site);
  void copy_async(void* to, const void* from, size_t bytes, Site site);
  void commit_copies() { ++self().group; }
  void wait_copies(int keep);
  void access(const void* p, size_t bytes, Access access, const Place& place);

  void fault(const std::string& kind, const std::string& text, const std::string& line) {
    if (!told_.insert(kind + line).second || faults_.size() >= kMostFaults) return;
    faults_.push_back(fmt::format("{}, at {} [block {},{},{}]", text, line, blockIdx.x, blockIdx.y, blockIdx.z));
  }
  std::string who() const {
    return fmt::format("thread {} (warp {}, lane {})", current_, current_ / kLanes, current_ % kLanes);
  }
  bool running() const { return running_; }

 private:
  Thread& self() { return threads_[current_]; }
  void run_block(dim3 block);
  int next_ready();
  void go_on();  // leaves this thread for one that is ready
  void set_ready(unsigned t) {
    threads_[t].state = State::kReady;
    ready_[t / 64] |= uint64_t{1} << (t % 64);
  }
  void wait(State state, Site site) {
    self().state = state;
    self().site = site;
    ready_[current_ / 64] &= ~(uint64_t{1} << (current_ % 64));
  }
  void release_barrier();
  unsigned lanes_alive(unsigned warp) const;
  void complete(unsigned warp, const std::shared_ptr<Gathering>& g);
  void tell_deadlock();

  unsigned char* stacks_;
  Fiber host_;
  HappensBefore order_;
  std::vector<Thread> threads_;
  std::vector<std::vector<std::shared_ptr<Gathering>>> open_;  // by warp
  std::array<uint64_t, kMostThreads / 64> ready_{};
  unsigned current_ = 0, alive_ = 0, at_barrier_ = 0;
  Site barrier_site_;
  Launch launch_;
  Rng random_{1};
  std::vector<std::string> faults_;
  std::set<std::string> told_;  // kinds and lines of those
  bool running_ = false, given_up_ = false;
};

Machine& machine() {
  static Machine m;
  return m;
}

void enter_thread() { machine().thread_main(); }

// The first ready thread in the order that was asked for; -1: none.
int Machine::next_ready() {
  const unsigned words = static_cast<unsigned>(ready_.size());
  if (options.order == Order::kReverse) {
    for (unsigned w = words; w-- > 0;)
      if (ready_[w]) return static_cast<int>(w * 64 + 63 - static_cast<unsigned>(std::countl_zero(ready_[w])));
    return -1;
  }
  const unsigned from = options.order == Order::kRandom ? static_cast<unsigned>(random_.below(threads_.size())) : 0;
  for (unsigned k = 0; k <= words; ++k) {
    const unsigned w = (from / 64 + k) % words;
    const uint64_t bits = k == 0 ? ready_[w] & ~uint64_t{0} << (from % 64) : ready_[w];
    if (bits) return static_cast<int>(w * 64 + static_cast<unsigned>(std::countr_zero(bits)));
  }
  return -1;
}

void Machine::tell_deadlock() {
  std::map<std::string, std::vector<unsigned>> waiting;
  for (unsigned t = 0; t < threads_.size(); ++t) {
    if (threads_[t].state == State::kAtBarrier)
      waiting["the barrier at " + Place(threads_[t].site).text()].push_back(t);
    if (threads_[t].state == State::kMeeting)
      waiting["the warp operation at " + Place(threads_[t].site).text()].push_back(t);
  }
  std::string text = "deadlock";
  for (const auto& [where, who] : waiting)
    text += fmt::format("{} {} threads ({} to {}) wait at {}", text == "deadlock" ? ":" : ",", who.size(), who.front(),
                        who.back(), where);
  fault("deadlock", text, Place(threads_[current_].site).text());
}

void Machine::go_on() {
  const int next = next_ready();
  Thread& left = self();
  if (next < 0) {
    if (alive_ > 0) {
      tell_deadlock();
      given_up_ = true;
    }
    Fiber::change(left.fiber, host_);
    return;
  }
  if (static_cast<unsigned>(next) == current_) return;
  current_ = static_cast<unsigned>(next);
  threadIdx = self().index;
  Fiber::change(left.fiber, self().fiber);
}

void Machine::thread_main() {
  launch_.run(launch_.closure);
  if (!self().copies.empty())
    fault("copies", who() + " ends with asynchronous copies that it did not wait for", "its end");
  wait(State::kDone, Site::current());
  --alive_;
  if (alive_ > 0 && at_barrier_ == alive_) release_barrier();
  const unsigned warp = current_ / kLanes;
  for (const auto& g : std::vector(open_[warp]))
    if (g->arrived == (g->mask & lanes_alive(warp))) complete(warp, g);
  go_on();
  fail_internal("the emulated device: a thread that ended went on");
}

void Machine::run(const Launch& launch) {
  const size_t threads = size_t{launch.block.x} * launch.block.y * launch.block.z;
  const size_t blocks = size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  if (threads < 1 || threads > kMostThreads || blocks < 1)
    fail_internal(
        fmt::format("a launch of {} blocks of {} threads; allowed: 1 to {} threads", blocks, threads, kMostThreads));
  launch_ = launch;
  gridDim = launch.grid;
  blockDim = launch.block;
  threads_.resize(threads);
  random_ = Rng(options.seed);
  given_up_ = false;
  order_.start_launch();
  std::vector<size_t> sequence(blocks);
  for (size_t i = 0; i < blocks; ++i) sequence[i] = options.order == Order::kReverse ? blocks - 1 - i : i;
  if (options.order == Order::kRandom)
    for (size_t i = blocks; i > 1; --i) std::swap(sequence[i - 1], sequence[random_.below(i)]);
  running_ = true;
  for (const size_t b : sequence) {
    const auto x = static_cast<unsigned>(b % launch.grid.x), rows = static_cast<unsigned>(b / launch.grid.x);
    run_block(dim3(x, rows % launch.grid.y, rows / launch.grid.y));
    if (given_up_) break;
  }
  running_ = false;
}

void Machine::run_block(dim3 block) {
  blockIdx = block;
  const auto threads = static_cast<unsigned>(threads_.size());
  order_.start_block(threads);
  memory.start_block(launch_.shared_bytes, options.watched);
  ASAN_UNPOISON_MEMORY_REGION(stacks_, threads * kStack);
  alive_ = threads;
  at_barrier_ = 0;
  open_.assign((threads + kLanes - 1) / kLanes, {});
  ready_.fill(0);
  const dim3 size = launch_.block;
  for (unsigned t = 0; t < threads; ++t) {
    Thread& thread = threads_[t];
    thread.index = dim3(t % size.x, t / size.x % size.y, t / size.x / size.y);
    thread.gathering.reset();
    thread.copies.clear();
    thread.group = 0;
    thread.fiber.prepare(stacks_ + t * kStack, kStack, &enter_thread);
    set_ready(t);
  }
  current_ = static_cast<unsigned>(next_ready());
  threadIdx = self().index;
  Fiber::change(host_, self().fiber);
  if (options.profile) profile.end_block();
}

void Machine::release_barrier() {
  order_.barrier();
  at_barrier_ = 0;
  for (unsigned t = 0; t < threads_.size(); ++t)
    if (threads_[t].state == State::kAtBarrier) set_ready(t);
}

void Machine::barrier(Site site) {
  const auto same = [](const Site& a, const Site& b) {
    return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
  };
  if (at_barrier_ > 0 && !same(barrier_site_, site))
    fault("divergent", fmt::format("divergent barrier: threads wait at {} and {}", Place(barrier_site_).text(), who()),
          Place(site).text());
  barrier_site_ = site;
  wait(State::kAtBarrier, site);
  if (++at_barrier_ == alive_) release_barrier();
  go_on();
}

unsigned Machine::lanes_alive(unsigned warp) const {
  unsigned lanes = 0;
  for (unsigned l = 0; l < kLanes && warp * kLanes + l < threads_.size(); ++l)
    if (threads_[warp * kLanes + l].state != State::kDone) lanes |= 1u << l;
  return lanes;
}

void Machine::complete(unsigned warp, const std::shared_ptr<Gathering>& g) {
  if (g->kind == Meeting::kSync) order_.join(warp, g->arrived);
  for (unsigned l = 0; l < kLanes; ++l)
    if (g->arrived >> l & 1) set_ready(warp * kLanes + l);
  std::erase(open_[warp], g);
}

const Deposits& Machine::meet(Meeting kind, unsigned mask, const void* brought, size_t bytes, Site site,
                              unsigned& present) {
  VQKV_CHECK(bytes <= kDeposit);
  const unsigned warp = current_ / kLanes, lane = current_ % kLanes;
  if (!(mask >> lane & 1)) {
    fault("not in mask", who() + " is not in the mask of its own warp operation", Place(site).text());
    mask |= 1u << lane;
  }
  std::shared_ptr<Gathering> mine;
  for (const auto& g : open_[warp]) {
    if (g->kind == kind && g->mask == mask && !(g->arrived >> lane & 1)) {
      mine = g;
      break;
    }
    if (g->mask & mask)
      fault("mixed", "lanes of a warp meet in unlike operations or masks, the others at " + Place(g->site).text(),
            Place(site).text());
  }
  if (!mine) {
    mine = std::make_shared<Gathering>();
    mine->kind = kind;
    mine->mask = mask;
    mine->site = site;
    open_[warp].push_back(mine);
  }
  if (bytes > 0) std::memcpy(mine->brought[lane].data(), brought, bytes);
  mine->arrived |= 1u << lane;
  self().gathering = mine;
  wait(State::kMeeting, site);
  if (mine->arrived == (mask & lanes_alive(warp))) complete(warp, mine);
  mine.reset();  // a deadlock never comes back here
  go_on();
  present = self().gathering->arrived;
  return self().gathering->brought;
}

void Machine::leave() { self().gathering.reset(); }

void* Machine::take_shared(size_t& pieces, size_t& used, size_t bytes, Site site) {
  std::string wrong;
  unsigned char* p = memory.take(pieces++, used, bytes, wrong);
  used += (bytes + 15) / 16 * 16;
  if (!wrong.empty()) fault("carve", wrong, Place(site).text());
  return p;
}

void Machine::copy_async(void* to, const void* from, size_t bytes, Site site) {
  const Place place(site);
  if (from) access(from, bytes, Access::kRead, place);
  access(to, bytes, Access::kWrite, place);
  Region* region = memory.find(to);
  if (!region || !region->shared || region->offset(to) + bytes > region->bytes) {
    fault("copy", "an asynchronous copy fills what is no piece of shared memory", place.text());
    return;
  }
  // Done as late as allowed: until then it holds nothing.
  std::memset(to, kPoison, bytes);
  for (size_t i = 0; i < bytes && options.watched; ++i) region->cells[region->offset(to) + i].in_flight = true;
  self().copies.push_back(
      {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, self().group});
}

void Machine::wait_copies(int keep) {
  Thread& t = self();
  std::erase_if(t.copies, [&](const Copy& c) {
    if (c.group >= t.group - keep) return false;
    Region* region = memory.find(c.to);
    for (size_t i = 0; i < c.bytes && options.watched; ++i) region->cells[region->offset(c.to) + i].in_flight = false;
    if (c.from)
      std::memcpy(c.to, c.from, c.bytes);
    else
      std::memset(c.to, 0, c.bytes);
    if (options.watched)
      memory.touch(*region, region->offset(c.to), c.bytes, Access::kWrite, current_, order_,
                   [&](const std::string& kind, const std::string& text) { fault(kind, text, "the wait for a copy"); });
    return true;
  });
}

void Machine::access(const void* address, size_t bytes, Access access, const Place& place) {
  if (!running_ || !options.watched) return;
  const auto* p = static_cast<const unsigned char*>(address);
  if (access == Access::kAtomic) order_.atomic(current_, address);
  if (p >= stacks_ && p < stacks_ + kMostThreads * kStack) {
    if (static_cast<size_t>(p - stacks_) / kStack != current_)
      fault("stack", who() + " touches another thread's local memory", place.text());
    return;
  }
  const char* verb = access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "changes";
  if (bytes <= 16 && std::has_single_bit(bytes) && reinterpret_cast<uintptr_t>(p) % bytes != 0)
    fault("aligned", fmt::format("{} {} {} bytes at an address that is no multiple of them", who(), verb, bytes),
          place.text());
  if (Region* r = memory.find(address)) {
    if (p < r->base || p + bytes > r->base + r->bytes) {
      fault("range",
            fmt::format("{} {} beyond {} of {} bytes, at byte {}", who(), verb, r->name, r->bytes, p - r->base),
            place.text());
      return;
    }
    if (options.profile)
      profile.add(place, current_, r->shared, access != Access::kRead, memory.device_address(*r, r->offset(p)),
                  static_cast<unsigned>(bytes));
    memory.touch(*r, r->offset(p), bytes, access, current_, order_,
                 [&](const std::string& kind, const std::string& text) { fault(kind, text, place.text()); });
    return;
  }
  const auto within = [&](const void* first, size_t size) {
    return p >= first && p + bytes <= static_cast<const unsigned char*>(first) + size;
  };
  const char* image = &__executable_start;
  if (access == Access::kRead &&
      (within(launch_.parameters, launch_.parameter_bytes) || within(image, static_cast<size_t>(&end - image))))
    return;
  fault("wild", fmt::format("{} {} {} bytes that are no device memory", who(), verb, bytes), place.text());
  given_up_ = true;  // the host's memory: whatever follows is worth nothing
  Fiber::change(self().fiber, host_);
}

}  // namespace

void configure(const Options& options) { machine().options = options; }
const Options& options() { return machine().options; }
std::vector<std::string> take_faults() { return machine().take_faults(); }
std::vector<Traffic> take_traffic() { return machine().profile.take(); }
Memory& memory() { return machine().memory; }
void run(const Launch& launch) { machine().run(launch); }

void require_faultless(std::string_view what) {
  const std::vector<std::string> faults = take_faults();
  if (faults.empty()) return;
  std::string text =
      fmt::format("the emulated device, {}: {} fault{}", what, faults.size(), faults.size() == 1 ? "" : "s");
  for (size_t i = 0; i < std::min<size_t>(faults.size(), 5); ++i) text += "\n  " + faults[i];
  fail_internal(text);
}

unsigned lane() { return machine().current() % kLanes; }
void barrier(Site site) { machine().barrier(site); }
void fence() { machine().fence(); }
const Deposits& meet(Meeting kind, unsigned mask, const void* brought, size_t bytes, Site site, unsigned& present) {
  return machine().meet(kind, mask, brought, bytes, site, present);
}
void leave() { machine().leave(); }

unsigned source_lane(Meeting kind, int argument, int width, unsigned present, Site site) {
  const int here = static_cast<int>(lane()), segment = here / width * width;
  int from = here;
  if (kind == Meeting::kShuffleXor) from = here ^ argument;
  if (kind == Meeting::kShuffleIndex) from = segment + (argument & (width - 1));
  if (kind == Meeting::kShuffleDown) from = here + argument;
  if (kind == Meeting::kShuffleUp) from = here - argument;
  if (from < segment || from >= segment + width) from = here;  // its own value
  if (!(present >> from & 1))
    machine().fault("absent", machine().who() + " shuffles with a lane that takes no part", Place(site).text());
  return static_cast<unsigned>(from);
}

void* take_shared(size_t& pieces, size_t& used, size_t bytes, Site site) {
  return machine().take_shared(pieces, used, bytes, site);
}
void copy_async(void* to, const void* from, size_t bytes, Site site) { machine().copy_async(to, from, bytes, site); }
void commit_copies() { machine().commit_copies(); }
void wait_copies(int keep) { machine().wait_copies(keep); }
void on_access(const void* p, size_t bytes, Access access, const Place& place) {
  machine().access(p, bytes, access, place);
}
void on_undefined(const std::string& what, const std::string& line) {
  if (machine().running()) machine().fault("undefined", machine().who() + " " + what, line);
}

}  // namespace vqkv::device::emulated
