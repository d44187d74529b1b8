#include <cmath>
#include <vector>

#include "kernels.hpp"
#include "parallel.hpp"

namespace dpfast {
namespace {

constexpr int64_t kCacheLine = 64;
// Batches beyond this many bytes bypass the caches. A loader's batches take turns, so that even a small one is written to
// memory that no cache holds: 256 x 3x32x32 on four buffers takes half the time.
constexpr int64_t kStreamBatch = int64_t{1} << 20;

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

// One line of the batch, from planes; `pixels` is room for as many floats. `to` counts elements of the line's image.
DPFAST_INLINE void store_line(const Gather& args, int64_t to, int64_t line, int64_t height, int64_t width,
                              const float* planes, float* pixels, bool stream) {
  const int64_t channels = args.channels;
  if (!args.channels_last) {
    for (int64_t c = 0; c < channels; ++c) {
      store_floats(args.out, args.dtype, to + (c * height + line) * width, width, planes + c * width, stream);
    }
    return;
  }
  const float* from = pixels;
  if (channels == 1) {
    from = planes;
  } else if (channels == 3) {
    interleave<3>(planes, width, pixels);
  } else if (channels == 4) {
    interleave<4>(planes, width, pixels);
  } else {
    interleave_any(planes, channels, width, pixels);
  }
  store_floats(args.out, args.dtype, to + line * width * channels, width * channels, from, stream);
}

DPFAST_INLINE const uint8_t* row_of(const Gather& args, int64_t i) {
  const int64_t index = args.indices[i];
  return args.chunks[index / args.chunk_rows] + index % args.chunk_rows * args.row_stride;
}

// Whole images as pixels, [height][width][kChannels]. Bytes are interleaved first and widened then: a quarter of the
// shuffles that floats would take, and lines are no unit, so that small images have no ends to pay for.
template <int kChannels>
DPFAST_INLINE void gather_pixels(const Gather& args, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 512, kPattern = kChannels * 16;  // pixels at a time; floats until scale and bias repeat
  const int64_t width = args.width, plane = args.height * width;
  const bool stream = args.batch * kChannels * plane * size_of(args.dtype) > kStreamBatch;
  float scale[kPattern], bias[kPattern], floats[kBlock * kChannels];
  uint8_t bytes[kBlock * kChannels];
  for (int64_t j = 0; j < kPattern; ++j) {
    scale[j] = args.scale[j % kChannels];
    bias[j] = args.bias[j % kChannels];
  }
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t *row = row_of(args, i), *next = row_of(args, i + 1 < end ? i + 1 : i);
    const bool flip = args.flip != nullptr && args.flip[i] != 0;
    const int64_t longest = flip ? std::min(width, kBlock) : kBlock;
    for (int64_t at = 0, count = 0; at < plane; at += count) {
      count = std::min(longest, (flip ? (at / width + 1) * width : plane) - at);
      // Rows lie anywhere in memory: the work on this one hides the way of the next.
      for (int64_t c = 0; c < kChannels; ++c) {
        for (int64_t p = 0; p < count; p += kCacheLine) __builtin_prefetch(next + c * plane + at + p);
      }
      if (flip) {
        const int64_t line = at / width * width;
        const uint8_t* last = row + 2 * line + width - 1 - at;
        for (int64_t p = 0; p < count; ++p) {
          for (int c = 0; c < kChannels; ++c) bytes[p * kChannels + c] = last[c * plane - p];
        }
      } else {
        for (int64_t p = 0; p < count; ++p) {
          for (int c = 0; c < kChannels; ++c) bytes[p * kChannels + c] = row[c * plane + at + p];
        }
      }
      int64_t done = 0;
      for (; done + kPattern <= count * kChannels; done += kPattern) {
        for (int64_t j = 0; j < kPattern; ++j) floats[done + j] = static_cast<float>(bytes[done + j]) * scale[j] + bias[j];
      }
      for (int64_t j = 0; done < count * kChannels; ++done, ++j) {
        floats[done] = static_cast<float>(bytes[done]) * scale[j] + bias[j];
      }
      store_floats(args.out, args.dtype, (i * plane + at) * kChannels, count * kChannels, floats, stream);
    }
  }
  stream_fence();
}

DPFAST_CLONES void gather_rgb(const Gather& args, int64_t begin, int64_t end) { gather_pixels<3>(args, begin, end); }

DPFAST_CLONES void gather_rows(const Gather& args, int64_t begin, int64_t end) {
  const int64_t channels = args.channels, width = args.width, plane = args.height * width;
  std::vector<float> buffers(static_cast<size_t>(2 * channels * width));
  float *planes = buffers.data(), *pixels = planes + channels * width;
  const bool stream = args.batch * channels * plane * size_of(args.dtype) > kStreamBytes;
  for (int64_t i = begin; i < end; ++i) {
    const uint8_t *row = row_of(args, i), *next = row_of(args, i + 1 < end ? i + 1 : i);
    const int64_t to = i * channels * plane;
    const bool flip = args.flip != nullptr && args.flip[i] != 0;
    for (int64_t h = 0; h < args.height; ++h) {
      for (int64_t c = 0; c < channels; ++c) {
        // Rows lie anywhere in memory: the work on this one hides the way of the next.
        for (int64_t w = 0; w < width; w += kCacheLine) __builtin_prefetch(next + c * plane + h * width + w);
        normalise(row + c * plane + h * width, width, flip, args.scale[c], args.bias[c], planes + c * width);
      }
      store_line(args, to, h, args.height, width, planes, pixels, stream);
    }
  }
  stream_fence();
}

// How one axis of a box becomes one axis of the crop: output j is the sum over t of weight[t][j] * input[index[t][j]].
struct Axis {
  int64_t taps = 0, first = 0, last = 0;  // the inputs in use
  std::vector<int32_t> index;
  std::vector<float> weight;

