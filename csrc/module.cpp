// The Python module: addresses come as integers, checked on the Python side; every kernel runs without the GIL.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "kernels.hpp"
#include "philox.hpp"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A value that the caller has either at hand or in memory; an address of 0 means at hand.
int64_t read(int64_t value, uintptr_t address) { return address == 0 ? value : *at<const int64_t>(address); }

void entropy(uintptr_t logits, int64_t rows, int64_t classes, int64_t row_stride, int dtype, float inverse_temperature,
             uintptr_t entropies, uintptr_t gradient, int threads) {
  dpfast::entropy({at<const void>(logits), rows, classes, row_stride, static_cast<dpfast::DType>(dtype),
                   inverse_temperature, at<float>(entropies), at<void>(gradient)},
                  threads);
}

void noise(uintptr_t ids, int64_t samples, int64_t elements, int64_t seed, uintptr_t seed_at, int64_t stream,
           uintptr_t stream_at, uintptr_t normals, uintptr_t words, int threads) {
  dpfast::noise({at<const int64_t>(ids), samples, elements, static_cast<uint64_t>(read(seed, seed_at)),
                 static_cast<uint32_t>(read(stream, stream_at)), at<float>(normals), at<uint32_t>(words)},
                threads);
}

// One counter and key through the kernels' own code, for the published known answers.
std::tuple<uint32_t, uint32_t, uint32_t, uint32_t> philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                                          uint32_t k0, uint32_t k1) {
  dpfast::Words words;
  dpfast::philox_block(uint64_t{c1} << 32 | c0, c2, uint64_t{c3} << 32 | k0, k1, words);
  return {words.w[0][0], words.w[1][0], words.w[2][0], words.w[3][0]};
}

void guided_step(int64_t samples, int64_t elements, int dtype, uintptr_t x, uintptr_t pred_cond, uintptr_t pred_uncond,
                 uintptr_t grad, uintptr_t x0_prev, uintptr_t out, uintptr_t x0_out, uintptr_t table, int64_t steps,
                 int64_t step, uintptr_t step_at, float cfg_scale, uintptr_t cfg_at, int64_t cfg_stride, float omega,
                 uintptr_t omega_at, int64_t omega_stride, float anchor, uintptr_t anchor_at, int64_t anchor_stride,
                 bool relative, int prediction, float clip, double threshold_ratio, float threshold_maximum,
                 uintptr_t ids, int64_t seed, uintptr_t seed_at, uintptr_t skipped, int threads) {
  constexpr int kColumns = 6;
  float outside[kColumns];
  for (float& value : outside) value = std::nanf("");
  const int64_t row = read(step, step_at);
  dpfast::GuidedStep args{};
  args.samples = samples;
  args.elements = elements;
  args.dtype = static_cast<dpfast::DType>(dtype);
  args.x = at<const void>(x);
  args.pred_cond = at<const void>(pred_cond);
  args.pred_uncond = at<const void>(pred_uncond);
  args.grad = at<const void>(grad);
  args.x0_prev = at<const void>(x0_prev);
  args.out = at<void>(out);
  args.x0_out = at<void>(x0_out);
  args.row = row < 0 || row >= steps ? outside : at<const float>(table) + row * kColumns;
  args.cfg_scale = cfg_at == 0 ? &cfg_scale : at<const float>(cfg_at);
  args.cfg_stride = cfg_stride;
  args.omega = omega_at == 0 ? &omega : at<const float>(omega_at);
  args.omega_stride = omega_stride;
  args.anchor = anchor_at == 0 ? &anchor : at<const float>(anchor_at);
  args.anchor_stride = anchor_stride;
  args.relative = relative;
  args.prediction = static_cast<dpfast::Prediction>(prediction);
  args.clip = clip;
  args.threshold_ratio = threshold_ratio;
  args.threshold_maximum = threshold_maximum;
  args.ids = at<const int64_t>(ids);
  args.seed = static_cast<uint64_t>(read(seed, seed_at));
  args.stream = static_cast<uint32_t>(row + 1);
  args.skipped = at<int64_t>(skipped);
  dpfast::guided_step(args, threads);
}

