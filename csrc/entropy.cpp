// With d = (z - max z) / (T ln 2), e = 2^d, S = sum e and W = sum d e: H = log S - ln 2 W / S and
// dH/dz = -(ln 2 / (T S)) e (d - W / S). Both terms of H are non-negative, so nothing cancels, and each logit needs one
// exponential.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.hpp"
#include "parallel.hpp"

namespace dpfast {
namespace {

constexpr int kVectors = 4;       // of a row that are worked on together, to hide each other's latency
constexpr int64_t kFold = 32;     // so many terms are summed in fp32, the partial sums in fp64
constexpr int64_t kSmall = 32;    // up to here, rows side by side fill a vector better than one row does
constexpr float kFloor = -127.0f; // 2^-127 comes out as zero
constexpr int64_t kLine = 16;     // floats of a cache line
constexpr int64_t kBytesPerPiece = int64_t{256} << 10;
constexpr double kLn2 = 0.693147180559945309;

template <class Floats>
DPFAST_INLINE Floats scaled(Floats logits, Floats top, float scale) { return at_least((logits - top) * scale, kFloor); }

struct Row {
  float entropy, mean, factor;  // gradient = factor e (d - mean)
};

// One row of whole blocks, of which `tail` is the last. Writes e and d, and fetches `next`, the row to come: the
// arithmetic of this one hides the way of that one from memory.
template <class Floats>
DPFAST_INLINE Row one_row(const float* z, const float* tail, const float* next, int64_t blocks, float inverse_temperature,
                          float* e, float* d) {
  constexpr int64_t lanes = kLanes<Floats>, size = kVectors * lanes;
  Floats tops[kVectors];
  for (int i = 0; i < kVectors; ++i) tops[i] = load<Floats>(tail + i * lanes);
  for (int64_t block = 0; block + 1 < blocks; ++block) {
    for (int i = 0; i < kVectors; ++i) tops[i] = larger(tops[i], load<Floats>(z + block * size + i * lanes));
  }
  const Floats top = Floats{} + largest(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])));
  const float scale = static_cast<float>(inverse_temperature / kLn2);
  double total = 0.0, weighted = 0.0;
  for (int64_t first = 0; first < blocks; first += kFold) {
    const int64_t last = std::min(first + kFold, blocks);
    Floats sums[kVectors] = {}, products[kVectors] = {};
    for (int64_t block = first; block < last; ++block) {
      const int64_t at = block * size;
      const float* from = block + 1 < blocks ? z + at : tail;
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        const int64_t k = i * lanes;
        if (k % kLine == 0) __builtin_prefetch(next + at + k);
        const Floats exponent = scaled(load<Floats>(from + k), top, scale);
        const Floats power = exp2_nonpositive(exponent);
        store(e + at + k, power);
        store(d + at + k, exponent);
        sums[i] += power;
        products[i] += power * exponent;
      }
    }
    total += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    weighted += sum((products[0] + products[1]) + (products[2] + products[3]));
  }
  return {static_cast<float>(std::log(total) - kLn2 * weighted / total), static_cast<float>(weighted / total),
          static_cast<float>(-kLn2 * inverse_temperature / total)};
}