  // A triangle as wide as the step between outputs, at least one input to each side of its centre.
  void fill(double start, double length, int64_t inputs, int64_t outputs, bool reversed) {
    const double step = length / static_cast<double>(outputs), reach = std::max(step, 1.0);
    taps = static_cast<int64_t>(std::ceil(2.0 * reach));
    index.resize(static_cast<size_t>(taps * outputs));
    weight.resize(static_cast<size_t>(taps * outputs));
    first = inputs - 1;
    last = 0;
    for (int64_t j = 0; j < outputs; ++j) {
      const double centre = start + (static_cast<double>(j) + 0.5) * step - 0.5;
      const int64_t low = static_cast<int64_t>(std::floor(centre - reach)) + 1;
      double total = 0.0;
      for (int64_t t = 0; t < taps; ++t) {
        total += std::max(0.0, 1.0 - std::abs(static_cast<double>(low + t) - centre) / reach);
      }
      for (int64_t t = 0; t < taps; ++t) {
        const size_t at = static_cast<size_t>(t * outputs + (reversed ? outputs - 1 - j : j));
        const int64_t input = std::min(std::max<int64_t>(low + t, 0), inputs - 1);
        first = std::min(first, input);
        last = std::max(last, input);
        index[at] = static_cast<int32_t>(input);
        weight[at] = static_cast<float>(
            std::max(0.0, 1.0 - std::abs(static_cast<double>(low + t) - centre) / reach) / total);
      }
    }
  }
};

DPFAST_INLINE void resample(const float* line, const Axis& axis, int64_t outputs, float scale, float bias, float* to) {
  const int32_t* index = axis.index.data();
  const float* weight = axis.weight.data();
  if (axis.taps == 2) {
#pragma omp simd
    for (int64_t j = 0; j < outputs; ++j) {
      const float value = weight[j] * line[index[j]] + weight[outputs + j] * line[index[outputs + j]];
      to[j] = value * scale + bias;
    }
    return;
  }
  for (int64_t j = 0; j < outputs; ++j) to[j] = 0.0f;
  for (int64_t t = 0; t < axis.taps; ++t, index += outputs, weight += outputs) {
#pragma omp simd
    for (int64_t j = 0; j < outputs; ++j) to[j] += weight[j] * line[index[j]];
  }
  for (int64_t j = 0; j < outputs; ++j) to[j] = to[j] * scale + bias;
}

DPFAST_CLONES void crop_rows(const Crop& crop, int64_t begin, int64_t end) {
  const Gather& args = crop.rows;
  const int64_t channels = args.channels, height = crop.out_height, width = crop.out_width, line = channels * width;
  const bool stream = args.batch * line * height * size_of(args.dtype) > kStreamBytes;
  std::vector<float> bytes(static_cast<size_t>(args.width)), planes(static_cast<size_t>(line)),
      pixels(static_cast<size_t>(line)), lines;
  std::vector<int64_t> held;  // which line of the image each of `lines` is made of
  Axis rows, columns;
  for (int64_t i = begin; i < end; ++i) {
    const float* box = crop.boxes + 4 * i;
    rows.fill(box[0], box[2], args.height, height, false);
    columns.fill(box[1], box[3], args.width, width, args.flip != nullptr && args.flip[i] != 0);
    held.assign(static_cast<size_t>(rows.taps), -1);
    lines.resize(static_cast<size_t>(rows.taps * line));
    const uint8_t* image = row_of(args, i);
    for (int64_t h = 0; h < height; ++h) {
      bool empty = true;
      for (int64_t t = 0; t < rows.taps; ++t) {
        const float weight = rows.weight[static_cast<size_t>(t * height + h)];
        if (weight == 0.0f) continue;
        const int64_t y = rows.index[static_cast<size_t>(t * height + h)], slot = y % rows.taps;
        float* from = lines.data() + slot * line;
        if (held[static_cast<size_t>(slot)] != y) {
          held[static_cast<size_t>(slot)] = y;
          for (int64_t c = 0; c < channels; ++c) {
            const uint8_t* source = image + (c * args.height + y) * args.width;
            normalise(source + columns.first, columns.last - columns.first + 1, false, 1.0f, 0.0f,
                      bytes.data() + columns.first);
            resample(bytes.data(), columns, width, args.scale[c], args.bias[c], from + c * width);
          }
        }
        for (int64_t j = 0; j < line; ++j) {
          planes[static_cast<size_t>(j)] = weight * from[j] + (empty ? 0.0f : planes[static_cast<size_t>(j)]);
        }
        empty = false;
      }
      store_line(args, i * line * height, h, height, width, planes.data(), pixels.data(), stream);
    }
  }
  stream_fence();
}

bool all_inside(const Gather& args) {
  for (int64_t i = 0; i < args.batch; ++i) {
    if (args.indices[i] < 0 || args.indices[i] >= args.rows) return false;
  }
  return true;
}

}  // namespace

bool gather(const Gather& args, int threads) {
  if (!all_inside(args)) return false;
  const int64_t row = std::max<int64_t>(args.channels * args.height * args.width, 1);
  expect_large(args.out, args.batch * row * size_of(args.dtype));
  const bool rgb = args.channels_last && args.channels == 3;
  parallel_for(args.batch, 32768 / row, threads, args, rgb ? gather_rgb : gather_rows);
  return true;
}

bool crop(const Crop& args, int threads) {
  if (!all_inside(args.rows)) return false;
  const int64_t row = std::max<int64_t>(args.rows.channels * args.out_height * args.out_width, 1);
  expect_large(args.rows.out, args.rows.batch * row * size_of(args.rows.dtype));
  parallel_for(args.rows.batch, 16384 / row, threads, args, crop_rows);
  return true;
}

}  // namespace dpfast
