// Loads and stores vectors and single elements for the SIMD loops. They go by bytes, so that one
// matrix may lie over another of a different dtype, and are always inlined, as the math is
// (math/lanes.h).
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

template <typename Stored>
inline __attribute__((always_inline)) Stored load_one(const Stored* element) {
  Stored value;
  memcpy(&value, element, sizeof(value));
  return value;
}

template <typename Stored>
inline __attribute__((always_inline)) void store_one(Stored* element, const Stored& value) {
  memcpy(element, &value, sizeof(value));
}

}  // namespace ipo_ext::cpu