// (rows, columns) to (columns, rows) in blocks of 4 x 4; the last block of an axis may overlap the one before.
DPFAST_INLINE void transpose(const float* from, int64_t rows, int64_t columns, int64_t from_stride, float* to, int64_t to_stride) {
#if defined(__SSE2__)
  if (rows >= 4 && columns >= 4) {
    for (int64_t row = 0; row < rows; row += 4) {
      for (int64_t column = 0; column < columns; column += 4) {
        const int64_t r = std::min(row, rows - 4), c = std::min(column, columns - 4);
        const float* block = from + r * from_stride + c;
        __m128 a = _mm_loadu_ps(block), b = _mm_loadu_ps(block + from_stride);
        __m128 d = _mm_loadu_ps(block + 2 * from_stride), e = _mm_loadu_ps(block + 3 * from_stride);
        _MM_TRANSPOSE4_PS(a, b, d, e);
        float* target = to + c * to_stride + r;
        _mm_storeu_ps(target, a);
        _mm_storeu_ps(target + to_stride, b);
        _mm_storeu_ps(target + 2 * to_stride, d);
        _mm_storeu_ps(target + 3 * to_stride, e);
      }
    }
    return;
  }
#endif
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

// As many rows side by side as a vector has lanes: z is [classes][lanes], and becomes the gradient.
template <class Floats>
DPFAST_INLINE void many_rows(float* z, int64_t classes, float inverse_temperature, float* entropy) {
  constexpr int lanes = kLanes<Floats>;
  const float scale = static_cast<float>(inverse_temperature / kLn2);
  alignas(64) float powers[kSmall * lanes], totals[lanes], means[lanes];
  Floats top = load<Floats>(z), total{}, mean{};
  for (int64_t k = 1; k < classes; ++k) top = larger(top, load<Floats>(z + k * lanes));
  for (int64_t k = 0; k < classes; ++k) {
    const Floats d = scaled(load<Floats>(z + k * lanes), top, scale);
    const Floats e = exp2_nonpositive(d);
    store(z + k * lanes, d);
    store(powers + k * lanes, e);
    total += e;
    mean += e * d;
  }
  mean /= total;
  const Floats factor = static_cast<float>(-kLn2 * inverse_temperature) / total;
  for (int64_t k = 0; k < classes; ++k) {
    store(z + k * lanes, (load<Floats>(z + k * lanes) - mean) * factor * load<Floats>(powers + k * lanes));
  }
  store(totals, total);
  store(means, mean);
#pragma omp simd
  for (int r = 0; r < lanes; ++r) {
    // 1 <= total <= kSmall; a NaN passes through the bits of log_positive, so the mean adds it back.
    entropy[r] = log_positive(totals[r]) - static_cast<float>(kLn2) * means[r];
  }
}

template <class Floats>
DPFAST_INLINE void small_rows(const Entropy& args, int64_t begin, int64_t end) {
  constexpr int lanes = kLanes<Floats>;
  alignas(64) float rows[kSmall * lanes], z[kSmall * lanes], entropies[lanes];
  const int64_t classes = args.classes;
  for (int64_t first = begin; first < end; first += lanes) {
    const int64_t count = std::min<int64_t>(lanes, end - first);
    const bool direct = args.dtype == DType::kFloat32 && count == lanes;
    if (direct) {
      transpose(static_cast<const float*>(args.logits) + first * args.row_stride, lanes, classes, args.row_stride, z, lanes);
    } else {
      for (int64_t r = 0; r < lanes; ++r) {
        const int64_t at = (first + std::min(r, count - 1)) * args.row_stride;  // the last row again fills the lanes left over
        const float* row = as_floats(args.logits, args.dtype, at, classes, rows + r * classes);
        if (row != rows + r * classes) std::memcpy(rows + r * classes, row, static_cast<size_t>(classes) * sizeof(float));
      }
      transpose(rows, lanes, classes, classes, z, lanes);
    }
    many_rows<Floats>(z, classes, args.inverse_temperature, entropies);
    std::memcpy(args.entropy + first, entropies, static_cast<size_t>(count) * sizeof(float));
    if (args.gradient == nullptr) continue;
    if (direct) {
      transpose(z, classes, lanes, lanes, static_cast<float*>(args.gradient) + first * classes, classes);
    } else {
      transpose(z, classes, lanes, lanes, rows, classes);
      store_floats(args.gradient, args.dtype, first * classes, count * classes, rows, false);
    }
  }
}

template <class Floats>
DPFAST_INLINE void any_rows(const Entropy& args, int64_t begin, int64_t end) {
  if (args.classes <= kSmall) return small_rows<Floats>(args, begin, end);
  constexpr int64_t lanes = kLanes<Floats>, size = kVectors * lanes;
  const bool stream = args.rows * args.classes * size_of(args.dtype) > kStreamBytes;
  const int64_t blocks = (args.classes + size - 1) / size, whole = (blocks - 1) * size;
  std::vector<float> buffers(static_cast<size_t>(3 * blocks * size));
  float *e = buffers.data(), *d = e + blocks * size, *converted = d + blocks * size;
  alignas(64) float tail[size];
  for (float& logit : tail) logit = -std::numeric_limits<float>::infinity();
  for (int64_t r = begin; r < end; ++r) {
    const float* z = as_floats(args.logits, args.dtype, r * args.row_stride, args.classes, converted);
    std::memcpy(tail, z + whole, static_cast<size_t>(args.classes - whole) * sizeof(float));
    const float* next = args.dtype == DType::kFloat32 && r + 1 < end ? z + args.row_stride : z;
    const Row row = one_row<Floats>(z, tail, next, blocks, args.inverse_temperature, e, d);
    args.entropy[r] = row.entropy;
    if (args.gradient == nullptr) continue;
    for (int64_t k = 0; k < blocks * size; k += lanes) {
      store(e + k, load<Floats>(e + k) * ((load<Floats>(d + k) - row.mean) * row.factor));
    }
    store_floats(args.gradient, args.dtype, r * args.classes, args.classes, e, stream);
  }
  stream_fence();
}

DPFAST_LEVELS(entropy_rows, any_rows, Entropy)

}  // namespace

void entropy(const Entropy& args, int threads) {
  const int64_t row_bytes = args.classes * size_of(args.dtype);
  expect_large(args.gradient, args.rows * row_bytes);
  const int64_t grain = std::max<int64_t>(kBytesPerPiece / row_bytes / kSmall * kSmall, kSmall);
  parallel_for(args.rows, args.classes > kSmall ? std::max<int64_t>(kBytesPerPiece / row_bytes, 1) : grain, threads, args,
               entropy_rows);
}

}  // namespace dpfast
