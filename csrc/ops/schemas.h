// The schema of every operator: operands, the scaling of logits, the loss's inputs, its settings,
// flags, always in this order. The groups are those of ops/arguments.h and math/settings.h.
#pragma once

#include "ops/arguments.h"

// A group's part of a schema, behind the operands.
#define IPO_EXT_ARGUMENT(schema, Type, name) ", " schema " " #name
#define LOGIT_SCALING IPO_EXT_LOGIT_SCALING(IPO_EXT_ARGUMENT)
#define LOSS_INPUTS IPO_EXT_LOSS_INPUTS(IPO_EXT_ARGUMENT)
#define LOSS_SETTINGS IPO_EXT_LOSS_SETTINGS(IPO_EXT_ARGUMENT)
#define COMPONENTS \
  IPO_EXT_COMPONENT_INPUTS(IPO_EXT_ARGUMENT) IPO_EXT_COMPONENT_SETTINGS(IPO_EXT_ARGUMENT)
#define METRICS ", Tensor means, Tensor sums, Tensor extremes"

namespace ipo_ext::schemas {

// -------------------------------------------------------------------------------------------------
// From log-probabilities
// -------------------------------------------------------------------------------------------------

// To rules on sequences, without cu_seqlens all tokens are one.
inline constexpr const char* ipo_loss = "(Tensor trainer_logprobs" LOSS_INPUTS LOSS_SETTINGS
                                        ", bool with_gradient) "
                                        "-> (Tensor loss, Tensor gradient" METRICS ")";

// The same with other objectives beside it, for the tokens of their own weights.
inline constexpr const char* component_loss =
    "(Tensor trainer_logprobs" LOSS_INPUTS LOSS_SETTINGS COMPONENTS
    ", bool with_gradient) "
    "-> (Tensor loss, Tensor gradient" METRICS ", Tensor component_means)";

// What score centering adds to the loss, and its gradient by trainer_mask_logprobs. `replayed` says
// which tokens have a term; None: all.
inline constexpr const char* score_centering =
    "(Tensor trainer_mask_logprobs, Tensor trainer_logprobs" LOSS_INPUTS LOSS_SETTINGS
    ", Tensor inference_mask_logprobs, Tensor? replayed, bool with_gradient) "
    "-> (Tensor loss, Tensor gradient, Tensor sums)";

// Active tokens by the bin of their log-ratio.
inline constexpr const char* log_ratio_histogram =
    "(Tensor trainer_logprobs, Tensor inference_logprobs, Tensor loss_mask, Tensor? cu_seqlens) "
    "-> Tensor";

// What rules on sequences look at, of each segment, in rows (math/sequence_rules.h).
inline constexpr const char* sequence_statistics =
    "(Tensor trainer_logprobs" LOSS_INPUTS LOSS_SETTINGS ") -> (Tensor sums, Tensor extremes)";

// Rows of segments that are pieces of sequences become rows of the sequences'. The first half of
// the rows of extremes are the smallest.
inline constexpr const char* fold_segments =
    "(Tensor sums, Tensor extremes, Tensor sequence_ids, SymInt num_sequences) "
    "-> (Tensor sums, Tensor extremes)";

inline constexpr const char* metric_means =
    "(Tensor sums, Tensor extremes, bool float64) -> Tensor";

// -------------------------------------------------------------------------------------------------
// From logits
// -------------------------------------------------------------------------------------------------

inline constexpr const char* ipo_loss_from_logits =
    "(Tensor logits, Tensor labels" LOGIT_SCALING LOSS_INPUTS LOSS_SETTINGS
    ", Tensor? inference_mask_logprobs, bool with_gradient) "
    "-> (Tensor loss, Tensor gradient, Tensor logprobs, Tensor entropy" METRICS
    ", Tensor row_scales)";

// The same, the gradient written over the logits.
inline constexpr const char* ipo_loss_from_logits_ =
    "(Tensor(a!) logits, Tensor labels" LOGIT_SCALING LOSS_INPUTS LOSS_SETTINGS
    ", Tensor? inference_mask_logprobs) "
    "-> (Tensor loss, Tensor logprobs, Tensor entropy" METRICS ", Tensor row_scales)";

inline constexpr const char* token_logprobs =
    "(Tensor logits, Tensor labels" LOGIT_SCALING
    ", Tensor? candidates) "
    "-> (Tensor logprobs, Tensor entropy, Tensor softmax_stats, Tensor candidate_logprobs)";

inline constexpr const char* token_logprobs_backward =
    "(Tensor logits, Tensor labels" LOGIT_SCALING
    ", Tensor? candidates, Tensor entropy, Tensor softmax_stats, Tensor grad_logprobs, "
    "Tensor grad_entropy, Tensor? grad_candidates) -> Tensor";

// -------------------------------------------------------------------------------------------------
// Steps of the loss from hidden states, whose chunk loop is Python's
// -------------------------------------------------------------------------------------------------

// 0 in the one element of `fault` where all is well. On the CPU a fault raises instead. `replayed`
// says which tokens replay the sampler's support; without an element where there is no such mask.
inline constexpr const char* find_faults =
    "(Tensor labels, Tensor? candidates, Tensor? temperature, Tensor? sampling_mask, "
    "Tensor? loss_mask, Tensor? cu_seqlens, Tensor? normalizer, SymInt columns, "
    "SymInt max_active) "
    "-> (Tensor fault, Tensor replayed)";

// Log-probabilities and entropies of a chunk's rows, whose faults have been looked for, and the
// gradient, which may be narrower than the logits and lie over them. Neither cu_seqlens nor
// rules on sequences: they would have to see all rows first.
inline constexpr const char* chunk_logprobs_and_gradient =
    "(Tensor logits, Tensor labels" LOGIT_SCALING LOSS_INPUTS LOSS_SETTINGS
    ", Tensor fault, Tensor(a!)? gradient, Tensor(b!)? row_scales) "
    "-> (Tensor logprobs, Tensor entropy)";

// Of all rows, and the derivatives by their log-probabilities where wanted.
inline constexpr const char* loss_and_metrics =
    "(Tensor logprobs, Tensor? entropy, Tensor? replayed" LOSS_INPUTS LOSS_SETTINGS
    ", Tensor fault, bool with_gradient) "
    "-> (Tensor loss, Tensor gradient" METRICS ")";

// token_logprobs and its backward pass for a chunk's rows, whose faults have been looked for; the
// gradient may be narrower than the logits and lie over them.
inline constexpr const char* chunk_logprobs =
    "(Tensor logits, Tensor labels" LOGIT_SCALING
    ", Tensor? candidates, Tensor fault) "
    "-> (Tensor logprobs, Tensor entropy, Tensor softmax_stats, Tensor candidate_logprobs)";

inline constexpr const char* chunk_logprobs_backward =
    "(Tensor logits, Tensor labels" LOGIT_SCALING
    ", Tensor? candidates, Tensor entropy, Tensor softmax_stats, Tensor grad_logprobs, "
    "Tensor grad_entropy, Tensor? grad_candidates, Tensor fault, Tensor(a!) gradient, Tensor(b!)? "
    "row_scales) -> ()";

// -------------------------------------------------------------------------------------------------
// Vocabulary parallel: logits have the columns of one rank, from first_column on; labels are tokens
// -------------------------------------------------------------------------------------------------

// [rows, 4] fp64, what ranks gather of a chunk's rows. Raises for no value of a tensor, on no
// device: all ranks take part in what follows.
inline constexpr const char* chunk_packets =
    "(Tensor logits, Tensor labels" LOGIT_SCALING ", Tensor fault, SymInt first_column) -> Tensor";

// Results of whole rows from all ranks' packets, [ranks, rows, 4] in any shape. A fault of any
// rank, or a label that is not of exactly one, is added to `fault`; on the CPU it raises.
inline constexpr const char* gather_packets =
    "(Tensor packets, Tensor labels, Tensor? temperature, Tensor(a!) fault, bool float64) "
    "-> (Tensor logprobs, Tensor entropy, Tensor softmax_stats)";

// chunk_logprobs_backward for the columns of one rank.
inline constexpr const char* chunk_shard_backward =
    "(Tensor logits, Tensor labels" LOGIT_SCALING
    ", Tensor entropy, Tensor softmax_stats, Tensor grad_logprobs, Tensor grad_entropy, "
    "Tensor fault, SymInt first_column, Tensor(a!) gradient, Tensor(b!)? row_scales) -> ()";

// -------------------------------------------------------------------------------------------------
// Scaling of a saved gradient
// -------------------------------------------------------------------------------------------------

inline constexpr const char* scale_ = "(Tensor(a!) gradient, Tensor factor) -> ()";

// The same for an fp16 gradient whose rows are stored over scales of their own, by which it
// multiplies too.
inline constexpr const char* scale_rows_ =
    "(Tensor(a!) gradient, Tensor factor, Tensor row_scales) -> ()";

// The same to `out`, which may be fp16 or bf16 for an fp32 gradient: rounded once.
inline constexpr const char* scale_into = "(Tensor gradient, Tensor factor, Tensor(a!) out) -> ()";

}  // namespace ipo_ext::schemas

#undef METRICS
#undef COMPONENTS
#undef LOSS_SETTINGS
#undef LOSS_INPUTS
#undef LOGIT_SCALING
#undef IPO_EXT_ARGUMENT
