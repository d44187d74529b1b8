// Without a clip, x_next is a linear combination of the inputs whose factors are constant over a sample. With one, so are
// x0 and eps: the same combination with other factors, then the clip between them.
#include <atomic>
#include <cmath>
#include <vector>

#include "kernels.hpp"
#include "parallel.hpp"
#include "philox.hpp"

namespace dpfast {
namespace {

constexpr int64_t kBlock = kNoiseBlock;
constexpr float kNormFloor = 1e-8f;
constexpr double kShortest = 1.0 / 32.0;  // SHORTEST, SMALLEST and STRONGEST in reference.py
constexpr double kSmallest = 1.1754943508222875e-38;
constexpr double kStrongest = 1099511627776.0;  // 2^40

struct Factors {
  double x, pred, grad, label;  // the last: of pred_cond - pred_uncond, beside its part in pred
};

// Of the difference of the predictions.
struct LabelSums {
  double squares, along;  // along the gradient
};

struct Buffers {
  alignas(64) float x[kBlock], pred_cond[kBlock], pred_uncond[kBlock], grad[kBlock], other[kBlock], y[kBlock], x0[kBlock];
};

struct Block {
  const float *x, *pred_cond, *pred_uncond, *grad;
  int64_t count;
};

DPFAST_INLINE float reciprocal(float value) { return value == 0.0f ? 0.0f : 1.0f / value; }

// Partial sums of a block in fp32, blocks in fp64.
DPFAST_INLINE double sum_of_squares(const void* values, DType dtype, int64_t first, int64_t elements, float* buffer) {
  double total = 0.0;
  for (int64_t at = 0; at < elements; at += kBlock) {
    const int64_t count = std::min(kBlock, elements - at);
    const float* v = as_floats(values, dtype, first + at, count, buffer);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += v[i] * v[i];
    total += static_cast<double>(sum);
  }
  return total;
}

DPFAST_INLINE Block load(const GuidedStep& args, const void* grad, int64_t first, int64_t count, Buffers& buffers) {
  Block in{};
  in.count = count;
  in.x = as_floats(args.x, args.dtype, first, count, buffers.x);
  in.pred_cond = as_floats(args.pred_cond, args.dtype, first, count, buffers.pred_cond);
  if (args.pred_uncond != nullptr) in.pred_uncond = as_floats(args.pred_uncond, args.dtype, first, count, buffers.pred_uncond);
  if (grad != nullptr) in.grad = as_floats(grad, args.dtype, first, count, buffers.grad);
  return in;
}

DPFAST_INLINE LabelSums label_sums(const GuidedStep& args, int64_t first, Buffers& buffers) {
  LabelSums total{};
  for (int64_t at = 0; at < args.elements; at += kBlock) {
    const Block in = load(args, args.grad, first + at, std::min(kBlock, args.elements - at), buffers);
    const float *pc = in.pred_cond, *pu = in.pred_uncond, *g = in.grad;
    float squares = 0.0f, along = 0.0f;
#pragma omp simd reduction(+ : squares, along)
    for (int64_t i = 0; i < in.count; ++i) {
      const float difference = pc[i] - pu[i];
      squares += difference * difference;
      along += difference * g[i];
    }
    total.squares += static_cast<double>(squares);
    total.along += static_cast<double>(along);
  }
  return total;
}

DPFAST_INLINE void combine(const Block& in, float cfg_scale, const Factors& by, bool anchored, float* y) {
  const float fx = static_cast<float>(by.x), fp = static_cast<float>(by.pred), fg = static_cast<float>(by.grad);
  const float *x = in.x, *pc = in.pred_cond, *pu = in.pred_uncond, *g = in.grad;
  if (anchored) {
    const float fd = static_cast<float>(by.pred * static_cast<double>(cfg_scale) + by.label);
#pragma omp simd
    for (int64_t i = 0; i < in.count; ++i) y[i] = fx * x[i] + fp * pu[i] + fd * (pc[i] - pu[i]) + fg * g[i];
  } else if (pu != nullptr && g != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < in.count; ++i) y[i] = fx * x[i] + fp * (pu[i] + cfg_scale * (pc[i] - pu[i])) + fg * g[i];
  } else if (pu != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < in.count; ++i) y[i] = fx * x[i] + fp * (pu[i] + cfg_scale * (pc[i] - pu[i]));
  } else if (g != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < in.count; ++i) y[i] = fx * x[i] + fp * pc[i] + fg * g[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < in.count; ++i) y[i] = fx * x[i] + fp * pc[i];
  }
}

