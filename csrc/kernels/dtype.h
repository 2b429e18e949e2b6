// The dtypes of tensors: how kernels choose their code by one, how values are widened to the dtype
// that is computed in, and how results are rounded to the dtype that is stored.
#pragma once

#include <cstdint>
#include <type_traits>

#include "math/lanes.h"

namespace ipo_ext {

enum class DType : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64, kInt32, kInt64 };

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The dtype in which elements of a dtype are computed.
template <typename Stored>
using Compute = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

IPO_HOST_DEVICE constexpr bool is_floating(DType dtype) {
  return dtype != DType::kInt32 && dtype != DType::kInt64;
}

IPO_HOST_DEVICE constexpr bool is_half(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

IPO_HOST_DEVICE constexpr int bytes_of(DType dtype) {
  if (is_half(dtype)) return 2;
  return dtype == DType::kFloat32 || dtype == DType::kInt32 ? 4 : 8;
}

// Names a C++ type to a generic lambda, which reads it as TypeOf<decltype(tag)>.
template <typename T>
struct TypeTag {
  using Type = T;
};
template <typename Tag>
using TypeOf = typename Tag::Type;

#ifdef __CUDACC__
#pragma nv_exec_check_disable  // the body is the caller's: of the host, or of the device
#endif
// Calls body(TypeTag<Stored>()) for the type that a dtype is stored as, and returns what it
// returns.
template <typename Body>
IPO_HOST_DEVICE auto dispatch_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat16:
      return body(TypeTag<Float16>());
    case DType::kBFloat16:
      return body(TypeTag<BFloat16>());
    case DType::kFloat32:
      return body(TypeTag<float>());
    case DType::kFloat64:
      return body(TypeTag<double>());
    case DType::kInt32:
      return body(TypeTag<int32_t>());
    case DType::kInt64:
      return body(TypeTag<int64_t>());
  }
  return decltype(body(TypeTag<float>()))();  // not reached: every dtype is a case
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// dispatch_dtype() for a tensor that can have floating dtypes alone.
template <typename Body>
IPO_HOST_DEVICE auto dispatch_floating(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat16:
      return body(TypeTag<Float16>());
    case DType::kBFloat16:
      return body(TypeTag<BFloat16>());
    case DType::kFloat64:
      return body(TypeTag<double>());
    default:
      return body(TypeTag<float>());
  }
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// dispatch_dtype() for a gradient by values of type Stored: it has their dtype or, for fp32 values,
// fp16 or bf16.
template <typename Stored, typename Body>
IPO_HOST_DEVICE auto dispatch_gradient(DType dtype, const Body& body) {
  if constexpr (std::is_same_v<Stored, float>) {
    if (dtype == DType::kFloat16) return body(TypeTag<Float16>());
    if (dtype == DType::kBFloat16) return body(TypeTag<BFloat16>());
  }
  return body(TypeTag<Stored>());
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
// dispatch_dtype() for a dtype that is computed in.
template <typename Body>
IPO_HOST_DEVICE auto dispatch_compute(DType dtype, const Body& body) {
  return dtype == DType::kFloat64 ? body(TypeTag<double>()) : body(TypeTag<float>());
}

template <typename To, typename From>
IPO_HOST_DEVICE To convert(From value) {
  return static_cast<To>(value);
}
template <typename To>
IPO_HOST_DEVICE To convert(BFloat16 value) {
  return math::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
// Widens fp16 exactly and without a branch. A multiplication mends the exponent's bias, which also
// normalises subnormals; infinities and NaNs keep their mantissa instead.
template <typename To>
IPO_HOST_DEVICE To convert(Float16 value) {
  constexpr float kRebias = 5.192296858534828e33f;  // 2^112
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t finite = math::bit_cast<uint32_t>(math::bit_cast<float>(magnitude) * kRebias);
  const bool overflows = magnitude >= 0x0f800000u;
  return math::bit_cast<float>((overflows ? magnitude | 0x7f800000u : finite) | sign);
}

// Rounds to the nearest, ties to even; NaN stays NaN.
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

}  // namespace ipo_ext
