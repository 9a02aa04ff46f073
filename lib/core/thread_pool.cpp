#include "core/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/error.h"

namespace vqkv {
namespace {

thread_local bool t_inside = false;

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

struct Job {
  int64_t n = 0;
  const std::function<void(int64_t)>* body = nullptr;
  std::atomic<int64_t> next{0};
  std::atomic<int> running{0};  // changed under Pool::mutex_, read without it while spinning
  std::exception_ptr error;     // of the body with the lowest index that threw one
  int64_t failed = 0;           // that index
};

// A step of decoding is some 180 short jobs, and waking a sleeping thread costs tens of microseconds: look for the next
// job for about that long before sleeping. Whatever is seen here is decided again under the lock.
template <class Condition>
void spin_until(Condition&& condition) {
  constexpr int kLooks = 600;
  for (int i = 0; i < kLooks && !condition(); ++i) pause_briefly();
}

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this](std::stop_token stop) { work(stop); });
  }
  ~Pool() {
    for (auto& w : workers_) w.request_stop();
    { const std::lock_guard lock(mutex_); }
    wake_.notify_all();
  }

  void run(int64_t n, const std::function<void(int64_t)>& body) {
    const std::lock_guard one_at_a_time(entry_);
    auto job = std::make_shared<Job>();
    job->n = n;
    job->body = &body;
    {
      const std::lock_guard lock(mutex_);
      job_ = job;
      job->running = 1;
      ++generation_;
    }
    wake_.notify_all();
    drain(*job);
    {
      const std::lock_guard lock(mutex_);
      job_.reset();  // nobody joins any more
      --job->running;
    }
    spin_until([&] { return job->running.load(std::memory_order_relaxed) == 0; });
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return job->running == 0; });
    // Taken out of the job, whose last owner may be a worker: the exception ends on the thread that reads it.
    const std::exception_ptr error = std::move(job->error);
    if (error) std::rethrow_exception(error);
  }

 private:
  void drain(Job& job) {
    t_inside = true;
    for (int64_t i; (i = job.next.fetch_add(1)) < job.n;) {
      try {
        (*job.body)(i);
      } catch (...) {
        const std::lock_guard lock(mutex_);
        // Bodies before this one have begun and may still fail: their error is the one at any thread count.
        if (!job.error || i < job.failed) {
          job.error = std::current_exception();
          job.failed = i;
        }
        job.next = job.n;
      }
    }
    t_inside = false;
  }

  void work(const std::stop_token& stop) {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    while (true) {
      lock.unlock();
      spin_until([&] { return generation_.load(std::memory_order_relaxed) != seen; });
      lock.lock();
      wake_.wait(lock, [&] { return stop.stop_requested() || (job_ && generation_ != seen); });
      if (stop.stop_requested()) return;
      seen = generation_;
      const std::shared_ptr<Job> job = job_;
      ++job->running;
      lock.unlock();
      drain(*job);
      lock.lock();
      if (--job->running == 0) done_.notify_all();
    }
  }

  std::mutex entry_, mutex_;
  std::condition_variable wake_, done_;
  std::shared_ptr<Job> job_;
  std::atomic<uint64_t> generation_{0};  // changed under mutex_, read without it while spinning
  std::vector<std::jthread> workers_;
};

int available_processors() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

std::mutex g_pool_mutex;
int g_threads = 0;
std::unique_ptr<Pool> g_pool;

}  // namespace

void set_thread_count(int threads) {
  if (threads < 1) fail_usage("the thread count must be at least 1");
  const std::lock_guard lock(g_pool_mutex);
  if (threads != g_threads) g_pool.reset();
  g_threads = threads;
}

int thread_count() {
  const std::lock_guard lock(g_pool_mutex);
  if (g_threads == 0) g_threads = available_processors();
  return g_threads;
}

void parallel_for(int64_t n, const std::function<void(int64_t)>& body) {
  if (n <= 0) return;
  const int threads = thread_count();
  if (n == 1 || threads == 1 || t_inside) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  Pool* pool = nullptr;
  {
    const std::lock_guard lock(g_pool_mutex);
    if (!g_pool) g_pool = std::make_unique<Pool>(threads);
    pool = g_pool.get();
  }
  pool->run(n, body);
}

void parallel_chunks(int64_t n, int64_t chunk, const std::function<void(int64_t, int64_t)>& body) {
  parallel_for((n + chunk - 1) / chunk, [&](int64_t i) { body(i * chunk, std::min(n, (i + 1) * chunk)); });
}

}  // namespace vqkv
