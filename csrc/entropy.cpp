// H = log S - W / S and dH/dz = -(e / S) (d - W / S) / T, with d = (z - max z) / T, e = exp(d), S = sum e, W = sum e d.
// Both terms of H are non-negative, so nothing cancels, and each logit needs one exponential.
#include <cmath>
#include <vector>

#include "kernels.hpp"
#include "parallel.hpp"

namespace dpfast {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kSmall = 32;         // up to here, 16 rows side by side fill the vector better than one row does
constexpr float kFloor = -87.0f;       // e^-87 is the last normal float; below it p counts as zero
constexpr int64_t kPartial = 512;      // so many terms are summed in fp32, the partial sums in fp64
constexpr int64_t kBytesPerPiece = int64_t{256} << 10;

DPFAST_INLINE float scaled(float logit, float top, float inverse_temperature) {
  const float d = (logit - top) * inverse_temperature;
  return d < kFloor ? kFloor : d;  // NaN compares false and stays
}

DPFAST_INLINE float exp_or_zero(float d) {
  const float e = exp_nonpositive(d);
  return d <= kFloor ? 0.0f : e;
}

// One row; `work` receives e, then the gradient where one is wanted.
DPFAST_INLINE void one_row(const float* z, int64_t classes, float inverse_temperature, float* entropy, float* work, bool gradient) {
  float top = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t k = 0; k < classes; ++k) top = top < z[k] ? z[k] : top;
  double total = 0.0, total_weighted = 0.0;
  for (int64_t first = 0; first < classes; first += kPartial) {
    const int64_t last = std::min(first + kPartial, classes);
    float sum = 0.0f, weighted = 0.0f;
#pragma omp simd reduction(+ : sum, weighted)
    for (int64_t k = first; k < last; ++k) {
      const float d = scaled(z[k], top, inverse_temperature);
      const float e = exp_or_zero(d);
      work[k] = e;
      sum += e;
      weighted += e * d;
    }
    total += static_cast<double>(sum);
    total_weighted += static_cast<double>(weighted);
  }
  *entropy = static_cast<float>(std::log(total) - total_weighted / total);
  if (!gradient) return;
  const float mean = static_cast<float>(total_weighted / total);
  const float scale = static_cast<float>(-inverse_temperature / total);
#pragma omp simd
  for (int64_t k = 0; k < classes; ++k) work[k] = work[k] * scale * (scaled(z[k], top, inverse_temperature) - mean);
}

// kLanes rows side by side: z and work are [classes][kLanes].
DPFAST_INLINE void many_rows(const float* z, int64_t classes, float inverse_temperature, float* entropy, float* work) {
  float top[kLanes], sum[kLanes], mean[kLanes], scale[kLanes];
  for (int r = 0; r < kLanes; ++r) top[r] = z[r], sum[r] = 0.0f, mean[r] = 0.0f;
  for (int64_t k = 1; k < classes; ++k) {
    for (int r = 0; r < kLanes; ++r) top[r] = top[r] < z[k * kLanes + r] ? z[k * kLanes + r] : top[r];
  }
  for (int64_t k = 0; k < classes; ++k) {
    for (int r = 0; r < kLanes; ++r) {
      const float d = scaled(z[k * kLanes + r], top[r], inverse_temperature);
      const float e = exp_or_zero(d);
      work[k * kLanes + r] = e;
      sum[r] += e;
      mean[r] += e * d;
    }
  }
  for (int r = 0; r < kLanes; ++r) {
    mean[r] /= sum[r];
    scale[r] = -inverse_temperature / sum[r];
    // 1 <= sum <= kSmall; a NaN passes through the bits of log_positive, so it is added back by the mean.
    entropy[r] = log_positive(sum[r]) - mean[r];
  }
  for (int64_t k = 0; k < classes; ++k) {
    for (int r = 0; r < kLanes; ++r) {
      const float d = scaled(z[k * kLanes + r], top[r], inverse_temperature);
      work[k * kLanes + r] = work[k * kLanes + r] * scale[r] * (d - mean[r]);
    }
  }
}

DPFAST_INLINE void small_rows(const Entropy& args, int64_t begin, int64_t end) {
  alignas(64) float z[kSmall * kLanes], work[kSmall * kLanes];
  float entropies[kLanes], row[kSmall];
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, end - first);
    for (int64_t r = 0; r < kLanes; ++r) {
      const int64_t at = (first + std::min(r, rows - 1)) * args.row_stride;  // the last row again fills the lanes left over
      const float* source = as_floats(args.logits, args.dtype, at, args.classes, row);
      for (int64_t k = 0; k < args.classes; ++k) z[k * kLanes + r] = source[k];
    }
    many_rows(z, args.classes, args.inverse_temperature, entropies, work);
    for (int64_t r = 0; r < rows; ++r) args.entropy[first + r] = entropies[r];
    if (args.gradient == nullptr) continue;
    if (args.dtype == DType::kFloat32) {
      float* target = static_cast<float*>(args.gradient) + first * args.classes;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < args.classes; ++k) target[r * args.classes + k] = work[k * kLanes + r];
      }
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < args.classes; ++k) row[k] = work[k * kLanes + r];
      store_floats(args.gradient, args.dtype, (first + r) * args.classes, args.classes, row, false);
    }
  }
}

DPFAST_CLONES void entropy_rows(const Entropy& args, int64_t begin, int64_t end) {
  if (args.classes <= kSmall) return small_rows(args, begin, end);
  const bool gradient = args.gradient != nullptr;
  const bool stream = args.rows * args.classes * size_of(args.dtype) > kStreamBytes;
  std::vector<float> buffers(static_cast<size_t>(2 * args.classes));
  float *work = buffers.data(), *converted = work + args.classes;
  for (int64_t r = begin; r < end; ++r) {
    const float* z = as_floats(args.logits, args.dtype, r * args.row_stride, args.classes, converted);
    one_row(z, args.classes, args.inverse_temperature, args.entropy + r, work, gradient);
    if (gradient) store_floats(args.gradient, args.dtype, r * args.classes, args.classes, work, stream);
  }
  stream_fence();
}

}  // namespace

void entropy(const Entropy& args, int threads) {
  const int64_t row_bytes = args.classes * size_of(args.dtype);
  const int64_t grain = std::max<int64_t>(kBytesPerPiece / row_bytes / kLanes * kLanes, kLanes);
  parallel_for(args.rows, args.classes > kSmall ? std::max<int64_t>(kBytesPerPiece / row_bytes, 1) : grain, threads, args,
               entropy_rows);
}

}  // namespace dpfast
