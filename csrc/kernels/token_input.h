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

// To nearest, ties to even; NaN stays NaN.
template <typename Stored>
IPO_HOST_DEVICE Stored narrow(double value) {
  return static_cast<Stored>(value);
}
template <typename Stored>
IPO_HOST_DEVICE Stored narrow(float value);
template <>
IPO_HOST_DEVICE float narrow<float>(float value) {
  return value;
}
template <>
IPO_HOST_DEVICE BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = math::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}
template <>
IPO_HOST_DEVICE Float16 narrow<Float16>(float value) {
  const uint32_t bits = math::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 rounds to multiples of 2^-24, which are fp16's subnormals.
  const uint32_t subnormal =
      math::bit_cast<uint32_t>(math::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t bounded = magnitude >= 0x477ff000u ? 0x7c00u : finite;
  const uint32_t half = magnitude > 0x7f800000u ? 0x7e00u : bounded;
  return {static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u))};
}

// Element `index` of a tensor of any dtype.
template <typename To>
IPO_HOST_DEVICE To load_element(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat16:
      return convert<To>(static_cast<const Float16*>(data)[index]);
    case DType::kBFloat16:
      return convert<To>(static_cast<const BFloat16*>(data)[index]);
    case DType::kFloat32:
      return static_cast<To>(static_cast<const float*>(data)[index]);
    case DType::kFloat64:
      return static_cast<To>(static_cast<const double*>(data)[index]);
    case DType::kInt32:
      return static_cast<To>(static_cast<const int32_t*>(data)[index]);
    case DType::kInt64:
      return static_cast<To>(static_cast<const int64_t*>(data)[index]);
  }
  return To(0);
}

// A token of an input, `absent` where there is none.
template <typename To>
IPO_HOST_DEVICE To load_token(const TokenInput& input, int64_t index, To absent) {
  return input.data == nullptr ? absent : load_element<To>(input.data, input.dtype, index);
}

IPO_HOST_DEVICE double load_scalar(const ScalarInput& scalar) {
  return load_token<double>({scalar.data, scalar.dtype}, 0, scalar.value);
}

}  // namespace ipo_ext
