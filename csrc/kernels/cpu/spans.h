// The spans of a tile: the tokens that it has of each packed segment.
#pragma once

#include <algorithm>

#include "kernels/segments.h"

namespace ipo_ext::cpu {

// Calls visit(segment, begin, end) for every span of a tile.
template <typename Visit>
void for_each_span(const Segments& segments, int64_t tile, const Visit& visit) {
  int64_t begin = tile * segments.tile_size();
  const int64_t tile_end = std::min(begin + segments.tile_size(), segments.tokens);
  for (int64_t segment = segments.containing(begin); begin < tile_end; ++segment) {
    const int64_t end = std::min(segments.begin(segment + 1), tile_end);
    if (end <= begin) continue;
    visit(segment, begin, end);
    begin = end;
  }
}

}  // namespace ipo_ext::cpu
