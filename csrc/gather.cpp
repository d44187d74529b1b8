#include <vector>

#include "kernels.hpp"
#include "parallel.hpp"

namespace dpfast {
namespace {

constexpr int64_t kCacheLine = 64;

DPFAST_INLINE void normalise(const uint8_t* bytes, int64_t count, bool flip, float scale, float bias, float* to) {
  if (flip) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(bytes[count - 1 - i]) * scale + bias;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(bytes[i]) * scale + bias;
  }
}

// Planes of one line, [kChannels][width], to pixels, [width][kChannels]; a constant count lets the compiler shuffle.
template <int kChannels>
DPFAST_INLINE void interleave(const float* planes, int64_t width, float* pixels) {
  for (int64_t w = 0; w < width; ++w) {
    for (int c = 0; c < kChannels; ++c) pixels[w * kChannels + c] = planes[c * width + w];
  }
}

DPFAST_INLINE void interleave_any(const float* planes, int64_t channels, int64_t width, float* pixels) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t w = 0; w < width; ++w) pixels[w * channels + c] = planes[c * width + w];
  }
}

DPFAST_CLONES void gather_rows(const Gather& args, int64_t begin, int64_t end) {
  const int64_t channels = args.channels, width = args.width, plane = args.height * width;
  std::vector<float> buffers(static_cast<size_t>(2 * channels * width));
  float *planes = buffers.data(), *pixels = planes + channels * width;
  const bool stream = args.batch * channels * plane * size_of(args.dtype) > kStreamBytes;
  const auto row_of = [&args](int64_t i) {
    const int64_t index = args.indices[i];
    return args.chunks[index / args.chunk_rows] + index % args.chunk_rows * args.row_stride;
  };
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t *row = row_of(i), *next = row_of(i + 1 < end ? i + 1 : i);
    const int64_t to = i * channels * plane;
    const bool flip = args.flip != nullptr && args.flip[i] != 0;
    for (int64_t h = 0; h < args.height; ++h) {
      for (int64_t c = 0; c < channels; ++c) {
        // Rows lie anywhere in memory: the work on this one hides the way of the next.
        for (int64_t w = 0; w < width; w += kCacheLine) __builtin_prefetch(next + c * plane + h * width + w);
        normalise(row + c * plane + h * width, width, flip, args.scale[c], args.bias[c], planes + c * width);
        if (!args.channels_last) {
          store_floats(args.out, args.dtype, to + c * plane + h * width, width, planes + c * width, stream);
        }
      }
      if (!args.channels_last) continue;
      const float* line = pixels;
      if (channels == 1) {
        line = planes;
      } else if (channels == 3) {
        interleave<3>(planes, width, pixels);
      } else if (channels == 4) {
        interleave<4>(planes, width, pixels);
      } else {
        interleave_any(planes, channels, width, pixels);
      }
      store_floats(args.out, args.dtype, to + h * width * channels, width * channels, line, stream);
    }
  }
  stream_fence();
}

}  // namespace

bool gather(const Gather& args, int threads) {
  for (int64_t i = 0; i < args.batch; ++i) {
    if (args.indices[i] < 0 || args.indices[i] >= args.rows) return false;
  }
  const int64_t row = std::max<int64_t>(args.channels * args.height * args.width, 1);
  expect_large(args.out, args.batch * row * size_of(args.dtype));
  parallel_for(args.batch, 32768 / row, threads, args, gather_rows);
  return true;
}

}  // namespace dpfast
