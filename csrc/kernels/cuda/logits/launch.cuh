// Tier 2's launchers for one dtype of logits. Each dtype is compiled in a file of its own,
// logits_<dtype>.cu, side by side with the others.
#pragma once

#include "kernels/cuda/logits/storage.cuh"

namespace ipo_ext::cuda {

template <typename Stored>
RowSharing sharing_of(const LogitsArgs& args, const Device& device) {
  constexpr int kColumns = kGroupColumns<Stored>;
  const LogitsMatrix& logits = args.logits;
  RowsToShare rows = {logits.rows, logits.columns, kColumns, sizeof(Compute<Stored>),
                      kHeldGroups<Stored>};
  rows.capped = args.softcap != 0;
  // A narrower gradient may lie over columns that another block has yet to read.
  rows.apart = args.gradient.data == nullptr || args.gradient.dtype == logits.dtype;
  rows.reduces = !is_backward(args);
  return share_rows(rows, device);
}

template <typename Stored>
size_t part_bytes(const LogitsArgs& args, const Device& device) {
  return args.logits.rows * sharing_of<Stored>(args, device).parts *
         sizeof(RowPart<Compute<Stored>>);
}

// What `args` asks for, of logits of that dtype.
template <typename Stored>
cudaError_t launch_logits(const LogitsArgs& args, cudaStream_t stream);

}  // namespace ipo_ext::cuda
