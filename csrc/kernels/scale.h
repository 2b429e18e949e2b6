// A gradient times a factor that may be known to the device alone: what a backward pass does with
// a gradient that the forward pass has made.
#pragma once

#include <cstdint>

#include "kernels/inputs.h"
#include "kernels/matrix.h"
#include "kernels/parallel_for.h"

struct CUstream_st;

namespace ipo_ext {

// Asks for out = gradient * factor, a product in the compute dtype, rounded to out's dtype once.
// Nothing is touched where factor is 1 and out the gradient.
struct ScaleArgs {
  const void* gradient;  // [count]
  DType dtype;
  void* out;        // [count]; the gradient itself if of its dtype, else apart from it
  DType out_dtype;  // the gradient's, or fp16 or bf16 for an fp32 gradient
  int64_t count;
  ScalarInput factor;
};

// Asks for gradient *= factor in place, for rows that do not follow each other or have scales.
struct ScaleRowsArgs {
  LogitsMatrix gradient;
  ScalarInput factor;
  const float* row_scales = nullptr;  // [rows], further factors of an fp16 gradient's rows; or null
};

namespace cpu {

void scale(const ScaleArgs& args, const ParallelFor& parallel_for);
void scale_rows(const ScaleRowsArgs& args, const ParallelFor& parallel_for);

}  // namespace cpu

namespace cuda {

// Each makes one launch on `stream` without synchronising with the host, and returns null, or
// CUDA's words for what failed.
const char* scale(const ScaleArgs& args, CUstream_st* stream);
const char* scale_rows(const ScaleRowsArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace ipo_ext
