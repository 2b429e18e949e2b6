// Prints how rows of logits are launched on an H200: one line for each length and dtype, for
// scripts/resource_report.py. Runs on the host.
#include <cstdio>

#include "kernels/cuda/logits/plan.h"
#include "kernels/cuda/logits/slice.cuh"

int main() {
  using namespace ipo_ext::cuda;
  const Device h200 = {90, 132, 227 << 10, 228 << 10, 1 << 10};
  for (const long columns : {32000, 65536, 128256, 151936, 200064, 262144}) {
    for (const int stored_bytes : {2, 4}) {
      const int register_vectors =
          stored_bytes == 2 ? kRegisterVectors<ipo_ext::BFloat16> : kRegisterVectors<float>;
      const LaunchPlan plan =
          plan_rows({8192, columns, 16 / stored_bytes, 4, register_vectors}, h200);
      std::printf("%ld %s %d %d %d %ld\n", columns, stored_bytes == 2 ? "bf16" : "fp32",
                  plan.cluster_blocks, plan.threads, plan.rows_per_cluster,
                  static_cast<long>(plan.shared_bytes));
    }
  }
}
