// Which bin of the histogram a log-ratio falls into, read from its bits: 32 bins a side, whose
// inner ends are 2^k and 1.5 * 2^k for k from -10 to 4, and 2^5 (docs/math.md, "The histogram").
#pragma once

#include "math/lanes.h"

namespace ipo_ext::math {

constexpr int kBinsOfSide = 32;
constexpr int kBins = 2 * kBinsOfSide;
constexpr int kNoBin = kBinsOfSide;  // of a token that is not counted

// Tables have a column for each bin, from the most negative log-ratios to the most positive, and
// behind these one for tokens that are not counted.
constexpr int kFirstBin = -kBinsOfSide;
constexpr int kColumns = kBins + 1;

template <typename E>
struct BinConstants;
template <>
struct BinConstants<float> {
  static constexpr int kHalfOctaveShift = 22;  // leaves the exponent and a bit of the mantissa
  static constexpr int kFirstEdge = 2 * (127 - 10);  // what it leaves of 2^-10
  static constexpr uint32_t kMagnitude = 0x7fffffffu;
};
template <>
struct BinConstants<double> {
  static constexpr int kHalfOctaveShift = 51;
  static constexpr int kFirstEdge = 2 * (1023 - 10);
  static constexpr uint64_t kMagnitude = 0x7fffffffffffffffu;
};

// Returns the bin of a log-ratio: from 0 outwards 0, 1, ... on the positive side, to which 0
// belongs, and -1, -2, ... on the other. An end belongs to the bin farther from 0.
template <typename T>
IPO_HOST_DEVICE typename Lanes<T>::Int histogram_bin(T x, Mask<T> counted) {
  using C = BinConstants<Element<T>>;
  using Int = typename Lanes<T>::Int;
  using Unsigned = typename Lanes<T>::Unsigned;
  const Unsigned magnitude = bit_cast<Unsigned>(x) & C::kMagnitude;
  Int place = (Int)(magnitude >> C::kHalfOctaveShift) - (C::kFirstEdge - 1);
  place = place > 0 ? place : Int{};
  place = place < kBinsOfSide ? place : Int{} + (kBinsOfSide - 1);
  const Int bin = x < Element<T>(0) ? ~place : place;
  return counted & (x == x) ? bin : Int{} + kNoBin;
}

}  // namespace ipo_ext::math
