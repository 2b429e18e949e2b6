// Multiplies a gradient by a factor that only the device knows, in place or into a narrower dtype,
// rounded once: one pass at the speed of a copy, and a factor of 1 in place reads nothing but
// itself. The grid is as large as the device and no larger, since blocks that only return are not
// free. Rows that do not follow each other are scaled in place, a block for each row.
#include <algorithm>

#include "kernels/cuda/common/vector.cuh"
#include "kernels/scale.h"

namespace ipo_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 4;  // 64 KiB of loads under way
constexpr int kVectorsAtOnce = 4;            // loads of a thread that do not wait for each other

// ---------------------------------------------------------------------------------------------------------------------
// Kernel
// ---------------------------------------------------------------------------------------------------------------------

template <typename From, typename To, int kCount>
__device__ __forceinline__ void store_scaled(const From (&from)[kCount], Compute<From> factor,
                                             To* to) {
  To values[kCount];
  if constexpr (kCount == 1) {
    values[0] = narrow<To>(convert<Compute<From>>(from[0]) * factor);
  } else {
    Compute<From> wide[kCount];
    widen_all(from, wide);
#pragma unroll
    for (int i = 0; i < kCount; ++i) wide[i] *= factor;
    narrow_all(wide, values);
  }
  store_aligned(to, values);
}

// Scales vectors of kCount neighbours, kVectorsAtOnce of them a thread and round; what is no whole
// vector at the end goes one by one.
template <typename From, typename To, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    scale_elements(const ScaleArgs args) {
  const Compute<From> factor = static_cast<Compute<From>>(load_scalar(args.factor));
  if (factor == 1 && args.out == args.gradient) return;
  const From* from = static_cast<const From*>(args.gradient);
  To* to = static_cast<To*>(args.out);

  constexpr int64_t kBlockVectors = kThreads * kVectorsAtOnce;
  const int64_t vectors = args.count / kCount;
  for (int64_t first = blockIdx.x * kBlockVectors + threadIdx.x; first < vectors;
       first += gridDim.x * kBlockVectors) {
    From loaded[kVectorsAtOnce][kCount];
#pragma unroll
    for (int i = 0; i < kVectorsAtOnce; ++i) {
      const int64_t vector = first + i * kThreads;
      if (vector < vectors) load_mutable(from + vector * kCount, loaded[i]);
    }
#pragma unroll
    for (int i = 0; i < kVectorsAtOnce; ++i) {
      const int64_t vector = first + i * kThreads;
      if (vector < vectors) store_scaled(loaded[i], factor, to + vector * kCount);
    }
  }
  if constexpr (kCount > 1) {
    const int64_t rest = vectors * kCount + threadIdx.x;
    if (blockIdx.x == 0 && rest < args.count) {
      const From last[] = {from[rest]};
      store_scaled(last, factor, to + rest);
    }
  }
}

// Returns the factor of a row.
template <typename Stored>
__device__ __forceinline__ Compute<Stored> factor_of_row(const ScaleRowsArgs& args,
                                                         Compute<Stored> factor, int64_t row) {
  if constexpr (std::is_same_v<Stored, Float16>) {
    if (args.row_scales != nullptr) return factor * args.row_scales[row];
  }
  return factor;
}

template <typename Stored>
__device__ __forceinline__ bool has_row_scales(const ScaleRowsArgs& args) {
  return std::is_same_v<Stored, Float16> && args.row_scales != nullptr;
}

// Scales rows in place, each by one block.
template <typename Stored, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    scale_each_row(const ScaleRowsArgs args) {
  const Compute<Stored> shared = static_cast<Compute<Stored>>(load_scalar(args.factor));
  if (shared == 1 && !has_row_scales<Stored>(args)) return;
  const int64_t columns = args.gradient.columns;
  for (int64_t index = blockIdx.x; index < args.gradient.rows; index += gridDim.x) {
    Stored* row = args.gradient.row<Stored>(index);
    const Compute<Stored> factor = factor_of_row<Stored>(args, shared, index);
    int64_t column = int64_t{threadIdx.x} * kCount;
    for (; column + kCount <= columns; column += kThreads * kCount) {
      Stored loaded[kCount];
      load_mutable(row + column, loaded);
      store_scaled(loaded, factor, row + column);
    }
    for (; column < columns; ++column) {
      const Stored last[] = {row[column]};
      store_scaled(last, factor, row + column);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers
// ---------------------------------------------------------------------------------------------------------------------

bool is_aligned_to_16(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

template <typename From, typename To>
cudaError_t launch_scale(const ScaleArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  constexpr int kVector = kVectorElements<From>;
  const bool aligned = is_aligned_to_16(args.gradient) && is_aligned_to_16(args.out);
  const int64_t a_block = int64_t{kThreads} * kVectorsAtOnce * (aligned ? kVector : 1);
  const int64_t blocks = std::min<int64_t>((args.count + a_block - 1) / a_block,
                                           device.multiprocessors * kBlocksPerMultiprocessor);
  const auto kernel = aligned ? scale_elements<From, To, kVector> : scale_elements<From, To, 1>;
  return launch(kernel, blocks, kThreads, 0, stream, args);
}

cudaError_t launch_scale(const ScaleArgs& args, cudaStream_t stream) {
  return dispatch_floating(args.dtype, [&](auto from) {
    using From = TypeOf<decltype(from)>;
    return dispatch_gradient<From>(args.out_dtype, [&](auto to) {
      return launch_scale<From, TypeOf<decltype(to)>>(args, stream);
    });
  });
}

bool rows_are_aligned(const LogitsMatrix& rows, int64_t element_bytes) {
  return is_aligned_to_16(rows.data) && rows.row_stride * element_bytes % 16 == 0 &&
         rows.block_stride * element_bytes % 16 == 0;
}

template <typename Stored>
cudaError_t launch_scale_rows(const ScaleRowsArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int64_t blocks =
      std::min<int64_t>(args.gradient.rows, device.multiprocessors * kBlocksPerMultiprocessor);
  const auto kernel = rows_are_aligned(args.gradient, sizeof(Stored))
                          ? scale_each_row<Stored, kVectorElements<Stored>>
                          : scale_each_row<Stored, 1>;
  return launch(kernel, blocks, kThreads, 0, stream, args);
}

}  // namespace

const char* scale(const ScaleArgs& args, CUstream_st* stream) {
  if (args.count == 0) return nullptr;
  return error_text(launch_scale(args, stream));
}

const char* scale_rows(const ScaleRowsArgs& args, CUstream_st* stream) {
  if (args.gradient.rows == 0 || args.gradient.columns == 0) return nullptr;
  return error_text(dispatch_floating(args.gradient.dtype, [&](auto stored) {
    return launch_scale_rows<TypeOf<decltype(stored)>>(args, stream);
  }));
}

}  // namespace ipo_ext::cuda
