// How results reach memory: past the caches where they are large, and on large pages where they are new.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdio>

#include "simd.hpp"

namespace dpfast {

// Copies past the caches: without it, a store first reads the line that it overwrites, a third of all traffic.
DPFAST_INLINE void stream_out(float* to, const float* from, int64_t count) {
  int64_t i = 0;
#if defined(__SSE2__)
  for (; i < count && reinterpret_cast<uintptr_t>(to + i) % 16 != 0; ++i) to[i] = from[i];
  for (; i + 4 <= count; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
#endif
  for (; i < count; ++i) to[i] = from[i];
}

DPFAST_INLINE void store_floats(void* to, DType dtype, int64_t first, int64_t count, const float* from, bool stream) {
  if (dtype == DType::kFloat32) {
    float* target = static_cast<float*>(to) + first;
    if (stream) {
      stream_out(target, from, count);
    } else if (target != from) {
      std::memcpy(target, from, static_cast<size_t>(count) * sizeof(float));
    }
    return;
  }
  uint16_t* target = static_cast<uint16_t*>(to) + first;
  if (dtype == DType::kFloat16) {
    for (int64_t i = 0; i < count; ++i) target[i] = float_to_half(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = float_to_bfloat(from[i]);
  }
}

// Streamed stores are weakly ordered: a thread calls this before it reports its part as done.
DPFAST_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Outputs beyond this many bytes bypass the caches; below it, the reader finds them there.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

// Where Linux tells the order of the smallest free block that a guest hands back to its host; -1 where none is.
constexpr const char* kReportingOrder = "/sys/module/page_reporting/parameters/page_reporting_order";

// Whether the file says that free blocks are handed back. A missing one, or what is no order, says that they are not.
inline bool gives_back_free_blocks(const char* path) {
  long long order = -1;  // the kernel's is an unsigned int, -1 of which reads as 4294967295
  std::FILE* file = std::fopen(path, "r");
  if (file == nullptr) return false;
  const bool read = std::fscanf(file, "%lld", &order) == 1;
  std::fclose(file);
  return read && order >= 0 && order < 64;
}

// Whether a large result is to lie on large pages. Where the host has taken the memory of free blocks back, it has to find
// it again for each large page, 4 KiB at a time: 262 MB took 1.4 s, on small pages, cut from smaller blocks, 0.25 s. Where
// it has not, large pages take 0.08 s.
inline std::atomic<bool>& large_pages() {
  static std::atomic<bool> wanted{!gives_back_free_blocks(kReportingOrder)};
  return wanted;
}

// Asks for large pages under a large result before it is written. A new 4 KiB page costs a fault that takes longer than
// writing it; where the memory is in use already, this changes nothing.
inline void expect_large(void* to, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  constexpr int64_t kLarge = int64_t{8} << 20;
  if (to == nullptr || bytes < kLarge || !large_pages().load(std::memory_order_relaxed)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(to) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(to) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)to, (void)bytes;
#endif
}

}  // namespace dpfast
