// Says how a packed batch is cut: into fixed tiles of tokens, and into the spans in which tiles and
// segments overlap. Each span owns a slot of the workspace that the host can bound beforehand, so
// partial sums need neither atomics nor a zero-fill.
#pragma once

#include <cstdint>

#include "math/lanes.h"

namespace ipo_ext {

struct Segments {
  const int32_t* cu_seqlens;  // [count + 1] first token of each segment, then the number of tokens;
                              // null: one segment
  int64_t count;
  int64_t tokens;
  int tile_log2;  // of the tokens of a tile: a GPU has no division

  IPO_HOST_DEVICE int64_t tile_size() const { return int64_t{1} << tile_log2; }
  IPO_HOST_DEVICE int64_t tile_of(int64_t token) const { return token >> tile_log2; }
  IPO_HOST_DEVICE int64_t num_tiles() const { return tile_of(tokens + tile_size() - 1); }

  // Returns the first token of segment s, s in [0, count]. It is clamped: whatever cu_seqlens
  // holds, no access leaves the batch.
  IPO_HOST_DEVICE int64_t begin(int64_t s) const {
    if (cu_seqlens == nullptr) return s == 0 ? 0 : tokens;
    const int64_t value = cu_seqlens[s];
    return value < 0 ? 0 : (value > tokens ? tokens : value);
  }

  // Returns the last segment that begins at or before `token`; of several that begin there, all but
  // the last are empty.
  IPO_HOST_DEVICE int64_t containing(int64_t token) const {
    const int64_t begun = first_from(token + 1);
    return begun > 0 ? begun - 1 : 0;
  }

  // Returns the first segment that begins at or behind `token`, `count` if none does.
  IPO_HOST_DEVICE int64_t first_from(int64_t token) const {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (begin(middle) < token) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // No two spans have the same `tile + segment`: from one to the next in order, the tile, the
  // segment or both move on by one.
  IPO_HOST_DEVICE static int64_t slot(int64_t tile, int64_t segment) { return tile + segment; }
  IPO_HOST_DEVICE int64_t num_slots() const { return num_tiles() + count; }

  // The slots of segment s are [first_slot(s), end_slot(s)); they are written where it has tokens.
  IPO_HOST_DEVICE int64_t first_slot(int64_t s) const { return slot(tile_of(begin(s)), s); }
  IPO_HOST_DEVICE int64_t end_slot(int64_t s) const {
    return begin(s + 1) > begin(s) ? slot(tile_of(begin(s + 1) - 1), s) + 1 : first_slot(s);
  }

  // Returns whether entry s keeps cu_seqlens a partition, which starts at 0, never decreases and
  // ends at the number of tokens.
  IPO_HOST_DEVICE bool entry_is_valid(int64_t s) const {
    if (cu_seqlens == nullptr) return true;
    const bool ordered = s == 0 ? cu_seqlens[0] == 0 : cu_seqlens[s] >= cu_seqlens[s - 1];
    return ordered & (s < count || cu_seqlens[s] == tokens);
  }
};

}  // namespace ipo_ext
