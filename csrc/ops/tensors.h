// From torch's tensors to the kernels' views. Checks only what memory safety needs: the words for
// users are Python's (ipo_ext/_ops/checks.py), which has looked at every argument before.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/inputs.h"
#include "ops/check.h"

namespace ipo_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    default:
      IPO_EXT_CHECK(false, name, ": unsupported dtype");
  }
  return DType::kFloat32;
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// From a tensor's first byte to behind its last; strides are never negative.
inline int64_t extent_in_bytes(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t elements = 1;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] == 0) return 0;
    elements += (sizes[dim] - 1) * strides[dim];
  }
  return elements * static_cast<int64_t>(tensor.element_size());
}

// A compiler may hand over a view of a buffer that is too small for it: what lies behind the buffer
// is someone else's, to read and all the more to write.
inline void check_within_storage(const Tensor& tensor, const char* name) {
  int64_t storage = 0;
  const AOTITorchError status = aoti_torch_get_storage_size(tensor.get(), &storage);
  IPO_EXT_CHECK(status == AOTI_TORCH_SUCCESS, name, ": expected a tensor with a storage");
  const int64_t end = tensor.storage_offset() * static_cast<int64_t>(tensor.element_size()) +
                      extent_in_bytes(tensor);
  IPO_EXT_CHECK(end <= storage || tensor.numel() == 0, name,
                ": expected a view within its storage of ", storage,
                " bytes, got one that ends at byte ", end,
                "; pass its contiguous() copy, made where it is still whole");
}

// torch tells this side of its ABI that a copy failed, not why: memory is lacking, unless a kernel
// failed before. Python tells the two apart on a GPU, and makes torch's OutOfMemoryError of the
// words "no memory for" there.
inline Tensor contiguous_copy(const Tensor& tensor, const char* name) {
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::exception&) {
    throw std::runtime_error(message(name, ": no memory for a copy of ", tensor.numel(),
                                     " elements, which its layout makes necessary; pass it "
                                     "contiguous, or fewer tokens at a time"));
  }
}

inline Tensor as_contiguous(const Tensor& tensor, const char* name) {
  if (tensor.is_contiguous()) return tensor;
  check_within_storage(tensor, name);
  return contiguous_copy(tensor, name);
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// An input of an operator that writes over `written`: a copy where the two may share memory, since
// nothing orders what is read after what is written.
inline Tensor apart_from(const Tensor& written, const Tensor& input) {
  const auto address = [](const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  };
  const bool may_overlap = address(input) < address(written) + extent_in_bytes(written) &&
                           address(written) < address(input) + extent_in_bytes(input);
  return may_overlap ? torch::stable::clone(input) : input;
}
inline std::optional<Tensor> apart_from(const Tensor& written, const std::optional<Tensor>& input) {
  return input.has_value() ? std::optional(apart_from(written, *input)) : std::nullopt;
}

// Memory-safety checks of one per-token tensor against the trainer's log-probabilities.
inline void check_per_token(const Tensor& tensor, const Tensor& trainer_logprobs,
                            const char* name) {
  IPO_EXT_CHECK(tensor.numel() == trainer_logprobs.numel(), name, ": expected ",
                trainer_logprobs.numel(), " tokens, got ", tensor.numel());
  IPO_EXT_CHECK(same_device(tensor, trainer_logprobs), name,
                ": expected the device of trainer_logprobs");
}

// A per-token tensor as a kernel reads it; holds the contiguous copy where one was needed.
class __attribute__((visibility("hidden"))) PerToken {
 public:
  PerToken() = default;
  PerToken(const Tensor& tensor, const Tensor& trainer_logprobs, const char* name)
      : tensor_(as_contiguous(tensor, name)),
        input_{tensor_->const_data_ptr(), dtype_of(tensor, name)} {
    check_per_token(tensor, trainer_logprobs, name);
    IPO_EXT_CHECK(is_floating(input_.dtype), name, ": expected a floating dtype");
  }
  PerToken(const std::optional<Tensor>& tensor, const Tensor& trainer_logprobs, const char* name) {
    if (tensor.has_value()) *this = PerToken(*tensor, trainer_logprobs, name);
  }
  TokenInput input() const { return input_; }

 private:
  std::optional<Tensor> tensor_;
  TokenInput input_;
};

// A normalizer on the CPU is read here even for a CUDA batch: no copy, no synchronisation.
inline ScalarInput scalar_input(const std::optional<Tensor>& tensor, const Tensor& trainer_logprobs,
                                const char* name) {
  if (!tensor.has_value()) return {};
  IPO_EXT_CHECK(tensor->numel() == 1, name, ": expected one element, got ", tensor->numel());
  const ScalarInput input = {tensor->const_data_ptr(), dtype_of(*tensor, name), 1};
  if (same_device(*tensor, trainer_logprobs)) return input;
  IPO_EXT_CHECK(tensor->is_cpu(), name, ": expected the device of trainer_logprobs, or the CPU");
  return {nullptr, DType::kFloat64, load_scalar(input)};
}

// Contiguous, on the device of `like`. Past the dispatcher, which costs more than the allocation.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0; stride *= std::max<int64_t>(sizes[dim], 1)) {
    strides[dim] = stride;
  }
  int32_t device_type = 0;
  AtenTensorHandle tensor = nullptr;
  AOTITorchError status = aoti_torch_get_device_type(like.get(), &device_type);
  if (status == AOTI_TORCH_SUCCESS) {
    status = aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
        like.get_device_index(), &tensor);
  }
  IPO_EXT_CHECK(status == AOTI_TORCH_SUCCESS, "no memory for a tensor of ", stride, " elements");
  return Tensor(tensor);
}

// [rows, segments] for a packed batch, else [rows].
inline Tensor empty_rows(int64_t rows, int64_t segments, bool packed, ScalarType dtype,
                         const Tensor& like) {
  return packed ? empty({rows, segments}, dtype, like) : empty({rows}, dtype, like);
}

}  // namespace ipo_ext
