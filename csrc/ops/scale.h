// Multiplies a saved gradient by a factor: where it lies, or into a tensor of a narrower dtype.
#pragma once

#include "ops/backend.h"
#include "ops/matrix.h"

namespace ipo_ext {

template <typename Backend>
void scale_into(const Tensor& gradient, const Tensor& factor, const Tensor& out) {
  IPO_EXT_CHECK(gradient.is_contiguous(), "gradient: expected a contiguous tensor");
  check_within_storage(gradient, "gradient");
  check_within_storage(out, "out");
  IPO_EXT_CHECK(out.is_contiguous() && out.numel() == gradient.numel(), "out: expected ",
                gradient.numel(), " contiguous elements");
  IPO_EXT_CHECK(same_device(out, gradient), "out: expected the device of gradient");
  const DType dtype = dtype_of(gradient, "gradient");
  const DType out_dtype = dtype_of(out, "out");
  IPO_EXT_CHECK(is_floating(dtype), "gradient: expected a floating dtype");
  IPO_EXT_CHECK(out_dtype == dtype || (dtype == DType::kFloat32 && is_half(out_dtype)),
                "out: expected the dtype of gradient, or for float32 also float16 or bfloat16");
  Backend::scale({gradient.const_data_ptr(), dtype, out.mutable_data_ptr(), out_dtype,
                  gradient.numel(), scalar_input(factor, gradient, "factor")},
                 gradient);
}

template <typename Backend>
void scale_(const Tensor& gradient, const Tensor& factor) {
  const Tensor apart = apart_from(gradient, factor);
  if (gradient.is_contiguous()) return scale_into<Backend>(gradient, apart, gradient);
  const LogitsTensor rows(gradient, "gradient");
  IPO_EXT_CHECK(!rows.is_copy() && rows_are_apart(rows.matrix()),
                "gradient: expected rows of adjacent elements that share no memory");
  Backend::scale_rows({rows.matrix(), scalar_input(apart, gradient, "factor")}, gradient);
}

// The same with a further factor for each row, what an fp16 gradient is stored over.
template <typename Backend>
void scale_rows_(const Tensor& gradient, const Tensor& factor, const Tensor& row_scales) {
  const LogitsTensor rows(gradient, "gradient");
  IPO_EXT_CHECK(
      !rows.is_copy() && rows_are_apart(rows.matrix()) && rows.matrix().dtype == DType::kFloat16,
      "gradient: expected float16 rows of adjacent elements that share no memory");
  IPO_EXT_CHECK(row_scales.scalar_type() == ScalarType::Float && row_scales.is_contiguous() &&
                    row_scales.numel() == rows.matrix().rows && same_device(row_scales, gradient),
                "row_scales: expected ", rows.matrix().rows,
                " contiguous float32 elements on the device of gradient");
  const Tensor factor_apart = apart_from(gradient, factor);
  const Tensor scales_apart = apart_from(gradient, row_scales);
  Backend::scale_rows({rows.matrix(), scalar_input(factor_apart, gradient, "factor"),
                       static_cast<const float*>(scales_apart.const_data_ptr())},
                      gradient);
}

}  // namespace ipo_ext
