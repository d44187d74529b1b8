// With d = (z - max z) / (T ln 2), e = 2^d, S = sum e and W = sum d e: H = log S - ln 2 W / S and
// dH/dz = -(ln 2 / (T S)) e (d - W / S). Both terms of H are non-negative, so nothing cancels, and each logit needs one
// exponential.
#include <cmath>
#include <vector>

#include "kernels.hpp"
#include "parallel.hpp"

namespace dpfast {
namespace {

constexpr int kVectors = 4;                     // of a row that are worked on together, to hide each other's latency
constexpr int64_t kBlock = kVectors * kLanes;
constexpr int64_t kFold = 32;                   // so many terms are summed in fp32, the partial sums in fp64
constexpr int64_t kSmall = 32;                  // up to here, 16 rows side by side fill a vector better than one row does
constexpr float kFloor = -127.0f;               // 2^-127 comes out as zero
constexpr int64_t kBytesPerPiece = int64_t{256} << 10;
constexpr double kLn2 = 0.693147180559945309;

DPFAST_INLINE Floats scaled(Floats logits, Floats top, float scale) { return at_least((logits - top) * scale, kFloor); }

struct Row {
  float entropy, mean, factor;  // gradient = factor e (d - mean)
};

// One row of whole blocks, of which `tail` is the last. Writes e and d, and fetches `next`, the row to come: the
// arithmetic of this one hides the way of that one from memory.
DPFAST_INLINE Row one_row(const float* z, const float* tail, const float* next, int64_t blocks, float inverse_temperature,
                          float* e, float* d) {
  Floats tops[kVectors];
  for (int i = 0; i < kVectors; ++i) tops[i] = load(tail + i * kLanes);
  for (int64_t block = 0; block + 1 < blocks; ++block) {
    for (int i = 0; i < kVectors; ++i) tops[i] = larger(tops[i], load(z + block * kBlock + i * kLanes));
  }
  const Floats top = Floats{} + largest(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])));
  const float scale = static_cast<float>(inverse_temperature / kLn2);
  double total = 0.0, weighted = 0.0;
  for (int64_t first = 0; first < blocks; first += kFold) {
    const int64_t last = std::min(first + kFold, blocks);
    Floats sums[kVectors] = {}, products[kVectors] = {};
    for (int64_t block = first; block < last; ++block) {
      const int64_t at = block * kBlock;
      const float* from = block + 1 < blocks ? z + at : tail;
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        const int64_t k = i * kLanes;
        __builtin_prefetch(next + at + k);
        const Floats exponent = scaled(load(from + k), top, scale);
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

// kLanes rows side by side: z and work are [classes][kLanes].
DPFAST_INLINE void many_rows(const float* z, int64_t classes, float inverse_temperature, float* entropy, float* work) {
  const float scale = static_cast<float>(inverse_temperature / kLn2);
  Floats top = load(z), total{}, mean{};
  for (int64_t k = 1; k < classes; ++k) top = larger(top, load(z + k * kLanes));
  for (int64_t k = 0; k < classes; ++k) {
    const Floats d = scaled(load(z + k * kLanes), top, scale);
    const Floats e = exp2_nonpositive(d);
    store(work + k * kLanes, e);
    total += e;
    mean += e * d;
  }
  mean /= total;
  const Floats factor = static_cast<float>(-inverse_temperature) / total;
  for (int r = 0; r < kLanes; ++r) {
    // 1 <= total <= kSmall; a NaN passes through the bits of log_positive, so the mean adds it back.
    entropy[r] = log_positive(total[r]) - static_cast<float>(kLn2) * mean[r];
  }
  for (int64_t k = 0; k < classes; ++k) {
    const Floats d = scaled(load(z + k * kLanes), top, scale) - mean;
    store(work + k * kLanes, static_cast<float>(kLn2) * (d * factor) * load(work + k * kLanes));
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
  const bool stream = args.rows * args.classes * size_of(args.dtype) > kStreamBytes;
  const int64_t blocks = (args.classes + kBlock - 1) / kBlock, whole = (blocks - 1) * kBlock;
  std::vector<float> buffers(static_cast<size_t>(3 * blocks * kBlock));
  float *e = buffers.data(), *d = e + blocks * kBlock, *converted = d + blocks * kBlock;
  alignas(64) float tail[kBlock];
  for (float& logit : tail) logit = -std::numeric_limits<float>::infinity();
  for (int64_t r = begin; r < end; ++r) {
    const float* z = as_floats(args.logits, args.dtype, r * args.row_stride, args.classes, converted);
    std::memcpy(tail, z + whole, static_cast<size_t>(args.classes - whole) * sizeof(float));
    const float* next = args.dtype == DType::kFloat32 && r + 1 < end ? z + args.row_stride : z;
    const Row row = one_row(z, tail, next, blocks, args.inverse_temperature, e, d);
    args.entropy[r] = row.entropy;
    if (args.gradient == nullptr) continue;
    for (int64_t k = 0; k < blocks * kBlock; k += kLanes) store(e + k, load(e + k) * ((load(d + k) - row.mean) * row.factor));
    store_floats(args.gradient, args.dtype, r * args.classes, args.classes, e, stream);
  }
  stream_fence();
}

}  // namespace

void entropy(const Entropy& args, int threads) {
  const int64_t row_bytes = args.classes * size_of(args.dtype);
  expect_large(args.gradient, args.rows * row_bytes);
  const int64_t grain = std::max<int64_t>(kBytesPerPiece / row_bytes / kLanes * kLanes, kLanes);
  parallel_for(args.rows, args.classes > kSmall ? std::max<int64_t>(kBytesPerPiece / row_bytes, 1) : grain, threads, args,
               entropy_rows);
}

}  // namespace dpfast
