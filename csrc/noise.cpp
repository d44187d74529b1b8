#include "kernels.hpp"
#include "parallel.hpp"
#include "philox.hpp"

namespace dpfast {
namespace {

DPFAST_CLONES void noise_samples(const Noise& args, int64_t begin, int64_t end) {
  alignas(64) float normals[kNoiseBlock];
  Words words;
  const int64_t padded = (args.elements + 3) / 4 * 4;
  const bool stream = args.samples * args.elements * int64_t{sizeof(float)} > kStreamBytes;
  for (int64_t sample = begin; sample < end; ++sample) {
    const uint64_t id = static_cast<uint64_t>(args.ids[sample]);
    for (int64_t first = 0; first < args.elements; first += kNoiseBlock) {
      const uint32_t block = static_cast<uint32_t>(first / 4);
      if (args.words != nullptr) {
        const int64_t count = std::min(kNoiseBlock, padded - first);
        philox_block(id, block, args.seed, args.stream, words);
        for (int64_t i = 0; i < count; ++i) args.words[sample * padded + first + i] = words.w[i % 4][i / 4];
      } else {
        const int64_t count = std::min(kNoiseBlock, args.elements - first);
        normal_block(id, block, args.seed, args.stream, normals);
        store_floats(args.normals, DType::kFloat32, sample * args.elements + first, count, normals, stream);
      }
    }
  }
  stream_fence();
}

}  // namespace

void noise(const Noise& args, int threads) {
  expect_large(args.normals, args.samples * args.elements * int64_t{sizeof(float)});
  const int64_t grain = 8 * kNoiseBlock / std::max<int64_t>(args.elements, 1);
  parallel_for(args.samples, grain, threads, args, noise_samples);
}

}  // namespace dpfast
