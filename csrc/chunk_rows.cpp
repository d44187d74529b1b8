#include <algorithm>
#include <cstring>

#include "kernels.hpp"
#include "parallel.hpp"

namespace dpfast {
namespace {

constexpr int64_t kAhead = 16;           // rows
constexpr int64_t kPrefetchBytes = 512;  // of a row; the hardware's own prefetcher follows a longer one
constexpr int64_t kPieceBytes = int64_t{256} << 10;  // of a thread: waking another one takes as long as copying half of it

DPFAST_INLINE const uint8_t* row_of(const Rows& args, int64_t i) {
  const int64_t index = args.indices[i];
  return args.chunks[index / args.chunk_rows] + index % args.chunk_rows * args.stride;
}

DPFAST_INLINE void fetch(const Rows& args, int64_t i) {
  const uint8_t* row = row_of(args, i);
  for (int64_t byte = 0; byte < std::min(args.width, kPrefetchBytes); byte += 64) __builtin_prefetch(row + byte);
}

void copy_rows(const Rows& args, int64_t begin, int64_t end) {
  const bool stream = args.count * args.width > kStreamBytes && args.width % int64_t{sizeof(float)} == 0;
  for (int64_t i = begin; i < std::min(begin + kAhead, end); ++i) fetch(args, i);
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < end) fetch(args, i + kAhead);
    const uint8_t* row = row_of(args, i);
    if (stream) {
      stream_out(reinterpret_cast<float*>(args.out + i * args.width), reinterpret_cast<const float*>(row),
                 args.width / int64_t{sizeof(float)});
    } else {
      std::memcpy(args.out + i * args.width, row, static_cast<size_t>(args.width));
    }
  }
  stream_fence();
}

}  // namespace

bool rows(const Rows& args, int threads) {
  for (int64_t i = 0; i < args.count; ++i) {
    if (args.indices[i] < 0 || args.indices[i] >= args.total) return false;
  }
  const int64_t width = std::max<int64_t>(args.width, 1);
  expect_large(args.out, args.count * args.width);
  parallel_for(args.count, std::max<int64_t>(kPieceBytes / width, kAhead), threads, args, copy_rows);
  return true;
}

}  // namespace dpfast
