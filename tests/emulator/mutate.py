"""Breaks the real kernels, one way at a time in a scratch copy, and demands that the tests notice.

`python -m tests.emulator.mutate [NAME ...]` exits 1 if the tests that a mutation names stay green,
or if they or the text that it replaces are no longer there. With `--one-in N` only every Nth is
run, which ones changes from day to day; the texts and the tests of all are looked for.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import itertools
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.emulator import build, operators
from tests.support.building import BuildError

WORKERS = 2


def tests_in(file: str) -> Callable[..., tuple[str, ...]]:
    """The node ids of tests of a file, by their names."""
    return lambda *names: tuple(f"tests/{file}::{name}" for name in names)


from_logprobs = tests_in("loss/test_from_logprobs.py")
tame_tokens = tests_in("loss/test_tame_tokens.py")
properties = tests_in("loss/test_properties.py")
mask_rules = tests_in("loss/test_mask_rules.py")
policy_forms = tests_in("loss/test_policy_forms.py")
rollout_rule = tests_in("loss/test_rollout_rule.py")
sequence_rules = tests_in("loss/test_sequence_rules.py")
from_logits = tests_in("loss/test_from_logits.py")
logits_paths = tests_in("loss/test_logits_paths.py")
far_logits = tests_in("loss/test_far_logits.py")
scale = tests_in("loss/test_scale.py")
components = tests_in("loss/test_components.py")
replay = tests_in("loss/test_replay.py")
candidates = tests_in("loss/test_candidates.py")
centering = tests_in("loss/test_score_centering.py")
histogram = tests_in("loss/test_histogram.py")
context_parallel = tests_in("pytorch/test_context_parallel.py")
packets = tests_in("loss/test_row_packets.py")

AROUND_TILES = from_logprobs(
    "test_matches_the_reference_around_tiles",
    "test_long_and_short_segments_matches_the_reference_around_tiles",
    "test_every_memory_case_matches_the_reference",
)
LONG_SEGMENTS = from_logprobs("test_long_and_short_segments_matches_the_reference_around_tiles")
ANOTHER_TOKEN = tame_tokens("test_a_round_with_another_token_is_what_its_tokens_are")


AROUND_BLOCK_TILES = (
    *from_logprobs("test_fp64_matches_the_reference_around_tiles"),
    *components("test_all_together_are_the_sum_of_each"),
)


@dataclasses.dataclass(frozen=True)
class Mutation:
    name: str
    file: str  # below csrc
    text: str
    replacement: str
    tests: tuple[str, ...] = AROUND_TILES  # those that must notice, as node ids


LOSS_ARGS = "kernels/ipo_loss.h"
LOSS_LAUNCH = "kernels/cuda/ipo_loss/ipo_loss.cu"
TILES = "kernels/cuda/ipo_loss/tiles.cuh"
WARP_TILES = "kernels/cuda/ipo_loss/warp_tiles.cuh"
TOKENS = "kernels/cuda/ipo_loss/tokens.cuh"
LOSS_SEGMENTS = "kernels/cuda/ipo_loss/segments.cuh"
FINISH = "kernels/cuda/ipo_loss/finish.cuh"
SEQUENCES = "kernels/cuda/ipo_loss/sequences.cuh"
REDUCE = "kernels/cuda/common/reduce.cuh"
SEGMENTS = "kernels/segments.h"
EXPONENTIAL = "math/exponential.h"
LOSS = "math/token_loss.h"
RULES = "math/mask_rules.h"
SEQUENCE_RULES = "math/sequence_rules.h"
COMPONENTS = "math/components.h"
COMPONENT_TILES = "kernels/cuda/ipo_loss/components.cuh"
METRICS = "math/metrics.h"
LANES = "math/lanes.h"
LOGITS = "kernels/cuda/logits/kernels.cuh"
PASSES = "kernels/cuda/logits/passes.cuh"
RESIDENT = "kernels/cuda/logits/resident_row.cuh"
SUMS = "kernels/cuda/logits/thread_sums.cuh"
LOGIT_TERMS = "kernels/cuda/logits/terms.cuh"
ROW_STORAGE = "kernels/cuda/logits/storage.cuh"
ROWS = "kernels/logits.h"
SLICE = "kernels/cuda/logits/slice.cuh"
CLUSTER = "kernels/cuda/common/cluster.cuh"
TILE_SUMS = "kernels/cuda/ipo_loss/tile_sums.cuh"
SCALE = "kernels/cuda/scale.cu"
SUPPORT = "kernels/support.h"
SUPPORT_TERMS = "math/support.h"
SUPPORT_KERNELS = "kernels/cuda/support.cu"
WARP = "kernels/cuda/common/warp.cuh"
BINS = "math/histogram.h"
HISTOGRAM_KERNELS = "kernels/cuda/histogram.cu"
CENTERING = "kernels/score_centering.h"
CENTERING_TERMS = "math/score_centering.h"
CENTERING_KERNELS = "kernels/cuda/score_centering.cu"
PACKET = "math/row_packet.h"
SOFTMAX = "math/softmax_row.h"
SHARDS = "kernels/shards.h"
REPLAY = "ops/logits.h"
LOSS_CALL = "ops/ipo_loss.h"

MUTATIONS = (
    Mutation(
        "tail-one-short",
        TILES,
        "i < span.end; ++i",
        "i + 1 < span.end; ++i",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "tail-one-long",
        TILES,
        "index + kCount <= size) {",
        "index + kCount <= size + 1) {",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "lost-vector-remainder",
        TILES,
        "kCount == 1 || index + kCount <= size",
        "true",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "wrong-slot",
        TILES,
        "slot = Segments::slot(tile, segment);",
        "slot = Segments::slot(tile, 0);",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "skipped-segment",
        TILES,
        "if (end <= begin) continue;",
        "if (end <= begin + 1) continue;",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "wrong-stride-of-tokens",
        TILES,
        "round += kRound",
        "round += 2 * kRound",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "wrong-stride-of-tiles",
        FINISH,
        "< segments.num_tiles(); tile += kFinishThreads)",
        "< segments.num_tiles(); tile += 2 * kFinishThreads)",
    ),
    Mutation(
        "wrong-stride-of-slots",
        FINISH,
        "slot += stride * kSlotsAtOnce",
        "slot += 2 * stride * kSlotsAtOnce",
    ),
    Mutation(
        "wrong-search",
        LOSS_SEGMENTS,
        "__syncthreads_count(begun);",
        "__syncthreads_count(begun) + 1;",
        from_logprobs("test_matches_the_reference_per_segment"),
    ),
    Mutation(
        "wrong-mask-byte",
        TOKENS,
        "(mask >> (8 * i))",
        "(mask >> (4 * i))",
    ),
    Mutation(
        "wrong-gradient-index",
        TILES,
        "static_cast<E*>(args.gradient) + tile_begin + index;",
        "static_cast<E*>(args.gradient) + tile_begin + index / kCount;",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "unchecked-alignment",
        TOKENS,
        "is_aligned(args.loss_mask) &",
        "",
        from_logprobs(
            "test_one_misaligned_input_changes_no_gradient",
            "test_every_memory_case_matches_the_reference",
        ),
    ),
    Mutation(
        "single-fault-ignored",
        FINISH,
        "__syncthreads_count(invalid) > 0",
        "__syncthreads_count(invalid) > 1",
        properties("test_a_cu_seqlens_that_is_no_partition_raises_or_poisons"),
    ),
    Mutation(
        "dropped-barrier",
        REDUCE,
        "  __syncthreads();\n  if",
        "  if",
        components("test_same_bits_whatever_the_schedule"),
    ),
    Mutation(
        "components-of-the-first-tile",
        COMPONENT_TILES,
        "const int64_t tile = blockIdx.x;",
        "const int64_t tile = 0;",
        components("test_all_together_are_the_sum_of_each"),
    ),
    Mutation(
        "wrong-lane",
        REDUCE,
        "if (lane == 0)",
        "if (lane == 1)",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "wrong-shuffle-delta",
        REDUCE,
        "delta > 0",
        "delta > 1",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "lost-warp",
        REDUCE,
        "other = 1; other < kWarps",
        "other = 1; other < kWarps - 1",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "tokens-of-another-segment",
        TILES,
        "token.active &= span.has(index + i);",
        "",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "gradient-of-another-segment",
        TILES,
        "if (span.has(index + i)) gradient[i]",
        "if (span.has(index)) gradient[i]",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "warp-before-the-span",
        TILES,
        "return storage.holds[first + i];",
        "return true;",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "span-of-the-first-warp",
        TILES,
        "if (!span.meets(first_of_warp, kWarpSize * kCount)) continue;",
        "if (!span.meets(first_of_warp, kCount)) continue;",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "tile-before-the-barrier",
        TILES,
        "  }\n  __syncthreads();\n  if (warp == 0) {\n    double merged",
        "  }\n  if (warp == 0) {\n    double merged",
        from_logprobs("test_same_bits_whatever_the_schedule"),
    ),
    Mutation(
        "round-that-was-not-loaded",
        TILES,
        "loaded = false;",
        "loaded = true;",
        AROUND_BLOCK_TILES,
    ),
    Mutation(
        "vote-of-one-lane",
        WARP_TILES,
        "__all_sync(kFullWarp, tame)",
        "__any_sync(kFullWarp, tame)",
        ANOTHER_TOKEN,
    ),
    Mutation(
        "vote-of-some-tokens",
        WARP_TILES,
        "tame &= fabsf",
        "tame = fabsf",
        ANOTHER_TOKEN,
    ),
    Mutation(
        "tame-whatever-the-adv-tau",
        WARP_TILES,
        "params.adv_tau != 0 &&",
        "",
        tame_tokens("test_an_infinite_advantage_is_harmless_where_its_tau_is_zero"),
    ),
    Mutation(
        "tame-whatever-the-normalizer",
        WARP_TILES,
        "&& params.inv_normalizer != 0",
        "",
        tame_tokens("test_an_infinite_advantage_is_harmless_where_the_normalizer_is_zero"),
    ),
    Mutation(
        "tame-whatever-the-alignment",
        WARP_TILES,
        "vectorizable<kInputs>(all.loss) &&",
        "",
        from_logprobs(
            "test_one_misaligned_input_changes_no_gradient",
            "test_every_memory_case_matches_the_reference",
        ),
    ),
    Mutation(
        "tame-though-inactive",
        LOSS,
        "return select<T>(token.active, x, T{});",
        "return x;",
    ),
    Mutation(
        "round-before-the-span",
        WARP_TILES,
        "round >= begin && round_end <= tame_end",
        "round_end <= tame_end",
    ),
    Mutation(
        "round-beyond-the-span",
        WARP_TILES,
        "round >= begin && round_end <= tame_end",
        "round >= begin && round <= tame_end",
    ),
    Mutation(
        "tokens-beyond-the-span",
        WARP_TILES,
        "round_end < end ? round_end : end",
        "round_end",
    ),
    Mutation(
        "slot-of-another-warp",
        WARP_TILES,
        "store_span<kRules>(sums, workspace, Segments::slot(tile, segment))",
        "store_span<kRules>(sums, workspace, Segments::slot(tile, 0))",
    ),
    Mutation(
        "wrong-search-of-a-warp",
        LOSS_SEGMENTS,
        "const int64_t probe = lane * stride;",
        "const int64_t probe = lane;",
    ),
    Mutation(
        "loss-of-another-row",
        TILE_SUMS,
        "math::sum::kl_loss * kLanes",
        "math::sum::ratio * kLanes",
    ),
    Mutation(
        "plain-whatever-the-dtype",
        LOSS_LAUNCH,
        "&&args.tensor.dtype == DType::kFloat32",
        "",
    ),
    Mutation(
        "kernel-of-another-form",
        LOSS_LAUNCH,
        "form == PolicyForm::kForm)",
        "form != PolicyForm::kForm)",
        policy_forms("test_equals_the_reference", "test_any_tokens_around_the_bounds"),
    ),
    Mutation(
        "tame-ratio-of-half-the-exponent",
        EXPONENTIAL,
        "(C::kBias << C::kMantissaBits)",
        "((C::kBias - 1) << C::kMantissaBits)",
    ),
    Mutation(
        "slots-beyond-the-segment",
        FINISH,
        "slot + i < slots.end",
        "slot + i <= slots.end",
    ),
    Mutation(
        "long-segment-of-nobody",
        FINISH,
        "if (slots.are_many())",
        "if (!slots.are_many())",
        LONG_SEGMENTS,
    ),
    Mutation(
        "rows-of-the-last-warp",
        FINISH,
        "other < kFinishWarps; ++other",
        "other < kFinishWarps - 1; ++other",
        LONG_SEGMENTS,
    ),
    Mutation(
        "rows-before-the-barrier",
        FINISH,
        "kFinishWarps);\n  __syncthreads();",
        "kFinishWarps);",
        LONG_SEGMENTS,
    ),
    Mutation(
        "rows-of-the-next-segment",
        FINISH,
        "  __syncthreads();  // before the next use of rows\n",
        "",
        LONG_SEGMENTS,
    ),
    Mutation(
        "half-of-the-lanes",
        TILE_SUMS,
        "const T away = upper ?",
        "const T away = !upper ?",
    ),
    Mutation(
        "rows-in-the-wrong-order",
        TILE_SUMS,
        "segment.sums[row - kFirstCountRow] = value;",
        "segment.sums[kFirstExtremeRow - 1 - row] = value;",
    ),
    Mutation(
        "unclamped-segment",
        SEGMENTS,
        "value < 0 ? 0 : (value > tokens ? tokens : value)",
        "value",
        properties(
            "test_no_access_leaves_the_buffers[emulated-hostile-far-beyond-unaligned]",
            "test_no_access_leaves_the_buffers[emulated-hostile-many-wild-unaligned]",
        ),
    ),
    Mutation(
        "rollout-by-any-token",
        SEQUENCE_RULES,
        "smaller(select<T>(active, value, sequence.smallest[k])",
        "smaller(value",
        rollout_rule("test_an_inactive_token_drops_nothing", "test_any_case"),
    ),
    Mutation(
        "sequences-of-one-lane",
        SEQUENCES,
        "wanted);\n  }\n  return warp_reduce(sums, MergeSequences());",
        "wanted);\n  }\n  return sums;",
        rollout_rule("test_only_the_broken_sequences_are_dropped"),
    ),
    Mutation(
        "sequences-of-a-few-slots",
        SEQUENCES,
        "slot < end; slot += kWarpSize)",
        "slot < end; slot += end)",
        rollout_rule("test_a_long_sequence_is_dropped_whole"),
    ),
    Mutation(
        "statistics-of-a-segment-left-out",
        LOSS_LAUNCH,
        "if (error != cudaSuccess) return error;\n  return launch(ipo_loss_store_statistics",
        "return error;\n  return launch(ipo_loss_store_statistics",
        context_parallel("test_a_group_of_one_rank_judges_its_pieces_together"),
    ),
    Mutation(
        "negative-tokens-are-the-active-ones",
        LOSS_ARGS,
        "args.sums[statistics::kNegative * segments + s] = sequence.negative;",
        "args.sums[statistics::kNegative * segments + s] = sequence.active;",
        context_parallel("test_a_group_of_one_rank_judges_its_pieces_together"),
    ),
    Mutation(
        "a-piece-counts-as-its-sequence",
        SEQUENCE_RULES,
        "drops_all ? piece.active :",
        "drops_all ? sequence.active :",
        context_parallel("test_a_group_of_one_rank_judges_its_pieces_together"),
    ),
    Mutation(
        "smallest-of-a-sequence-are-its-largest",
        LOSS_ARGS,
        "sequence.smallest[k] = static_cast<E>(row(statistics::kNumSums + k));",
        "sequence.smallest[k] = static_cast<E>(row(statistics::kNumSums + 3 + k));",
        context_parallel("test_a_group_of_one_rank_judges_its_pieces_together"),
    ),
    Mutation(
        "folds-without-the-last-piece",
        LOSS_LAUNCH,
        "for (int64_t s = 0; s < args.segments; ++s)\n    if (args.sequence_ids",
        "for (int64_t s = 0; s + 1 < args.segments; ++s)\n    if (args.sequence_ids",
        context_parallel("test_metrics_of_pieces_are_their_sequences"),
    ),
    Mutation(
        "folds-extremes-the-wrong-way",
        LOSS_ARGS,
        "i < args.num_extremes / 2 ? FoldedRow::kSmallest : FoldedRow::kLargest",
        "i < args.num_extremes / 2 ? FoldedRow::kLargest : FoldedRow::kSmallest",
        context_parallel("test_metrics_of_pieces_are_their_sequences"),
    ),
    Mutation(
        "clips-counted-by-one-warp",
        TILES,
        "other < kWarps; ++other) total = merge",
        "other < 1; ++other) total = merge",
        policy_forms("test_bounded_ratios_are_counted"),
    ),
    Mutation(
        "clips-of-a-few-slots",
        FINISH,
        "return warp_reduce(bounded, MergeBoundCounts());",
        "return bounded;",
        policy_forms("test_bounded_ratios_are_counted"),
    ),
    Mutation(
        "positive-advantages-dropped-too",
        LOSS,
        "kept = Lanes<T>::and_not(kept, token.advantage < E(0));",
        "kept = Mask<T>{};",
        sequence_rules("test_equals_the_reference"),
    ),
    Mutation(
        "broken-sums-pass",
        SEQUENCE_RULES,
        "return !(within && is_finite(value));",
        "return !within;",
        sequence_rules("test_what_is_not_finite"),
    ),
    Mutation(
        "weight-without-its-cap",
        SEQUENCE_RULES,
        "const double weight = smaller(uncapped, rules.weight_cap);",
        "const double weight = uncapped;",
        sequence_rules("test_a_weight_that_overflows_drops_its_sequence"),
    ),
    Mutation(
        "rollout-pays-its-kl",
        LOSS,
        "kept = pays_kl = Mask<T>{}",
        "kept = Mask<T>{}",
        rollout_rule("test_equals_the_reference"),
    ),
    Mutation(
        "exclusive-bound",
        RULES,
        "token.active & (x >= low)",
        "token.active & (x > low)",
        properties("test_the_band_includes_its_ends_and_not_one_ulp_more"),
    ),
    Mutation(
        "swapped-bounds",
        RULES,
        "token.active & (x > high)",
        "token.active & (x < low)",
    ),
    Mutation(
        "one-sided-kl",
        RULES,
        "larger(forward, backward) > high",
        "forward > high",
        mask_rules(
            "test_equals_the_reference",
            "test_a_flip_is_a_proven_crossing",
            "test_any_tokens_equal_the_reference",
        ),
    ),
    Mutation(
        "everyone-pays-the-policy-gradient",
        LOSS,
        "pg.derivative = select<T>(kept, pg.derivative, T{})",
        "pg.derivative = pg.derivative",
        mask_rules(
            "test_equals_the_reference",
            "test_a_dropped_token_pays_the_kl_where_the_scope_says_so",
        ),
    ),
    Mutation(
        "multiplied-by-the-mask",
        LOSS,
        "select<T>(kept & weighs, push, T{})",
        "T(kept & weighs) * push",
        properties("test_garbage_in_masked_positions_changes_no_bit"),
    ),
    Mutation(
        "uncounted-infinity",
        METRICS,
        "loss.active & loss.finite;",
        "loss.active;",
        properties("test_a_batch_of_one_nonfinite_ratio_is_finite"),
    ),
    Mutation(
        "swapped-extreme",
        LANES,
        "largest = larger(select",
        "largest = smaller(select",
    ),
    Mutation(
        "lost-column-after-the-vectors",
        SLICE,
        "thread < before ? thread : thread + whole;",
        "thread < before ? thread : thread + whole + 1;",
        logits_paths("test_rows_of_every_length"),
    ),
    Mutation(
        "lost-vector",
        SLICE,
        "min(first_vector + per_slice, vectors) * kColumns",
        "min(first_vector + per_slice, vectors - 1) * kColumns",
        logits_paths("test_rows_of_every_length"),
    ),
    Mutation(
        "vectors-anywhere",
        SLICE,
        "reinterpret_cast<uintptr_t>(gradient + first) % kBytes == 0;",
        "true;",
        logits_paths("test_gradient_over_fp32_logits"),
    ),
    Mutation(
        "label-of-half-the-vectors",
        SLICE,
        "% kStride < kColumns;",
        "% kStride < kColumns / 2;",
        from_logits("test_matches_float64"),
    ),
    Mutation(
        "store-before-all-have-loaded",
        RESIDENT,
        "        if constexpr (sizeof(Gradient) < sizeof(Stored)) __syncthreads();",
        "",
        logits_paths("test_gradient_over_logits_on_every_device"),
    ),
    Mutation(
        "stream-before-all-have-loaded",
        PASSES,
        "__syncthreads();\n#pragma unroll\n    for (int i = 0; i < kBatch; ++i) {\n      E values",
        "\n#pragma unroll\n    for (int i = 0; i < kBatch; ++i) {\n      E values",
        logits_paths("test_backward_over_logits"),
    ),
    Mutation(
        "vectors-that-overlap",
        RESIDENT,
        "shared[(vector * kWords + i) * kWidth] = words[i]",
        "shared[(vector + i) * kWidth] = words[i]",
        logits_paths("test_every_cluster"),
    ),
    Mutation(
        "nothing-but-minus-infinity",
        SOFTMAX,
        "infinity() ? E(0) : row_max",
        "infinity() ? row_max : row_max",
        logits_paths("test_rows_at_the_edge_on_every_device"),
    ),
    Mutation(
        "splits-without-their-maximum",
        PASSES,
        "shifted(splits[split].sums, shift / temperature)",
        "shifted(splits[split].sums, 0 * shift / temperature)",
        logits_paths("test_every_device"),
    ),
    Mutation(
        "components-without-the-loss",
        COMPONENT_TILES,
        "static_cast<E*>(args.gradient)[i] += gradient;",
        "static_cast<E*>(args.gradient)[i] = gradient;",
        components("test_all_together_are_the_sum_of_each"),
    ),
    Mutation(
        "components-instead-of-the-loss",
        COMPONENT_TILES,
        "[i] += gradient;",
        "[i] = gradient;",
        components("test_all_together_are_the_sum_of_each"),
    ),
    Mutation(
        "distillation-of-another-bound",
        COMPONENTS,
        "params.low = E(0.2);",
        "params.low = E(0.25);",
        components("test_all_together_are_the_sum_of_each"),
    ),
    Mutation(
        "distillation-without-its-squares",
        COMPONENTS,
        "L::widen(ref_kl.pg_loss + ref_kl.kl_loss)",
        "L::widen(ref_kl.pg_loss)",
        components("test_caps_and_the_squared_log_ratio"),
    ),
    Mutation(
        "splits-without-their-scale",
        LOGITS,
        "      storage.scale = scale_of<E>(args, index);\n      finish_row",
        "      finish_row",
        logits_paths("test_every_device"),
    ),
    Mutation(
        "k2-without-its-half",
        SEQUENCE_RULES,
        "k == estimator::k2 ? 0.5 : 1",
        "1",
        sequence_rules("test_bounds_of_k2_are_exact"),
    ),
    Mutation(
        "rows-that-know-no-other-rule",
        ROWS,
        ": math::token_loss<math::Rules::kAny>(token, params)",
        ": math::token_loss<math::Rules::kDefault>(token, params)",
        logits_paths("test_every_rule_on_every_device"),
    ),
    Mutation(
        "cluster-that-has-not-started",
        LOGITS,
        "  cluster.wait();\n",
        "",
        logits_paths("test_persistent_pipelined_rows"),
    ),
    Mutation(
        "nobody-waits-for-what-was-sent",
        CLUSTER,
        "  storage.barrier.wait(phase);\n",
        "",
        logits_paths("test_persistent_pipelined_rows"),
    ),
    Mutation(
        "post-to-itself-alone",
        CLUSTER,
        "storage.barrier.send(mine, value, lane)",
        "storage.barrier.send(mine, value, cluster.rank)",
        logits_paths("test_persistent_pipelined_rows"),
    ),
    Mutation(
        "label-before-the-last-row-is-done",
        PASSES,
        "  if (threadIdx.x == 0) storage.scale = scale_of<E>(args, index);\n  before_sending();",
        "  if (threadIdx.x == 0) {\n    storage.scale = scale_of<E>(args, index);\n"
        "    storage.label = static_cast<int>(label);\n  }\n  before_sending();",
        logits_paths("test_persistent_pipelined_rows"),
    ),
    Mutation(
        "phase-of-the-first-row",
        LOGITS,
        "slice, cluster, phase++, row",
        "slice, cluster, 0, row",
        logits_paths("test_persistent_pipelined_rows"),
    ),
    Mutation(
        "next-row-over-this-one",
        LOGITS,
        "    if (label >= 0) row.receive();\n",
        "    if (next_label >= 0) Row::prefetch(slice_of(index + 1), storage);\n"
        "    if (label >= 0) row.receive();\n",
        logits_paths("test_persistent_pipelined_rows"),
    ),
    Mutation(
        "entropy-in-bits",
        SUMS,
        "sum_exp_x_ * terms_.kUnit",
        "sum_exp_x_ * (terms_.kUnit > 0)",
        logits_paths("test_rows_of_every_length"),
    ),
    Mutation(
        "offset-left-in-the-sums",
        SOFTMAX,
        "return {1 + factor * others, factor * (others_x + shift * others)};",
        "return sums;",
        far_logits("test_an_offset_costs_no_digits"),
    ),
    Mutation(
        "offset-left-in-the-gradient",
        ROW_STORAGE,
        "derivative.factor() * terms.unit()",
        "derivative.factor()",
        far_logits("test_an_offset_costs_no_digits"),
    ),
    Mutation(
        "maximum-among-the-others",
        SOFTMAX,
        "return {1 + factor * others,",
        "return {factor * sums.sum_exp,",
        far_logits("test_the_largest_alone_has_all"),
    ),
    Mutation(
        "saturated-row-like-others",
        SOFTMAX,
        "if (magnitude * scale < kFar)",
        "if (magnitude > 0)",
        far_logits("test_an_offset_costs_no_digits"),
    ),
    Mutation(
        "all-raised-to-the-maximum",
        LOGIT_TERMS,
        "fused_.saturated ? kNothing : lowest_pair()",
        "lowest_pair()",
        far_logits("test_an_offset_costs_no_digits"),
    ),
    Mutation(
        "infinity-times-zero",
        LOGIT_TERMS,
        "return kCanBound ? max_of_each_or_nan(word, lowest_pair_) : word;",
        "return word;",
        far_logits("test_at_any_temperature"),
    ),
    Mutation(
        "scale-without-its-rest",
        SCALE,
        "blockIdx.x == 0 && rest < args.count",
        "blockIdx.x == 1 && rest < args.count",
        scale(
            "test_scale_rounds_every_number_as_torch",
            "test_scale_into_a_narrower_dtype_rounds_once",
        ),
    ),
    Mutation(
        "scale-rows-without-their-rest",
        SCALE,
        "for (; column < columns; ++column)",
        "for (; column + 1 < columns; ++column)",
        scale("test_scale_of_rows_that_lie_apart"),
    ),
    Mutation(
        "scale-rows-one-round",
        SCALE,
        "index += gridDim.x",
        "index += args.gradient.rows",
        scale("test_scale_of_rows_goes_round_on_a_small_device"),
    ),
    Mutation(
        "scale-rows-aligned-by-their-first",
        SCALE,
        "rows.row_stride * element_bytes % 16 == 0",
        "true",
        scale("test_scale_of_rows_that_lie_apart"),
    ),
    Mutation(
        "rows-without-their-label-replay",
        SUPPORT,
        "has_label |= ids[i] != kNoId && ids[i] == label;",
        "has_label |= ids[i] != kNoId;",
        replay("test_a_row_that_does_not_contain_its_label_uses_the_whole_vocabulary"),
    ),
    Mutation(
        "ids-that-may-repeat",
        SUPPORT,
        "found |= ids[other] == ids[place];",
        "found |= 0;",
        replay("test_ids_that_break_the_contract"),
    ),
    Mutation(
        "ids-one-beyond-the-vocabulary",
        SUPPORT,
        "id < args.rows.logits.columns && !is_repeated",
        "id <= args.rows.logits.columns && !is_repeated",
        replay("test_ids_that_break_the_contract"),
    ),
    Mutation(
        "support-over-the-entropys-scale",
        SUPPORT,
        "math::fp16_scale(math::derivative_bound(all, entropy, inverse_temperature));",
        "before;",
        replay("test_a_fp16_gradient_beside_the_entropys"),
    ),
    Mutation(
        "infinite-entropy-added",
        SUPPORT,
        "math::is_finite(value) ? value : E(0);",
        "value;",
        replay("test_a_logit_outside_may_be_anything"),
    ),
    Mutation(
        "entropy-without-a-gradient-on-the-support",
        SUPPORT_TERMS,
        "if (of_row.grads.entropy == 0) return by_logprobs;",
        "if (of_row.grads.entropy != 2) return by_logprobs;",
        replay("test_blocks_match_float64"),
    ),
    Mutation(
        "support-of-one-lane",
        WARP,
        "return warp_all_reduce(value, [](double a, double b) { return a + b; });",
        "return value;",
        replay("test_matches_float64"),
    ),
    Mutation(
        "last-row-without-its-support",
        SUPPORT_KERNELS,
        "return row < args.rows.logits.rows ? row : -1;",
        "return row + 1 < args.rows.logits.rows ? row : -1;",
        replay("test_matches_float64"),
    ),
    Mutation(
        "candidates-of-no-sum",
        SUPPORT,
        "if (has_grads && id != kNoId)",
        "if (has_grads && id == kNoId)",
        candidates("test_match_float64"),
    ),
    Mutation(
        "candidates-outside-the-support",
        SUPPORT,
        "return !args.replays[row] || support_contains(args, row, id, place);",
        "return true;",
        candidates("test_match_float64"),
    ),
    Mutation(
        "candidates-over-the-scale-of-their-sum",
        SUPPORT,
        "if (factor != 1 && !passed.are_zero()) {",
        "if (factor > 1 && !passed.are_zero()) {",
        candidates("test_a_fp16_row_has_one_scale"),
    ),
    Mutation(
        "edges-in-the-nearer-bin",
        BINS,
        "- (C::kFirstEdge - 1);",
        "- C::kFirstEdge;",
        histogram("test_an_edge_belongs_to_the_bin_farther_from_0"),
    ),
    Mutation(
        "minus-zero-as-negative",
        BINS,
        "x < Element<T>(0) ? ~place : place;",
        "x <= Element<T>(0) ? ~place : place;",
        histogram("test_zeros_infinities_and_nan"),
    ),
    Mutation(
        "nan-in-a-bin",
        BINS,
        "return counted & (x == x) ? bin",
        "return counted ? bin",
        histogram("test_zeros_infinities_and_nan"),
    ),
    Mutation(
        "tokens-before-the-first-vector-left-out",
        HISTOGRAM_KERNELS,
        "if (vectors > 0 && begin + threadIdx.x < first)",
        "if (vectors > 1024 && begin + threadIdx.x < first)",
        histogram("test_spans_of_several_tiles"),
    ),
    Mutation(
        "tables-of-one-warp",
        HISTOGRAM_KERNELS,
        "for (int warp = 0; warp < kWarps; ++warp)",
        "for (int warp = 0; warp < 1; ++warp)",
        histogram("test_any_number_of_tokens"),
    ),
    Mutation(
        "many-spans-in-the-first",
        HISTOGRAM_KERNELS,
        "args.segments.containing(i), 1);",
        "args.segments.containing(begin), 1);",
        histogram("test_each_segment_has_its_own"),
    ),
    Mutation(
        "centered-beyond-the-trust-region",
        CENTERING_TERMS,
        "(difference <= params.largest_difference)",
        "(difference >= 0)",
        centering("test_adds_the_formula_of_each_active_token"),
    ),
    Mutation(
        "centered-without-a-cap",
        CENTERING_TERMS,
        "smaller(log_ratio, params.log_ratio_cap)",
        "log_ratio",
        centering("test_the_ratio_of_an_id_is_capped"),
    ),
    Mutation(
        "an-infinite-logprob-centered",
        CENTERING_TERMS,
        "is_finite(log_ratio) & (difference",
        "(difference",
        centering("test_an_id_without_a_finite_logprob_takes_no_part"),
    ),
    Mutation(
        "every-token-centered",
        CENTERING,
        "(args.loss_mask[token] != 0) & replays & math::is_finite(log_ratio)",
        "(args.loss_mask[token] != 0) & math::is_finite(log_ratio)",
        centering("test_only_replayed_tokens_have_a_term"),
    ),
    Mutation(
        "centered-whatever-the-log-ratio",
        CENTERING,
        "replays & math::is_finite(log_ratio) & (weight != 0)",
        "replays & (weight != 0)",
        centering("test_nothing_is_read_of_a_token_that_takes_no_part"),
    ),
    Mutation(
        "last-token-not-centered",
        CENTERING_KERNELS,
        "if (token < args.segments.tokens) center_token",
        "if (token + 1 < args.segments.tokens) center_token",
        centering("test_adds_the_formula_of_each_active_token"),
    ),
    Mutation(
        "counts-of-no-tokens-left-unwritten",
        LOSS_CALL,
        "{args.compute_dtype, true, replays",
        "{args.compute_dtype, replays != nullptr, replays",
        replay("test_the_counts_of_no_tokens_are_0"),
    ),
    Mutation(
        "centering-of-a-broken-partition",
        CENTERING_KERNELS,
        "invalid |= !args.segments.entry_is_valid(s);",
        "invalid |= false;",
        centering("test_a_broken_contract_raises_or_poisons_every_gradient"),
    ),
    Mutation(
        "candidates-of-rows-that-do-not-replay",
        SUPPORT,
        "const bool has_candidates = args.candidates != nullptr && !args.only_replayed;",
        "const bool has_candidates = args.candidates != nullptr;",
        centering("test_rows_that_do_not_replay_are_not_centered"),
    ),
    Mutation(
        "gradient-outside-the-support",
        REPLAY,
        "if (exists() && given.grad_entropy.data == nullptr) rows.args.active = args_.others;",
        "",
        replay("test_a_logit_outside_may_be_anything"),
    ),
    Mutation(
        "packets-that-vanish",
        PACKET,
        "if (shift < kVanishing<double> && packet.sum_exp >= 0) return {0, 0};",
        "",
        packets("test_a_part_that_vanishes_adds_nothing"),
    ),
    Mutation(
        "packets-largest-maximum",
        PACKET,
        "if (packet.row_max > row.row_max) row.row_max",
        "if (packet.row_max < row.row_max) row.row_max",
        packets("test_a_row_in_parts_is_the_row"),
    ),
    Mutation(
        "packets-in-another-order",
        PACKET,
        "shifted_packet(packets[rank * stride], row",
        "shifted_packet(packets[(ranks - 1 - rank) * stride], row",
        packets("test_rows_are_put_together_in_the_order_of_the_ranks"),
    ),
    Mutation(
        "packets-of-a-faulty-rank",
        PACKET,
        "packet.sum_exp <= kFault",
        "packet.sum_exp < kFault",
        packets("test_a_fault_of_one_rank_is_all_ranks"),
    ),
    Mutation(
        "packets-of-an-inactive-row",
        PACKET,
        "row.fault |= inactive > 0 && !row.inactive;",
        "",
        packets("test_ranks_agree_on_the_rows_that_take_part"),
    ),
    Mutation(
        "packets-owners",
        PACKET,
        "row.owners != 1 &&",
        "row.owners > 1 &&",
        packets("test_the_label_has_one_owner"),
    ),
    Mutation(
        "packets-of-infinite-rows",
        PACKET,
        " && row.row_max < kElsewhere;",
        ";",
        packets("test_the_label_has_one_owner"),
    ),
    Mutation(
        "shard-one-column-more",
        SHARDS,
        "label - args.first_column < args.rows.logits.columns;",
        "label - args.first_column <= args.rows.logits.columns;",
        packets("test_a_row_in_parts_is_the_row", "test_a_packet_says_what_it_says"),
    ),
    Mutation(
        "shard-splits-in-degrees",
        SHARDS,
        "(splits[split].row_max - row_max) / temperature;",
        "splits[split].row_max - row_max;",
        packets("test_long_rows"),
    ),
    Mutation(
        "shard-first-split-alone",
        SHARDS,
        "for (int64_t split = 1; split < args.splits; ++split)",
        "for (int64_t split = 1; split < 1; ++split)",
        packets("test_long_rows"),
    ),
    Mutation(
        "shard-inactive-results",
        SHARDS,
        "if (gathered.inactive) return fill_results(args.rows, row, E(0));",
        "",
        packets("test_a_row_in_parts_is_the_row"),
    ),
    Mutation(
        "shard-label-of-others",
        "ops/shards.h",
        "take_local_columns<Backend>(rows, first_column, rows.args.logits.columns);",
        "take_local_columns<Backend>(rows, first_column, 0);",
        packets("test_the_gradient_of_a_part"),
    ),
    Mutation(
        "shard-faults-unseen",
        "ops/shards.h",
        "  Backend::find_packet_faults(shard, labels);",
        "",
        packets("test_the_label_has_one_owner"),
    ),
    Mutation(
        "shard-without-splits",
        "kernels/cuda/logits/plan.h",
        "return std::max({to_keep, splits_of_row(work, device, 1), int64_t{1}});",
        "return to_keep;",
        packets("test_a_row_in_parts_is_the_row"),
    ),
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--one-in", type=int, default=1, metavar="N")
    asked = parser.parse_args(arguments)
    mutations = [m for m in MUTATIONS if not asked.names or m.name in asked.names]
    if gone := [m.name for m in mutations if occurrences(m) != 1]:
        print(f"[mutate] NOT APPLICABLE, their text does not occur once: {', '.join(gone)}")
        return 1
    if error := tests_that_are_gone(mutations):
        print(f"[mutate] NOT APPLICABLE, tests that they name are gone:\n{error}")
        return 1
    today = datetime.date.today().toordinal()
    mutations = mutations[today % asked.one_in :: asked.one_in]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scratches: queue.Queue[Path] = queue.Queue()
        for number in range(WORKERS):
            scratches.put(scratch_copy(Path(folder) / str(number)))
        done = itertools.count(1)

        def run(mutation: Mutation) -> bool:
            root = scratches.get()
            began = time.monotonic()
            verdict, caught = outcome(mutation, root)
            scratches.put(root)
            print(
                f"[mutate] {next(done)}/{len(mutations)} {mutation.name}: {verdict} "
                f"({time.monotonic() - began:.0f} s)",
                flush=True,
            )
            return caught

        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            caught = list(pool.map(run, mutations))
    print(f"[mutate] caught {sum(caught)} of {len(caught)} in {time.monotonic() - start:.0f} s")
    return 0 if all(caught) else 1


def occurrences(mutation: Mutation) -> int:
    return (build.ROOT / "csrc" / mutation.file).read_text().count(mutation.text)


def tests_that_are_gone(mutations: Iterable[Mutation]) -> str:
    """pytest's words for node ids that it does not find, if there are any."""
    tests = sorted({test for mutation in mutations for test in mutation.tests})
    done = pytest("--collect-only", *tests)
    return done.stdout + done.stderr if done.returncode else ""


