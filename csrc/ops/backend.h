// The two backends behind one operator: where the kernels run, and what a contract fault does
// there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "kernels/histogram.h"
#include "kernels/ipo_loss.h"
#include "kernels/logits.h"
#include "kernels/scale.h"
#include "kernels/score_centering.h"
#include "kernels/shards.h"
#include "kernels/support.h"
#include "ops/tensors.h"

// Only CUDA builds of torch have it.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace ipo_ext {

struct CpuBackend {
  // Values of tensors can be looked at: a contract fault raises.
  static constexpr bool kFaultsRaise = true;

  static size_t workspace_bytes(const IpoLossArgs& args) { return cpu::workspace_bytes(args); }
  // The CPU walks all rows in one way.
  struct LaunchPlan {
    int64_t workspace_bytes = 0;
    int splits = 1;
  };
  static LaunchPlan make_plan(const LogitsArgs& args, const Tensor&) {
    if (args.mode != LogitsMode::kPartial) return {};
    return {args.logits.rows * static_cast<int64_t>(sizeof(math::RowStats<double>))};
  }

  static void ipo_loss(const IpoLossArgs& args, const Tensor&) {
    cpu::ipo_loss(args, parallel_for);
  }
  static void sequence_statistics(const SequenceStatisticsArgs& args, const Tensor&) {
    cpu::sequence_statistics(args, parallel_for);
  }
  static void fold_segments(const FoldArgs& args, const Tensor&) { cpu::fold_segments(args); }
  static void metric_means(const MetricMeansArgs& args, const Tensor&) { cpu::metric_means(args); }
  static void logits(const LogitsArgs& args, const LaunchPlan&, const Tensor&) {
    cpu::logits(args, parallel_for);
  }
  static void find_support(const SupportArgs& args, const Tensor&) {
    cpu::find_support(args, parallel_for);
  }
  static void read_support(const SupportArgs& args, const Tensor&) {
    cpu::read_support(args, parallel_for);
  }
  static void write_support(const SupportArgs& args, const Tensor&) {
    cpu::write_support(args, parallel_for);
  }
  static void replay_metrics(const ReplayMetricsArgs& args, const Tensor&) {
    cpu::replay_metrics(args);
  }
  static void finite_values(const FiniteArgs& args, const Tensor&) { cpu::finite_values(args); }
  static void histogram(const HistogramArgs& args, const Tensor&) {
    cpu::histogram(args, parallel_for);
  }
  static void score_centering(const CenteringArgs& args, const Tensor&) {
    cpu::score_centering(args, parallel_for);
  }
  static void local_columns(const ShardArgs& args, const Tensor&) {
    cpu::local_columns(args, parallel_for);
  }
  static void store_packets(const ShardArgs& args, const Tensor&) {
    cpu::store_packets(args, parallel_for);
  }
  static void find_packet_faults(const ShardArgs& args, const Tensor&) {
    cpu::find_packet_faults(args, parallel_for);
  }
  static void store_gathered_rows(const ShardArgs& args, const Tensor&) {
    cpu::store_gathered_rows(args, parallel_for);
  }
  static void scale(const ScaleArgs& args, const Tensor&) { cpu::scale(args, parallel_for); }
  static void scale_rows(const ScaleRowsArgs& args, const Tensor&) {
    cpu::scale_rows(args, parallel_for);
  }

 private:
  static void parallel_for(int64_t count, int64_t grain,
                           const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, count, grain, body);
  }
};

struct CudaBackend {
  // Looking would need a synchronisation: a contract fault makes the loss and every gradient NaN.
  static constexpr bool kFaultsRaise = false;

  static size_t workspace_bytes(const IpoLossArgs& args) { return cuda::workspace_bytes(args); }
  // By the device: few rows are split among as many blocks as it can run.
  static cuda::LaunchPlan make_plan(const LogitsArgs& args, const Tensor& on) {
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    if (on.is_cuda()) guard.emplace(on.get_device_index());
    cuda::LaunchPlan plan;
    const char* error = cuda::make_plan(args, plan);
    IPO_EXT_CHECK(error == nullptr, "ipo_ext::logits: no CUDA device: ", error);
    return plan;
  }

  static void ipo_loss(const IpoLossArgs& args, const Tensor& on) {
    check_launch("ipo_loss", on, [&](CUstream_st* stream) { return cuda::ipo_loss(args, stream); });
  }

