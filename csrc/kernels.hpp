// The kernels' arguments: addresses and sizes that the Python side has checked.
#pragma once

#include <cstdint>

#include "memory.hpp"
#include "simd.hpp"

namespace dpfast {

struct Entropy {
  const void* logits;
  int64_t rows, classes, row_stride;  // the stride counts elements
  DType dtype;
  float inverse_temperature;
  float* entropy;
  void* gradient;  // null: value only; else contiguous rows in the logits' dtype
};
void entropy(const Entropy& args, int threads);

struct Noise {
  const int64_t* ids;
  int64_t samples, elements;
  uint64_t seed;
  uint32_t stream;
  float* normals;
  uint32_t* words;  // null, or the words themselves instead of normals: samples x (elements rounded up to 4)
};
void noise(const Noise& args, int threads);

enum class Prediction : int { kEpsilon = 0, kV = 1, kSample = 2, kFlow = 3 };

struct GuidedStep {
  int64_t samples, elements;
  DType dtype;
  const void *x, *pred_cond, *pred_uncond, *grad, *x0_prev;  // null where the caller passed None
  void *out, *x0_out;
  const float* row;  // alpha, sigma, a, b, c, d
  const float *cfg_scale, *omega, *anchor;
  int64_t cfg_stride, omega_stride, anchor_stride;  // 0 for a scalar, 1 for one value a sample
  bool relative;
  Prediction prediction;
  float clip;                         // infinite for none
  double threshold_ratio;             // negative for no dynamic threshold
  float threshold_maximum;
  const int64_t* ids;
  uint64_t seed;
  uint32_t stream;
  int64_t* skipped;
};
void guided_step(const GuidedStep& args, int threads);

struct Gather {
  const uint8_t* const* chunks;  // of `chunk_rows` rows each; a contiguous store is one chunk
  int64_t chunk_rows, rows, row_stride;
  int64_t channels, height, width;
  const int64_t* indices;
  int64_t batch;
  const uint8_t* flip;  // null for none
  const float *scale, *bias;
  DType dtype;
  bool channels_last;
  void* out;
};
bool gather(const Gather& args, int threads);  // false, and nothing written, when an index is outside the store

struct Crop {
  Gather rows;                    // the whole images; `out` takes the crops
  const float* boxes;             // batch x (top, left, height, width), in pixels; a box may reach beyond the image
  int64_t out_height, out_width;  // of every crop
};
bool crop(const Crop& args, int threads);  // false as gather

struct Rows {
  const uint8_t* const* chunks;
  int64_t chunk_rows, total, stride, width;  // row i starts (i mod chunk_rows) * stride bytes into its chunk
  const int64_t* indices;
  int64_t count;
  uint8_t* out;  // count x width bytes
};
bool rows(const Rows& args, int threads);  // false, and nothing written, when an index is outside [0, total)

struct Permutation {
  int64_t first, count, size;  // the places `first` to `first + count` of a permutation of [0, size)
  uint64_t seed, epoch;
  uint32_t stream;
  int64_t* out;
};
void permutation(const Permutation& args, int threads);

}  // namespace dpfast
