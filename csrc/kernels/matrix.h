// A matrix of logits, or of their gradient, as kernels see it.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace ipo_ext {

// A matrix [rows, columns] of any floating dtype whose columns are adjacent. Rows come in blocks,
// so that logits[:, :-1] of a batch, say, is read where it lies.
struct LogitsMatrix {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t block_rows = 1;    // rows of a block
  int64_t block_stride = 0;  // from block to block, in elements
  int64_t row_stride = 0;    // from row to row of a block, in elements

  IPO_HOST_DEVICE int64_t offset(int64_t row) const {
    if (row < block_rows) return row * row_stride;  // a division costs as much as many logits
    return row / block_rows * block_stride + row % block_rows * row_stride;
  }
  template <typename Stored>
  IPO_HOST_DEVICE Stored* row(int64_t index) const {
    return static_cast<Stored*>(data) + offset(index);
  }
};

}  // namespace ipo_ext
