// The histogram of log-ratios: how many active tokens of each segment fall into each bin.
#pragma once

#include <cstdint>

#include "kernels/inputs.h"
#include "kernels/parallel_for.h"
#include "kernels/segments.h"
#include "math/histogram.h"

struct CUstream_st;

namespace ipo_ext {

struct HistogramArgs {
  DType compute_dtype;            // kFloat32 or kFloat64
  TokenInput trainer_logprobs;    // [tokens]
  TokenInput inference_logprobs;  // [tokens]
  const uint8_t* loss_mask;       // [tokens] booleans
  Segments segments;
  int64_t* counts;  // [math::kBins, segments], zeros: what is counted is added
};

namespace cpu {

void histogram(HistogramArgs args, const ParallelFor& parallel_for);

}  // namespace cpu

namespace cuda {

// Makes one launch on `stream` without synchronising with the host. Its atomics add integers, so
// counts do not depend on their order.
const char* histogram(const HistogramArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace ipo_ext
