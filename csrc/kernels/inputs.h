// Tensors as kernels see them: a pointer and a dtype, widened to the compute dtype as they are
// loaded, so that no half-precision input is ever copied to be read.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace ipo_ext {

// A contiguous per-token tensor of any floating dtype; null where an optional one is absent.
struct TokenInput {
  const void* data = nullptr;  // [tokens]
  DType dtype = DType::kFloat32;
};

// A 0-dim tensor of any floating or integer dtype, read where the kernel runs, or `value` where
// data is null.
struct ScalarInput {
  const void* data = nullptr;
  DType dtype = DType::kFloat64;
  double value = 1;
};

// Returns element `index` of a tensor of any dtype.
template <typename To>
IPO_HOST_DEVICE To load_element(const void* data, DType dtype, int64_t index) {
  return dispatch_dtype(dtype, [=](auto stored) {
    using Stored = TypeOf<decltype(stored)>;
    return convert<To>(static_cast<const Stored*>(data)[index]);
  });
}

// Returns a token of an input, `absent` where there is no input.
template <typename To>
IPO_HOST_DEVICE To load_token(const TokenInput& input, int64_t index, To absent) {
  return input.data == nullptr ? absent : load_element<To>(input.data, input.dtype, index);
}

IPO_HOST_DEVICE double load_scalar(const ScalarInput& scalar) {
  return load_token<double>({scalar.data, scalar.dtype}, 0, scalar.value);
}

}  // namespace ipo_ext
