#include <algorithm>

#include "kernels.hpp"
#include "parallel.hpp"
#include "philox.hpp"

namespace dpfast {
namespace {

constexpr int kRounds = 8;
constexpr int64_t kBlock = 256;

struct Keyed {
  const Permutation& args;
  uint32_t keys[kRounds];
  int left, right;  // bits of the two halves
};

// The finaliser of MurmurHash3: every bit of the input reaches every bit of the output.
DPFAST_INLINE uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ x >> 16;
}

// One pass of the network: each round changes one half by a keyed function of the other, so it can be undone.
DPFAST_INLINE uint64_t network(uint64_t value, const Keyed& keyed) {
  const uint32_t left_mask = static_cast<uint32_t>((uint64_t{1} << keyed.left) - 1);
  const uint32_t right_mask = static_cast<uint32_t>((uint64_t{1} << keyed.right) - 1);
  uint32_t left = static_cast<uint32_t>(value >> keyed.right), right = static_cast<uint32_t>(value) & right_mask;
#pragma GCC unroll 8
  for (int round = 0; round < kRounds; round += 2) {
    left ^= mix(right ^ keyed.keys[round]) & left_mask;
    right ^= mix(left ^ keyed.keys[round + 1]) & right_mask;
  }
  return static_cast<uint64_t>(left) << keyed.right | right;
}

DPFAST_CLONES void permute(const Keyed& keyed, int64_t begin, int64_t end) {
  const uint64_t size = static_cast<uint64_t>(keyed.args.size);
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t count = std::min(kBlock, end - first);
    uint64_t values[kBlock];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] = network(static_cast<uint64_t>(keyed.args.first + first + i), keyed);
    for (int64_t i = 0; i < count; ++i) {
      while (values[i] >= size) values[i] = network(values[i], keyed);
      keyed.args.out[first + i] = static_cast<int64_t>(values[i]);
    }
  }
}

}  // namespace

void permutation(const Permutation& args, int threads) {
  expect_large(args.out, args.count * int64_t{sizeof(int64_t)});
  Words words;
  philox_block(args.epoch, 0, args.seed, args.stream, words);
  int bits = 6;  // below, eight rounds do not reach all orders equally often
  while (bits < 62 && (int64_t{1} << bits) < args.size) ++bits;
  Keyed keyed{args, {}, bits / 2, bits - bits / 2};
  for (int round = 0; round < kRounds; ++round) keyed.keys[round] = words.w[round % 4][round / 4];
  parallel_for(args.count, 16 * kBlock, threads, keyed, permute);
}

}  // namespace dpfast
