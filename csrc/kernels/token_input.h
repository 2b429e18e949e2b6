// Tensors as kernels see them: a pointer and a dtype, widened to the compute dtype as they are
// loaded, so that no half-precision input is ever copied to be read.
#pragma once

#include <cstdint>

#include "math/lanes.h"

namespace ipo_ext {

enum class DType : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64, kInt32, kInt64 };

// A contiguous per-token tensor of any floating dtype; null where an optional one is absent.
struct TokenInput {
  const void* data = nullptr;  // [tokens]
  DType dtype = DType::kFloat32;
};

// A 0-dim tensor of any floating or integer dtype, read where the kernel runs; `value` where data
// is null.
struct ScalarInput {
  const void* data = nullptr;
  DType dtype = DType::kFloat64;
  double value = 1;
};

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
IPO_HOST_DEVICE To convert(From value) {
  return static_cast<To>(value);
}
template <typename To>
IPO_HOST_DEVICE To convert(BFloat16 value) {
  return math::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
// The exponent's bias is mended by a multiplication, which also normalises subnormals; infinities
// and NaNs keep their mantissa instead. Exact, and free of branches.
template <typename To>
IPO_HOST_DEVICE To convert(Float16 value) {
  constexpr float kRebias = 5.192296858534828e33f;  // 2^112
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t finite = math::bit_cast<uint32_t>(math::bit_cast<float>(magnitude) * kRebias);
  const bool overflows = magnitude >= 0x0f800000u;
  return math::bit_cast<float>((overflows ? magnitude | 0x7f800000u : finite) | sign);
}

IPO_HOST_DEVICE double load_scalar(const ScalarInput& scalar) {
  if (scalar.data == nullptr) return scalar.value;
  switch (scalar.dtype) {
    case DType::kFloat16:
      return convert<double>(*static_cast<const Float16*>(scalar.data));
    case DType::kBFloat16:
      return convert<double>(*static_cast<const BFloat16*>(scalar.data));
    case DType::kFloat32:
      return *static_cast<const float*>(scalar.data);
    case DType::kFloat64:
      return *static_cast<const double*>(scalar.data);
    case DType::kInt32:
      return *static_cast<const int32_t*>(scalar.data);
    case DType::kInt64:
      return static_cast<double>(*static_cast<const int64_t*>(scalar.data));
  }
  return scalar.value;
}

}  // namespace ipo_ext
