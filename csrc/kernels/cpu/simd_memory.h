// Vectors from memory and back, for the SIMD loops. Always inlined, like the math (math/lanes.h).
#pragma once

#include "math/simd.h"

namespace ipo_ext::cpu {

template <typename T>
inline __attribute__((always_inline)) T load(const math::Element<T>* elements) {
  T value;
  memcpy(&value, elements, sizeof(value));
  return value;
}

template <typename T>
inline __attribute__((always_inline)) void store(math::Element<T>* elements, const T& value) {
  memcpy(elements, &value, sizeof(value));
}

}  // namespace ipo_ext::cpu