  static void sequence_statistics(const SequenceStatisticsArgs& args, const Tensor& on) {
    check_launch("sequence_statistics", on,
                 [&](CUstream_st* stream) { return cuda::sequence_statistics(args, stream); });
  }

  static void fold_segments(const FoldArgs& args, const Tensor& on) {
    check_launch("fold_segments", on,
                 [&](CUstream_st* stream) { return cuda::fold_segments(args, stream); });
  }

  static void metric_means(const MetricMeansArgs& args, const Tensor& on) {
    check_launch("metric_means", on,
                 [&](CUstream_st* stream) { return cuda::metric_means(args, stream); });
  }

  static void find_faults(const LogitsArgs& args, const Tensor& on) {
    check_launch("find_faults", on,
                 [&](CUstream_st* stream) { return cuda::find_faults(args, stream); });
  }

  static void logits(const LogitsArgs& args, const cuda::LaunchPlan& plan, const Tensor& on) {
    check_launch("logits", on,
                 [&](CUstream_st* stream) { return cuda::logits(args, plan, stream); });
  }

  static void find_support(const SupportArgs& args, const Tensor& on) {
    check_launch("find_support", on,
                 [&](CUstream_st* stream) { return cuda::find_support(args, stream); });
  }

  static void read_support(const SupportArgs& args, const Tensor& on) {
    check_launch("read_support", on,
                 [&](CUstream_st* stream) { return cuda::read_support(args, stream); });
  }

  static void write_support(const SupportArgs& args, const Tensor& on) {
    check_launch("write_support", on,
                 [&](CUstream_st* stream) { return cuda::write_support(args, stream); });
  }

  static void replay_metrics(const ReplayMetricsArgs& args, const Tensor& on) {
    check_launch("replay_metrics", on,
                 [&](CUstream_st* stream) { return cuda::replay_metrics(args, stream); });
  }

  static void finite_values(const FiniteArgs& args, const Tensor& on) {
    check_launch("finite_values", on,
                 [&](CUstream_st* stream) { return cuda::finite_values(args, stream); });
  }

  static void histogram(const HistogramArgs& args, const Tensor& on) {
    check_launch("log_ratio_histogram", on,
                 [&](CUstream_st* stream) { return cuda::histogram(args, stream); });
  }

  static void score_centering(const CenteringArgs& args, const Tensor& on) {
    check_launch("score_centering", on,
                 [&](CUstream_st* stream) { return cuda::score_centering(args, stream); });
  }

  static void local_columns(const ShardArgs& args, const Tensor& on) {
    check_launch("local_columns", on,
                 [&](CUstream_st* stream) { return cuda::local_columns(args, stream); });
  }

  static void store_packets(const ShardArgs& args, const Tensor& on) {
    check_launch("store_packets", on,
                 [&](CUstream_st* stream) { return cuda::store_packets(args, stream); });
  }

  static void find_packet_faults(const ShardArgs& args, const Tensor& on) {
    check_launch("find_packet_faults", on,
                 [&](CUstream_st* stream) { return cuda::find_packet_faults(args, stream); });
  }

  static void store_gathered_rows(const ShardArgs& args, const Tensor& on) {
    check_launch("store_gathered_rows", on,
                 [&](CUstream_st* stream) { return cuda::store_gathered_rows(args, stream); });
  }

  static void scale(const ScaleArgs& args, const Tensor& on) {
    check_launch("scale", on, [&](CUstream_st* stream) { return cuda::scale(args, stream); });
  }

  static void scale_rows(const ScaleRowsArgs& args, const Tensor& on) {
    check_launch("scale", on, [&](CUstream_st* stream) { return cuda::scale_rows(args, stream); });
  }

 private:
  // Runs `launch` on the tensor's device and the caller's current stream there.
  template <typename Launch>
  static void check_launch(const char* op, const Tensor& on, const Launch& launch) {
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    void* stream = nullptr;
    if (on.is_cuda()) {
      guard.emplace(on.get_device_index());
      const auto status = aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream);
      IPO_EXT_CHECK(status == AOTI_TORCH_SUCCESS, "ipo_ext::", op, ": no current CUDA stream");
    }
    const char* error = launch(static_cast<CUstream_st*>(stream));
    IPO_EXT_CHECK(error == nullptr, "ipo_ext::", op, ": CUDA launch failed: ", error);
  }
};

}  // namespace ipo_ext
