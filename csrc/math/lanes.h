// The vocabulary in which the math is written once for every lane type T: a float or double on the
// device, and on the host also a SIMD vector of them (simd.h). Selections go through masks, never
// through branches.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define IPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Functions are always inlined: the host compiles this layer once for each instruction set, and a
// copy that the linker shared between them would run on machines that it was not built for.
#define IPO_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace ipo_ext::math {

// What a lane type T is made of, and the operations that scalars and vectors spell differently.
template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  using Element = float;
  using Mask = bool;
  using Int = int32_t;
  using Unsigned = uint32_t;
  using Count = uint32_t;
  using Wide = double;
  static IPO_HOST_DEVICE Mask and_not(Mask a, Mask b) { return a & !b; }
  static IPO_HOST_DEVICE Count ones(Mask mask) { return mask; }
  static IPO_HOST_DEVICE Wide widen(Element value) { return value; }
};

template <>
struct Lanes<double> {
  using Element = double;
  using Mask = bool;
  using Int = int64_t;
  using Unsigned = uint64_t;
  using Count = uint32_t;
  using Wide = double;
  static IPO_HOST_DEVICE Mask and_not(Mask a, Mask b) { return a & !b; }
  static IPO_HOST_DEVICE Count ones(Mask mask) { return mask; }
  static IPO_HOST_DEVICE Wide widen(Element value) { return value; }
};

template <typename T>
using Element = typename Lanes<T>::Element;
template <typename T>
using Mask = typename Lanes<T>::Mask;
template <typename T>
using Wide = typename Lanes<T>::Wide;

template <typename To, typename From>
IPO_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Returns `value` in every lane.
template <typename T>
IPO_HOST_DEVICE T splat(Element<T> value) {
  return T{} + value;
}

// Returns mask ? yes : no in every lane.
template <typename T>
IPO_HOST_DEVICE T select(Mask<T> mask, T yes, T no) {
  return mask ? yes : no;
}

// Returns a * b, rounded on its own. The device fuses other products with the sums that take them,
// and what should cancel to 0 would leave the product's rounding error. A is T or its element.
template <typename T, typename A>
IPO_HOST_DEVICE T rounded_product(A a, T b) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, float>) return __fmul_rn(a, b);
  if constexpr (std::is_same_v<T, double>) return __dmul_rn(a, b);
#endif
  return a * b;
}

// Returns a * b + c, fused on the device, where the compiler would otherwise choose what to fuse
// by the code around it, and two kernels would differ in the last bit. The host rounds twice, as
// its oldest instruction sets must. A and C are T or its element.
template <typename T, typename A, typename C>
IPO_HOST_DEVICE T multiply_add(A a, T b, C c) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, float>) return __fmaf_rn(a, b, c);
  if constexpr (std::is_same_v<T, double>) return __fma_rn(a, b, c);
#endif
  return a * b + c;
}

// `smaller` and `larger` choose one of two numbers, and b where either is NaN: on x86 one
// instruction.
template <typename T>
IPO_HOST_DEVICE T smaller(T a, T b) {
  return select<T>(a < b, a, b);
}

template <typename T>
IPO_HOST_DEVICE T larger(T a, T b) {
  return select<T>(a > b, a, b);
}

// Adds 1 to the counts of the lanes in which `mask` holds.
template <typename T>
IPO_HOST_DEVICE void count_where(typename Lanes<T>::Count& count, Mask<T> mask) {
#if defined(__CUDA_ARCH__)
  // One predicated addition; of the plain one the compiler makes a selection and an addition.
  asm("{.reg .pred q; setp.ne.u32 q, %1, 0; @q add.u32 %0, %0, 1;}"
      : "+r"(count)
      : "r"(static_cast<uint32_t>(mask)));
#else
  count += Lanes<T>::ones(mask);
#endif
}

// Lowers `smallest` to `value`, or raises `largest` to it, in the lanes in which `where` holds, and
// where `value` is a number.
template <typename T>
IPO_HOST_DEVICE void lower_where(T& smallest, Mask<T> where, T value) {
#if defined(__CUDA_ARCH__)
  if (where) smallest = min(smallest, value);  // one instruction
#else
  smallest = smaller(select<T>(where, value, smallest), smallest);
#endif
}
template <typename T>
IPO_HOST_DEVICE void raise_where(T& largest, Mask<T> where, T value) {
#if defined(__CUDA_ARCH__)
  if (where) largest = max(largest, value);
#else
  largest = larger(select<T>(where, value, largest), largest);
#endif
}

}  // namespace ipo_ext::math
