// A small pool of threads. torch's own OpenMP runtime is private to its wheel; a second one would spin against it.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace dpfast {

class Pool {
 public:
  static Pool& get() {
    // Never destroyed: idle workers may outlive the exit handlers. A forked child has no workers and starts a new pool.
    static std::atomic<Pool*> pool{new Pool};
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
    (void)registered;
#endif
    return *pool.load();
  }

  // Calls body(context, begin, end) for pieces of [0, total) of `grain` items on at most `threads` threads.
  void run(int64_t total, int64_t grain, int threads, void (*body)(const void*, int64_t, int64_t), const void* context) {
    const int64_t pieces = (total + grain - 1) / grain;
    const int wanted = static_cast<int>(std::min<int64_t>(threads, pieces)) - 1;
    std::unique_lock<std::mutex> exclusive(callers_, std::try_to_lock);
    if (wanted <= 0 || !exclusive.owns_lock()) {  // another caller has the workers: do it here
      if (total > 0) body(context, 0, total);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < wanted) {
        std::thread(&Pool::work, this, workers_, generation_).detach();
        ++workers_;
      }
      job_ = {body, context, total, grain, wanted};
      next_.store(0, std::memory_order_relaxed);
      busy_ = wanted;
      ++generation_;
    }
    wake_.notify_all();
    pull();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  struct Job {
    void (*body)(const void*, int64_t, int64_t);
    const void* context;
    int64_t total, grain;
    int workers;
  };

  void pull() {
    for (;;) {
      const int64_t begin = next_.fetch_add(job_.grain, std::memory_order_relaxed);
      if (begin >= job_.total) return;
      job_.body(job_.context, begin, std::min(begin + job_.grain, job_.total));
    }
  }

  void work(int index, uint64_t seen) {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (index >= job_.workers) continue;
      }
      pull();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  Job job_{};
  std::atomic<int64_t> next_{0};
  uint64_t generation_ = 0;
  int workers_ = 0, busy_ = 0;
};

// `kernel(args, begin, end)` over [0, total), with pieces of about `grain` items.
template <class Args>
void parallel_for(int64_t total, int64_t grain, int threads, const Args& args, void (*kernel)(const Args&, int64_t, int64_t)) {
  struct Call {
    const Args& args;
    void (*kernel)(const Args&, int64_t, int64_t);
  } call{args, kernel};
  Pool::get().run(
      total, std::max<int64_t>(grain, 1), threads,
      [](const void* context, int64_t begin, int64_t end) {
        const Call& call = *static_cast<const Call*>(context);
        call.kernel(call.args, begin, end);
      },
      &call);
}

}  // namespace dpfast
