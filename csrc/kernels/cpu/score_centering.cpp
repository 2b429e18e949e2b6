// Score centering on the CPU: tokens in parallel, then their terms in order.
#include "kernels/score_centering.h"

#include "kernels/one_thread.h"

namespace ipo_ext::cpu {
namespace {

constexpr int64_t kWorkOfId = 64;  // an id costs about as much as so many elements of a row

template <typename E>
void run(const CenteringArgs& args, const ParallelFor& parallel_for) {
  const auto params = centering_params_for<E>(args);
  parallel_for(args.segments.tokens, rows_per_task(kWorkOfId * args.width),
               [&](int64_t begin, int64_t end) {
                 for (int64_t token = begin; token < end; ++token)
                   center_token<E>(args, params, token, OneThread());
               });
  double total = 0;
  for (int64_t s = 0; s < args.segments.count; ++s) {
    double sum = 0;
    for (int64_t i = args.segments.begin(s); i < args.segments.begin(s + 1); ++i)
      sum += args.terms[i];
    store_centering_sum<E>(args, s, sum);
    total += sum;
  }
  store_centering_loss<E>(args, total);
}

}  // namespace

void score_centering(const CenteringArgs& args, const ParallelFor& parallel_for) {
  dispatch_compute(args.compute_dtype,
                   [&](auto compute) { run<TypeOf<decltype(compute)>>(args, parallel_for); });
}

}  // namespace ipo_ext::cpu
