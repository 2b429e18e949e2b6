// From a tensor of logits, or of their gradient, to the kernels' matrix.
#pragma once

#include "kernels/matrix.h"
#include "ops/tensors.h"

namespace ipo_ext {

// A tensor [..., columns] as rows of adjacent columns at no more than two strides, without a copy
// where their layout allows it; holds the copy where it does not.
class __attribute__((visibility("hidden"))) LogitsTensor {
 public:
  LogitsTensor(const Tensor& tensor, const char* name) : tensor_(tensor) {
    IPO_EXT_CHECK(tensor.dim() > 0, name, ": expected shape [..., vocabulary], got a 0-dim tensor");
    check_within_storage(tensor, name);
    if (!describe()) {
      tensor_ = contiguous_copy(tensor_, name);
      is_copy_ = true;
      describe();
    }
    matrix_.data = const_cast<void*>(tensor_.const_data_ptr());
    matrix_.dtype = dtype_of(tensor_, name);
    IPO_EXT_CHECK(is_floating(matrix_.dtype), name, ": expected a floating dtype");
  }
  const LogitsMatrix& matrix() const { return matrix_; }
  bool is_copy() const { return is_copy_; }

 private:
  // Folds the dimensions before the last, from the inside: first into rows of a block, then, from
  // where the strides stop matching, into blocks. False if that does not fit the layout.
  bool describe() {
    const int64_t last = tensor_.dim() - 1;
    matrix_.columns = tensor_.size(last);
    if (tensor_.stride(last) != 1 && matrix_.columns > 1) return false;
    int64_t blocks = 1;
    matrix_.block_rows = 1;
    matrix_.row_stride = matrix_.block_stride = 0;
    for (int64_t dim = last - 1; dim >= 0; --dim) {
      const int64_t size = tensor_.size(dim), stride = tensor_.stride(dim);
      if (size == 1) continue;
      if (blocks == 1 &&
          (matrix_.block_rows == 1 || stride == matrix_.row_stride * matrix_.block_rows)) {
        if (matrix_.block_rows == 1) matrix_.row_stride = stride;
        matrix_.block_rows *= size;
      } else if (blocks == 1 || stride == matrix_.block_stride * blocks) {
        if (blocks == 1) matrix_.block_stride = stride;
        blocks *= size;
      } else {
        return false;
      }
    }
    matrix_.rows = matrix_.block_rows * blocks;
    if (matrix_.block_rows == 0) matrix_.block_rows = 1;
    return true;
  }

  Tensor tensor_;
  LogitsMatrix matrix_;
  bool is_copy_ = false;
};

// Whether no element of the matrix belongs to two rows: rows within blocks, or blocks within rows.
inline bool rows_are_apart(const LogitsMatrix& matrix) {
  const int64_t blocks = matrix.rows / matrix.block_rows;
  const auto apart = [&](int64_t inner, int64_t inner_stride, int64_t outer, int64_t outer_stride) {
    const int64_t extent = (inner - 1) * inner_stride + matrix.columns;
    return (inner == 1 || inner_stride >= matrix.columns) && (outer <= 1 || outer_stride >= extent);
  };
  return apart(matrix.block_rows, matrix.row_stride, blocks, matrix.block_stride) ||
         apart(blocks, matrix.block_stride, matrix.block_rows, matrix.row_stride);
}

// The same matrix, contiguous: where the gradient goes.
inline LogitsMatrix contiguous_like(const LogitsMatrix& logits, void* data) {
  LogitsMatrix matrix = logits;
  matrix.data = data;
  matrix.block_rows = logits.rows > 0 ? logits.rows : 1;
  matrix.block_stride = 0;
  matrix.row_stride = logits.columns;
  return matrix;
}

}  // namespace ipo_ext
