// CUDA's vector types, their makers and dim3 for the host compiler, with CUDA's alignments: a
// misaligned vector access is as undefined here as it is there, so a sanitizer can see it.
#pragma once

#include <cstddef>

namespace emulator {
// Vectors of two and four are aligned to their size, 16 bytes at most; the others to one element.
constexpr std::size_t vector_alignment(std::size_t bytes) { return bytes < 16 ? bytes : 16; }
}  // namespace emulator

#define EMULATOR_VECTOR_TYPES(scalar, name)                                                      \
  struct name##1 { scalar x; };                                                                  \
  struct alignas(emulator::vector_alignment(2 * sizeof(scalar))) name##2 { scalar x, y; };       \
  struct name##3 { scalar x, y, z; };                                                            \
  struct alignas(emulator::vector_alignment(4 * sizeof(scalar))) name##4 { scalar x, y, z, w; }; \
  constexpr name##1 make_##name##1(scalar x) { return {x}; }                                     \
  constexpr name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                        \
  constexpr name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }           \
  constexpr name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

EMULATOR_VECTOR_TYPES(signed char, char)
EMULATOR_VECTOR_TYPES(unsigned char, uchar)
EMULATOR_VECTOR_TYPES(short, short)
EMULATOR_VECTOR_TYPES(unsigned short, ushort)
EMULATOR_VECTOR_TYPES(int, int)
EMULATOR_VECTOR_TYPES(unsigned int, uint)
EMULATOR_VECTOR_TYPES(long, long)
EMULATOR_VECTOR_TYPES(unsigned long, ulong)
EMULATOR_VECTOR_TYPES(long long, longlong)
EMULATOR_VECTOR_TYPES(unsigned long long, ulonglong)
EMULATOR_VECTOR_TYPES(float, float)
EMULATOR_VECTOR_TYPES(double, double)

#undef EMULATOR_VECTOR_TYPES

struct dim3 {
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }

  unsigned x, y, z;
};
