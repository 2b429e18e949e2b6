// How a packed batch is cut: fixed tiles of tokens, and the pieces in which tiles and segments
// overlap. Each piece owns a slot of the workspace that the host can bound beforehand, so partial
// sums need neither atomics nor a zero-fill.
#pragma once

#include <cstdint>

#include "math/lanes.h"

namespace ipo_ext {

struct Segments {
  const int32_t* cu_seqlens;  // [count + 1] first token of each segment, then the number of tokens;
                              // null: one segment
  int64_t count;
  int64_t tokens;
  int64_t tile_size;

  IPO_HOST_DEVICE int64_t num_tiles() const { return (tokens + tile_size - 1) / tile_size; }

  // First token of segment s, s in [0, count]. Clamped: whatever cu_seqlens holds, no access leaves
  // the batch.
  IPO_HOST_DEVICE int64_t begin(int64_t s) const {
    if (cu_seqlens == nullptr) return s == 0 ? 0 : tokens;
    const int64_t value = cu_seqlens[s];
    return value < 0 ? 0 : (value > tokens ? tokens : value);
  }

  // The pieces of tiles and segments, in order, never share `tile + segment`: each step moves to
  // the next tile, to the next segment, or to both.
  IPO_HOST_DEVICE static int64_t slot(int64_t tile, int64_t segment) { return tile + segment; }
  IPO_HOST_DEVICE int64_t num_slots() const { return num_tiles() + count; }

  // The slots of segment s, written only where it has tokens.
  IPO_HOST_DEVICE int64_t first_slot(int64_t s) const { return slot(begin(s) / tile_size, s); }
  IPO_HOST_DEVICE int64_t end_slot(int64_t s) const {
    return begin(s + 1) > begin(s) ? slot((begin(s + 1) - 1) / tile_size, s) + 1 : first_slot(s);
  }

  // Whether entry s keeps cu_seqlens a partition: it starts at 0, never decreases, ends at the
  // number of tokens.
  IPO_HOST_DEVICE bool entry_is_valid(int64_t s) const {
    if (cu_seqlens == nullptr) return true;
    const bool ordered = s == 0 ? cu_seqlens[0] == 0 : cu_seqlens[s] >= cu_seqlens[s - 1];
    return ordered & (s < count || cu_seqlens[s] == tokens);
  }
};

}  // namespace ipo_ext
