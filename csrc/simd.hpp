// Arithmetic that the compiler vectorises: each function is one lane, written without branches or library calls.
//
// A kernel is compiled for AVX-512, AVX2 and the baseline; the loader picks one when the module is loaded. One whose loops
// vectorise by themselves is marked DPFAST_CLONES. Others are templates on `Floats`, the vector type of GCC and Clang with
// the width of each level's registers, and DPFAST_LEVELS makes the three. The polynomials are least-squares fits with
// Lawson weights, which makes them close to minimax.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#define DPFAST_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && !defined(DPFAST_PORTABLE)
#define DPFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define DPFAST_LEVEL(target_, Floats, name, kernel, Args) \
  __attribute__((target(target_))) void name(const Args& args, int64_t begin, int64_t end) { kernel<Floats>(args, begin, end); }
#define DPFAST_LEVELS(name, kernel, Args)                         \
  DPFAST_LEVEL("default", Floats4, name, kernel, Args)            \
  DPFAST_LEVEL("arch=x86-64-v3", Floats8, name, kernel, Args)     \
  DPFAST_LEVEL("arch=x86-64-v4", Floats16, name, kernel, Args)
#else
#define DPFAST_CLONES
#if defined(__AVX512F__)
#define DPFAST_FLOATS Floats16
#elif defined(__AVX__)
#define DPFAST_FLOATS Floats8
#else
#define DPFAST_FLOATS Floats4
#endif
#define DPFAST_LEVELS(name, kernel, Args) \
  void name(const Args& args, int64_t begin, int64_t end) { kernel<DPFAST_FLOATS>(args, begin, end); }
#endif

namespace dpfast {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

DPFAST_INLINE int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

template <class To, class From>
DPFAST_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// log(u) for normal positive u; relative error 1e-7, also next to u = 1.
DPFAST_INLINE float log_positive(float u) {
  const uint32_t bits = bit_cast<uint32_t>(u);
  const uint32_t above = bits - 0x3f3504f3u;  // the bits of sqrt(1/2): the mantissa lands in [sqrt(1/2), sqrt(2))
  const int32_t exponent = static_cast<int32_t>(above) >> 23;
  const float f = bit_cast<float>(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  float p = -0.0763449743390f;
  p = p * f + 0.1276158243418f;
  p = p * f - 0.1316018402576f;
  p = p * f + 0.1420175731182f;
  p = p * f - 0.1662335693836f;
  p = p * f + 0.2000122666359f;
  p = p * f - 0.2500081956387f;
  p = p * f + 0.3333333134651f;
  const float square = f * f;
  return (f + (p * (f * square) - 0.5f * square)) + static_cast<float>(exponent) * 0.693147180559945f;
}

// cos and sin of the angle 2 pi word / 2^32; absolute error 1e-7, relative next to the zeros.
DPFAST_INLINE void cos_sin_of_word(uint32_t word, float& cosine, float& sine) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const int32_t rest = static_cast<int32_t>(word - (quarter << 30));
  const float t = static_cast<float>(rest) * 1.46291807926716e-9f;  // (pi / 2) / 2^30
  const float square = t * t;
  float s = -0.000195152824745f;
  s = s * square + 0.008332160301507f;
  s = s * square - 0.166666552424431f;
  s = s * (square * t) + t;
  float c = 0.000024433195567f;
  c = c * square - 0.001388731645420f;
  c = c * square + 0.041666645556688f;
  c = c * (square * square) - 0.5f * square + 1.0f;
  const uint32_t odd = 0u - (quarter & 1u);
  const uint32_t s_bits = bit_cast<uint32_t>(s), c_bits = bit_cast<uint32_t>(c);
  const uint32_t cosine_sign = ((quarter + 1u) & 2u) << 30, sine_sign = (quarter & 2u) << 30;
  cosine = bit_cast<float>(((s_bits & odd) | (c_bits & ~odd)) ^ cosine_sign);
  sine = bit_cast<float>(((c_bits & odd) | (s_bits & ~odd)) ^ sine_sign);
}

DPFAST_INLINE float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  // Scaling by 2^112 rebiases the exponent and makes subnormal halves normal.
  uint32_t bits = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  bits |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(bits | static_cast<uint32_t>(half & 0x8000u) << 16);
}

DPFAST_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 1/2 leaves a subnormal half, rounded to nearest even, in the low bits.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

DPFAST_INLINE float bfloat_to_float(uint16_t value) { return bit_cast<float>(static_cast<uint32_t>(value) << 16); }

DPFAST_INLINE uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Wider vectors than the registers are taken apart lane by lane where they are compared: on AVX2, 16 lanes took nine times
// as long as 8.
typedef float Floats4 __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats16 __attribute__((vector_size(64)));
template <class Floats>
constexpr int kLanes = sizeof(Floats) / sizeof(float);

template <class Floats>
DPFAST_INLINE Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <class Floats>
DPFAST_INLINE void store(float* to, Floats value) {
  std::memcpy(to, &value, sizeof(value));
}

// Comparisons, not library maxima: a NaN in `value` compares false, so the first leaves it and the second skips it.
template <class Floats>
DPFAST_INLINE Floats at_least(Floats value, float floor) {
  return value < floor ? Floats{} + floor : value;
}
template <class Floats>
DPFAST_INLINE Floats larger(Floats value, Floats other) {
  return value < other ? other : value;
}

template <class Floats>
DPFAST_INLINE float largest(Floats value) {
  float top = value[0];
  for (int i = 1; i < kLanes<Floats>; ++i) top = top < value[i] ? value[i] : top;
  return top;
}

template <class Floats>
DPFAST_INLINE double sum(Floats value) {
  double total = 0.0;
  for (int i = 0; i < kLanes<Floats>; ++i) total += static_cast<double>(value[i]);
  return total;
}

// 2^x for x in [-127, 0]; relative error 2e-7, and 2^-127 comes out as exactly 0. NaN stays NaN.
template <class Floats>
DPFAST_INLINE Floats exp2_nonpositive(Floats x) {
  using Ints = decltype(x < x);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats shifted = x + kRound;
  const Floats f = x - (shifted - kRound);
  Floats p = 0.0013264727312f * f + 0.0096715129912f;
  p = p * f + 0.0555073358119f;
  p = p * f + 0.2402224242687f;
  p = p * f + 0.6931470036507f;
  p = p * f + 1.0f;
  return (Floats)((Ints)p + ((Ints)shifted << 23));
}

// `count` elements from `first` on as floats: the source itself when it is fp32, else `buffer`.
DPFAST_INLINE const float* as_floats(const void* source, DType dtype, int64_t first, int64_t count, float* buffer) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(source) + first;
  const uint16_t* words = static_cast<const uint16_t*>(source) + first;
  if (dtype == DType::kFloat16) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = half_to_float(words[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = bfloat_to_float(words[i]);
  }
  return buffer;
}

}  // namespace dpfast