bool gather_chunks(uintptr_t chunks, int64_t chunk_rows, int64_t rows, int64_t row_stride, int64_t channels,
                   int64_t height, int64_t width, uintptr_t indices, int64_t batch, uintptr_t flip, uintptr_t scale,
                   uintptr_t bias, int dtype, bool channels_last, uintptr_t out, int threads) {
  return dpfast::gather({at<const uint8_t* const>(chunks), chunk_rows, rows, row_stride, channels, height, width,
                         at<const int64_t>(indices), batch, at<const uint8_t>(flip), at<const float>(scale),
                         at<const float>(bias), static_cast<dpfast::DType>(dtype), channels_last, at<void>(out)},
                        threads);
}

bool gather(uintptr_t store, int64_t rows, int64_t row_stride, int64_t channels, int64_t height, int64_t width,
            uintptr_t indices, int64_t batch, uintptr_t flip, uintptr_t scale, uintptr_t bias, int dtype,
            bool channels_last, uintptr_t out, int threads) {
  return gather_chunks(reinterpret_cast<uintptr_t>(&store), std::max<int64_t>(rows, 1), rows, row_stride, channels,
                       height, width, indices, batch, flip, scale, bias, dtype, channels_last, out, threads);
}

bool crop_chunks(uintptr_t chunks, int64_t chunk_rows, int64_t rows, int64_t row_stride, int64_t channels,
                 int64_t height, int64_t width, uintptr_t indices, int64_t batch, uintptr_t boxes, int64_t out_height,
                 int64_t out_width, uintptr_t flip, uintptr_t scale, uintptr_t bias, int dtype, bool channels_last,
                 uintptr_t out, int threads) {
  return dpfast::crop({{at<const uint8_t* const>(chunks), chunk_rows, rows, row_stride, channels, height, width,
                        at<const int64_t>(indices), batch, at<const uint8_t>(flip), at<const float>(scale),
                        at<const float>(bias), static_cast<dpfast::DType>(dtype), channels_last, at<void>(out)},
                       at<const float>(boxes), out_height, out_width},
                      threads);
}

bool rows(uintptr_t chunks, int64_t chunk_rows, int64_t total, int64_t stride, int64_t width, uintptr_t indices,
          int64_t count, uintptr_t out, int threads) {
  return dpfast::rows({at<const uint8_t* const>(chunks), chunk_rows, total, stride, width, at<const int64_t>(indices),
                       count, at<uint8_t>(out)},
                      threads);
}

void permutation(int64_t first, int64_t count, int64_t size, uint64_t seed, uint64_t epoch, uint32_t stream,
                 uintptr_t out, int threads) {
  dpfast::permutation({first, count, size, seed, epoch, stream, at<int64_t>(out)}, threads);
}

// Sets whether large results ask for large pages, and returns what held before: tests look at both.
bool large_pages(bool wanted) { return dpfast::large_pages().exchange(wanted); }

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Vectorised, multi-threaded CPU kernels of dpfast.ops; see that package for the formulas.";
  const auto free_threads = py::call_guard<py::gil_scoped_release>();
  module.def("entropy", &entropy, free_threads);
  module.def("noise", &noise, free_threads);
  module.def("philox", &philox);
  module.def("guided_step", &guided_step, free_threads);
  module.def("gather", &gather, free_threads);
  module.def("gather_chunks", &gather_chunks, free_threads);
  module.def("crop_chunks", &crop_chunks, free_threads);
  module.def("rows", &rows, free_threads);
  module.def("permutation", &permutation, free_threads);
  module.def("large_pages", &large_pages);
  module.def("gives_back_free_blocks", &dpfast::gives_back_free_blocks);
  module.attr("REPORTING_ORDER") = dpfast::kReportingOrder;
}
