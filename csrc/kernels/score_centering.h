// Score centering beside a loss: a term for each token over the ids that the sampler drew it from,
// and its gradient by the trainer's log-probabilities of them. What both backends do alike.
#pragma once

#include <cstdint>

#include "kernels/inputs.h"
#include "kernels/parallel_for.h"
#include "kernels/segments.h"
#include "math/metrics.h"
#include "math/score_centering.h"
#include "math/token_loss.h"

struct CUstream_st;

namespace ipo_ext {

struct CenteringArgs {
  DType compute_dtype;                 // kFloat32 or kFloat64; below "compute"
  TokenInput trainer_mask_logprobs;    // [tokens, width]
  TokenInput inference_mask_logprobs;  // [tokens, width]; not finite where a token has fewer ids
  int64_t width;
  TokenInput trainer_logprobs;       // [tokens]
  TokenInput inference_logprobs;     // [tokens]
  TokenInput advantages;             // [tokens]
  TokenInput loss_weights;           // [tokens] or null
  const uint8_t* loss_mask;          // [tokens] booleans
  const uint8_t* replays = nullptr;  // [tokens] booleans: which have a term; null: all
  ScalarInput normalizer;
  Segments segments;
  math::CenteringParams<double> params = {};  // inv_normalizer is the kernels' to fill
  const int32_t* fault = nullptr;             // [1], CUDA: not 0 poisons the gradient; or null

  void* gradient = nullptr;  // [tokens, width] gradient_dtype; null where none is wanted
  DType gradient_dtype;      // kFloat32 or kFloat64
  double* terms;             // [tokens]; workspace
  double* sums;              // [segments] of the terms
  void* means = nullptr;     // [segments] compute, of active tokens; or null
  const double* active;      // [segments] how many those are; where there are means
  void* loss;                // [] compute
  bool adds_to_loss;         // else it is overwritten
};

template <typename E>
IPO_HOST_DEVICE math::CenteringParams<E> centering_params_for(const CenteringArgs& args) {
  return {static_cast<E>(args.params.largest_difference), static_cast<E>(args.params.log_ratio_cap),
          static_cast<E>(args.params.adv_tau),
          static_cast<E>(math::inverse_normalizer<E>(load_scalar(args.normalizer)))};
}

// Returns what the terms of a token are multiplied by: 0 for one that has none.
template <typename E>
IPO_HOST_DEVICE E centering_factor(const CenteringArgs& args, int64_t token, E adv_tau) {
  const E log_ratio = load_token<E>(args.trainer_logprobs, token, 0) -
                      load_token<E>(args.inference_logprobs, token, 0);
  const E weight = load_token<E>(args.loss_weights, token, 1);
  const bool replays = args.replays == nullptr || args.replays[token] != 0;
  const bool pays =
      (args.loss_mask[token] != 0) & replays & math::is_finite(log_ratio) & (weight != 0);
  return pays ? adv_tau * load_token<E>(args.advantages, token, 0) * weight : E(0);
}

IPO_HOST_DEVICE void store_centering_gradient(const CenteringArgs& args, int64_t index,
                                              double value) {
  if (args.gradient_dtype == DType::kFloat64) {
    static_cast<double*>(args.gradient)[index] = value;
  } else {
    static_cast<float*>(args.gradient)[index] = static_cast<float>(value);
  }
}

#ifdef __CUDACC__
#pragma nv_exec_check_disable  // the threads are the backend's
#endif
// Stores a token's term and its gradient by the trainer's log-probabilities. A token without a term
// is not read beyond its own inputs.
template <typename E, typename Threads>
IPO_HOST_DEVICE void center_token(const CenteringArgs& args, const math::CenteringParams<E>& params,
                                  int64_t token, const Threads& threads) {
  const E factor = centering_factor<E>(args, token, params.adv_tau);
  const E poison = params.inv_normalizer * E(0);  // 0, or NaN
  double sum = 0;
  for (int64_t i = threads.first(); i < args.width; i += threads.count()) {
    const int64_t index = token * args.width + i;
    E weight = 0;
    if (factor != 0) {
      const E trainer = load_token<E>(args.trainer_mask_logprobs, index, 0);
      const E sampler = load_token<E>(args.inference_mask_logprobs, index, 0);
      weight = math::centering_weight(trainer, sampler, params);
      if (weight != 0) sum += static_cast<double>(weight * trainer);
    }
    if (args.gradient == nullptr) continue;
    const E gradient = weight != 0 ? factor * weight * params.inv_normalizer : poison;
    store_centering_gradient(args, index, gradient);
  }
  sum = threads.sum(sum);
  if (threads.first() == 0) args.terms[token] = factor != 0 ? factor * sum : 0;
}

template <typename E>
IPO_HOST_DEVICE void store_centering_sum(const CenteringArgs& args, int64_t s, double sum) {
  args.sums[s] = sum;
  if (args.means != nullptr)
    static_cast<E*>(args.means)[s] = static_cast<E>(math::ratio_or_zero(sum, args.active[s]));
}

// Stores the loss of all terms, from their sum.
template <typename E>
IPO_HOST_DEVICE void store_centering_loss(const CenteringArgs& args, double sum) {
  E& loss = *static_cast<E*>(args.loss);
  const double inverse = math::inverse_normalizer<E>(load_scalar(args.normalizer));
  const double centering = inverse == 0 ? 0 : sum * inverse;
  loss = static_cast<E>(args.adds_to_loss ? loss + centering : centering);
}

namespace cpu {

void score_centering(const CenteringArgs& args, const ParallelFor& parallel_for);

}  // namespace cpu

namespace cuda {

// Makes three launches on `stream` without synchronising with the host. A cu_seqlens that is no
// partition makes the loss and the gradient NaN.
const char* score_centering(const CenteringArgs& args, CUstream_st* stream);

}  // namespace cuda
}  // namespace ipo_ext
