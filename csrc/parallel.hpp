// Loops over threads. They run on the OpenMP threads of the process, which are torch's: threads of our own would compete
// with torch's, which go on spinning for a while after each of its operations.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#endif

namespace dpfast {

// The entry point behind `#pragma omp parallel` in GNU's runtime, which LLVM's and Intel's export too.
using OpenMP = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

#if defined(__linux__)
// The runtime that torch has loaded; it may lie inside its wheel, under a name that only the list of loaded objects knows.
inline OpenMP find_openmp() {
  OpenMP found = nullptr;
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void* result) {
        const char* file = std::strrchr(object->dlpi_name, '/');
        if (file == nullptr) return 0;
        for (const char* name : {"/libgomp", "/libiomp5", "/libomp"}) {
          if (std::strncmp(file, name, std::strlen(name)) != 0) continue;
          if (void* handle = dlopen(object->dlpi_name, RTLD_LAZY | RTLD_NOLOAD)) {
            *static_cast<OpenMP*>(result) = reinterpret_cast<OpenMP>(dlsym(handle, "GOMP_parallel"));
            dlclose(handle);
          }
        }
        return std::strstr(object->dlpi_name, "torch") != nullptr && *static_cast<OpenMP*>(result) != nullptr ? 1 : 0;
      },
      &found);
  return found;
}

// Null where there is none, and in a forked child, where the threads of an OpenMP runtime are gone for good.
inline OpenMP openmp() {
  static std::atomic<OpenMP> runtime{find_openmp()};
  static const int registered = pthread_atfork(nullptr, nullptr, [] { runtime.store(nullptr); });
  (void)registered;
  return runtime.load(std::memory_order_relaxed);
}
#else
inline OpenMP openmp() { return nullptr; }
#endif

// `kernel(args, begin, end)` over [0, total) in pieces of about `grain` items, on at most `threads` threads.
template <class Args>
void parallel_for(int64_t total, int64_t grain, int threads, const Args& args, void (*kernel)(const Args&, int64_t, int64_t)) {
  grain = std::max<int64_t>(grain, 1);
  const int team = static_cast<int>(std::min<int64_t>(threads, (total + grain - 1) / grain));
  if (team <= 1) {
    if (total > 0) kernel(args, 0, total);
    return;
  }
  struct Loop {
    const Args& args;
    void (*kernel)(const Args&, int64_t, int64_t);
    int64_t total, grain;
    std::atomic<int64_t> next;
  } loop{args, kernel, total, grain, {0}};
  const auto pull = [](void* data) {
    Loop& loop = *static_cast<Loop*>(data);
    for (;;) {
      const int64_t begin = loop.next.fetch_add(loop.grain, std::memory_order_relaxed);
      if (begin >= loop.total) return;
      loop.kernel(loop.args, begin, std::min(begin + loop.grain, loop.total));
    }
  };
  if (const OpenMP run = openmp()) {
    run(pull, &loop, static_cast<unsigned>(team), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int i = 1; i < team; ++i) others.emplace_back(pull, static_cast<void*>(&loop));
  pull(&loop);
  for (std::thread& other : others) other.join();
}

}  // namespace dpfast