def scratch_copy(root: Path) -> Path:
    """What build_operators reads, with the objects already compiled from it."""
    shutil.copytree(build.ROOT / "csrc", root / "csrc")
    shutil.copytree(build.ROOT / build.HARNESS, root / build.HARNESS)
    operators.build_operators()
    shutil.copytree(build.ROOT / "build/objects", root / "build/objects")
    return root


def outcome(mutation: Mutation, root: Path) -> tuple[str, bool]:
    file = root / "csrc" / mutation.file
    original = file.read_text()
    file.write_text(original.replace(mutation.text, mutation.replacement))
    try:
        library = operators.build_operators(root=root)
    except BuildError as error:
        return f"NOT APPLICABLE: it does not compile\n{error}", False
    finally:
        file.write_text(original)
    failure = first_failure(library, mutation.tests)
    return (f"caught by {failure}", True) if failure else ("SURVIVED", False)


def first_failure(library: Path, tests: Sequence[str]) -> str | None:
    """The first of the tests that fails with `library`; None if all pass."""
    environment = {
        **os.environ,
        "IPO_EXT_EMULATED_LIBRARY": str(library),
        "HYPOTHESIS_PROFILE": "ci",
        "OMP_NUM_THREADS": "1",
    }
    done = pytest("-x", *tests, env=environment)
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"a crash: signal {-done.returncode}"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode != 1 or not failed:
        raise RuntimeError(f"pytest: exit status {done.returncode}: {done.stdout}{done.stderr}")
    return failed[0].split(" ")[1].split("::")[-1]


def pytest(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "emulated"]
    return subprocess.run(
        [*command, *arguments], cwd=build.ROOT, capture_output=True, text=True, **options
    )


if __name__ == "__main__":
    sys.exit(main())