// The quantile between its two neighbours, as a selection instead of a sort. Reorders `values`; NaN gives NaN.
float quantile(std::vector<float>& values, double ratio) {
  for (const float value : values) {
    if (std::isnan(value)) return value;
  }
  const double position = ratio * static_cast<double>(values.size() - 1);
  const auto below = values.begin() + static_cast<int64_t>(position);
  std::nth_element(values.begin(), below, values.end());
  if (below + 1 == values.end()) return *below;
  const float above = *std::min_element(below + 1, values.end());
  return *below + static_cast<float>(position - std::floor(position)) * (above - *below);
}

DPFAST_INLINE void fetch(const void* values, DType dtype, int64_t first, int64_t count) {
  constexpr int64_t kCacheLine = 64;
  const char* from = static_cast<const char*>(values) + first * size_of(dtype);
  for (int64_t byte = 0; byte < count * size_of(dtype); byte += kCacheLine) __builtin_prefetch(from + byte, 0, 2);
}

DPFAST_INLINE void one_sample(const GuidedStep& args, int64_t sample, Buffers& buffers, std::vector<float>& scratch, bool stream,
                              bool fetch_next) {
  const float alpha = args.row[0], sigma = args.row[1], a = args.row[2], b = args.row[3], c = args.row[4], d = args.row[5];
  const int64_t base = sample * args.elements;
  const float cfg_scale = args.cfg_scale[sample * args.cfg_stride], omega = args.omega[sample * args.omega_stride];

  Factors x0{}, eps{};
  switch (args.prediction) {
    case Prediction::kEpsilon: x0 = {reciprocal(alpha), -sigma * reciprocal(alpha), 0, 0}, eps = {0, 1, 0, 0}; break;
    case Prediction::kV: x0 = {alpha, -sigma, 0, 0}, eps = {sigma, alpha, 0, 0}; break;
    case Prediction::kSample: x0 = {0, 1, 0, 0}, eps = {reciprocal(sigma), -alpha * reciprocal(sigma), 0, 0}; break;
    case Prediction::kFlow: x0 = {1, -sigma, 0, 0}, eps = {1, alpha, 0, 0}; break;
  }
  const void* grad = args.grad;
  double kappa = args.anchor[sample * args.anchor_stride];
  if (args.relative && kappa > kStrongest) kappa = kStrongest;
  bool anchored = false;
  const bool asked = kappa != 0.0 && grad != nullptr && args.pred_uncond != nullptr;
  if (grad != nullptr) {
    const double squares = sum_of_squares(grad, args.dtype, base, args.elements, buffers.grad);
    const LabelSums label = asked ? label_sums(args, base, buffers) : LabelSums{};
    anchored = label.squares >= kSmallest && squares >= kSmallest;
    double share = 0.0, length = 1.0;  // |g| d = g + share (pred_cond - pred_uncond), and |d|
    if (anchored) {
      const double toward = (args.prediction == Prediction::kSample ? 1.0 : -1.0) / std::sqrt(label.squares);
      const double cosine = std::min(std::max(label.along * toward / std::sqrt(squares), -1.0), 1.0);
      length = std::max(std::sqrt((1.0 - kappa) * (1.0 - kappa) + 2.0 * kappa * (1.0 + cosine)), kShortest);
      share = kappa * std::sqrt(squares) * toward;
    }
    if (!std::isfinite(static_cast<float>(squares)) || !std::isfinite(static_cast<float>(label.squares))) {
      grad = nullptr, anchored = false;
      if (args.skipped != nullptr) __atomic_fetch_add(args.skipped, int64_t{1}, __ATOMIC_RELAXED);
    } else if (args.relative) {
      const double norm = std::sqrt(sum_of_squares(args.x, args.dtype, base, args.elements, buffers.x));
      const double grad_scale = omega * norm / (std::sqrt(squares) + kNormFloor) / length;
      x0.grad = x0.x * grad_scale, eps.grad = eps.x * grad_scale;
    } else {
      const double grad_scale = static_cast<double>(omega) * sigma;
      x0.grad = sigma * reciprocal(alpha) * grad_scale, eps.grad = -grad_scale;
    }
    if (anchored) x0.label = x0.grad * share, eps.label = eps.grad * share;
  }

  float bound = args.clip, divisor = 1.0f;
  if (args.threshold_ratio >= 0) {
    scratch.resize(static_cast<size_t>(args.elements));
    for (int64_t at = 0; at < args.elements; at += kBlock) {
      const Block in = load(args, grad, base + at, std::min(kBlock, args.elements - at), buffers);
      combine(in, cfg_scale, x0, anchored, buffers.x0);
      for (int64_t i = 0; i < in.count; ++i) scratch[static_cast<size_t>(at + i)] = std::fabs(buffers.x0[i]);
    }
    bound = quantile(scratch, args.threshold_ratio);
    bound = bound < 1.0f ? 1.0f : bound;
    bound = bound > args.threshold_maximum ? args.threshold_maximum : bound;
    divisor = bound;
  }
  const bool clipped = args.threshold_ratio >= 0 || std::isfinite(bound);
  const Factors next{a * x0.x + b * eps.x, a * x0.pred + b * eps.pred, a * x0.grad + b * eps.grad,
                     a * x0.label + b * eps.label};
  const float inverse = 1.0f / divisor;

  for (int64_t at = 0; at < args.elements; at += kBlock) {
    const Block in = load(args, grad, base + at, std::min(kBlock, args.elements - at), buffers);
    float *y = buffers.y, *z = buffers.x0;
    if (fetch_next) {
      const int64_t next = base + args.elements + at;
      fetch(args.x, args.dtype, next, in.count);
      fetch(args.grad, args.dtype, next, in.count);
      if (asked) {
        fetch(args.pred_cond, args.dtype, next, in.count);
        fetch(args.pred_uncond, args.dtype, next, in.count);
      }
    }
    if (clipped || args.x0_out != nullptr) combine(in, cfg_scale, x0, anchored, z);
    if (clipped) {
      combine(in, cfg_scale, eps, anchored, y);
#pragma omp simd
      for (int64_t i = 0; i < in.count; ++i) {
        float v = z[i];
        v = v > bound ? bound : v;
        v = v < -bound ? -bound : v;
        z[i] = v * inverse;
        y[i] = a * z[i] + b * y[i];
      }
    } else {
      combine(in, cfg_scale, next, anchored, y);
    }
    if (args.x0_prev != nullptr) {
      const float* previous = as_floats(args.x0_prev, args.dtype, base + at, in.count, buffers.other);
#pragma omp simd
      for (int64_t i = 0; i < in.count; ++i) y[i] += c * previous[i];
    }
    if (args.ids != nullptr) {
      normal_block(static_cast<uint64_t>(args.ids[sample]), static_cast<uint32_t>(at / 4), args.seed, args.stream, buffers.other);
#pragma omp simd
      for (int64_t i = 0; i < in.count; ++i) y[i] += d * buffers.other[i];
    }
    store_floats(args.out, args.dtype, base + at, in.count, y, stream);
    if (args.x0_out != nullptr) store_floats(args.x0_out, args.dtype, base + at, in.count, z, stream);
  }
}

DPFAST_CLONES void guided_samples(const GuidedStep& args, int64_t begin, int64_t end) {
  Buffers buffers;
  std::vector<float> scratch;
  const bool stream = args.samples * args.elements * size_of(args.dtype) > kStreamBytes;
  // The norms of a sample need all of it before the first result: fetched while the sample before is written. With noise
  // the arithmetic is the limit, and fetching only disturbs it.
  const bool fetches = args.grad != nullptr && args.ids == nullptr;
  for (int64_t sample = begin; sample < end; ++sample) {
    one_sample(args, sample, buffers, scratch, stream, fetches && sample + 1 < end);
  }
  stream_fence();
}

}  // namespace

void guided_step(const GuidedStep& args, int threads) {
  const int64_t bytes = args.samples * args.elements * size_of(args.dtype);
  expect_large(args.out, bytes);
  expect_large(args.x0_out, bytes);
  const int64_t grain = 8 * kBlock / std::max<int64_t>(args.elements, 1);
  parallel_for(args.samples, grain, threads, args, guided_samples);
}

}  // namespace dpfast
