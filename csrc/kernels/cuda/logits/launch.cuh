// The plan and the launches for logits of one dtype. Each dtype is compiled in a file of its own,
// side by side with the others.
#pragma once

#include "kernels/cuda/logits/plan.h"
#include "kernels/cuda/logits/storage.cuh"

namespace ipo_ext::cuda {

template <typename Stored>
LaunchPlan plan_for(const LogitsArgs& args, const Device& device) {
  const LogitsMatrix& logits = args.logits;
  RowWork work = {logits.rows, logits.columns, kVectorElements<Stored>, sizeof(Compute<Stored>),
                  kRegisterVectors<Stored>};
  work.capped = args.softcap != 0;
  work.has_gradient = args.gradient.data != nullptr;
  // A narrower gradient may lie over columns that another block has yet to read.
  work.apart = !work.has_gradient || args.gradient.dtype == logits.dtype;
  work.reduces = !is_backward(args);
  work.is_partial = args.mode == LogitsMode::kPartial;
  LaunchPlan plan = plan_rows(work, device);
  plan.workspace_bytes = logits.rows * plan.splits * sizeof(RowStats<Compute<Stored>>);
  return plan;
}

// What `args` asks for, of logits of that dtype.
template <typename Stored>
cudaError_t launch_logits(const LogitsArgs& args, const LaunchPlan& plan, cudaStream_t stream);

}  // namespace ipo_ext::cuda
