// Philox4x32-10 and Box-Muller over blocks of elements (Salmon et al., SC 2011).
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.hpp"

namespace dpfast {

constexpr int64_t kNoiseBlock = 1024;  // elements; a quarter of it counters, and the buffers stay in the first-level cache

struct Words {
  alignas(64) uint32_t w[4][kNoiseBlock / 4];
};

// The words of the counters (id, block + i, seed's high word), i < kNoiseBlock / 4.
DPFAST_INLINE void philox_block(uint64_t id, uint32_t block, uint64_t seed, uint32_t stream, Words& words) {
  const uint32_t id_low = static_cast<uint32_t>(id), id_high = static_cast<uint32_t>(id >> 32);
  const uint32_t seed_low = static_cast<uint32_t>(seed), seed_high = static_cast<uint32_t>(seed >> 32);
#pragma omp simd
  for (int i = 0; i < kNoiseBlock / 4; ++i) {
    uint32_t c0 = id_low, c1 = id_high, c2 = block + static_cast<uint32_t>(i), c3 = seed_high;
    uint32_t k0 = seed_low, k1 = stream;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t low = static_cast<uint64_t>(c0) * 0xD2511F53u, high = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(high >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(high);
      c2 = static_cast<uint32_t>(low >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(low);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words.w[0][i] = c0;
    words.w[1][i] = c1;
    words.w[2][i] = c2;
    words.w[3][i] = c3;
  }
}

// kNoiseBlock normals of one sample, from element 4 * block on.
DPFAST_INLINE void normal_block(uint64_t id, uint32_t block, uint64_t seed, uint32_t stream, float* normals) {
  Words words;
  alignas(64) float z[4][kNoiseBlock / 4];
  philox_block(id, block, seed, stream, words);
  for (int pair = 0; pair < 4; pair += 2) {
#pragma omp simd
    for (int i = 0; i < kNoiseBlock / 4; ++i) {
      // Both halves convert exactly, so the sum rounds once, as a conversion of the whole word would.
      const uint32_t word = words.w[pair][i];
      const float whole = static_cast<float>(static_cast<int32_t>(word >> 16)) * 65536.0f +
                          static_cast<float>(static_cast<int32_t>(word & 0xffffu));
      const float u = whole * 0x1p-32f + 0x1p-33f;
      // The last word's u rounds to 1 and its logarithm to 0, never above.
      const float radius = std::sqrt(-2.0f * log_positive(u));
      float cosine, sine;
      cos_sin_of_word(words.w[pair + 1][i], cosine, sine);
      z[pair][i] = radius * cosine;
      z[pair + 1][i] = radius * sine;
    }
  }
  for (int i = 0; i < kNoiseBlock / 4; ++i) {
    for (int lane = 0; lane < 4; ++lane) normals[4 * i + lane] = z[lane][i];
  }
}

}  // namespace dpfast
