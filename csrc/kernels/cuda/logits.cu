// Tier 2 on CUDA: a row of logits is read once and its gradient written once. The blocks of a
// cluster (one block before sm_90) hold the row in registers and shared memory between the three
// passes: maximum, exponentials and their sums, gradient. Exponentials are taken after the maximum,
// so there is one each; reductions run in a fixed order, so the bits are the same every run. No
// atomics, no host synchronisation.
#include <type_traits>

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/row_share.cuh"
#include "kernels/cuda/row_sharing.cuh"
#include "kernels/logits.h"

namespace ipo_ext::cuda {
namespace {

using namespace ipo_ext::math;

constexpr int kFaultThreads = 512;

// How a launch shares a row.
struct RowsArgs {
  LogitsArgs logits;
  int steps = 0;         // of a thread
  int shared_steps = 0;  // for which a block has shared memory
  int parts = 0;         // few rows: blocks that reduce one without being a cluster
  int stream_parts = 0;  // blocks that write the gradient of a row of which nothing is held
  int stream_steps = 0;  // of a thread of those
  int rows_in_turn = 0;  // of a cluster whose blocks hold rows in registers alone
};

// ---------------------------------------------------------------------------------------------------------------------
// Device helpers
// ---------------------------------------------------------------------------------------------------------------------

// A NaN loses.
struct Larger {
  template <typename E>
  __device__ __forceinline__ E operator()(E a, E b) const {
    return max(a, b);
  }
};

struct Plus {
  __device__ __forceinline__ int64_t operator()(int64_t a, int64_t b) const { return a + b; }
};

struct MergeRowSums {
  __device__ __forceinline__ RowSums operator()(const RowSums& a, const RowSums& b) const {
    return merge(a, b);
  }
};

// cap_logit where the kernel knows at compile time that there is no softcap.
template <bool kCapped, typename E>
__device__ __forceinline__ CappedLogit<E> cap(E logit, const LogitScale<E>& scale) {
  return cap_logit(logit, kCapped ? scale.softcap : E(0));
}

constexpr int kMostGroupColumns = kGroupColumns<BFloat16>;

// What every thread must know to write its part of a row's gradient.
template <typename E>
struct RowPlan {
  LogitScale<E> scale;
  E largest;
  RowDerivative<E> derivative;
  E factor;  // derivative.factor()
  E label;   // the derivative by the label's logit

  // By a logit that is not the label.
  template <bool kCapped>
  __device__ __forceinline__ E other(E logit) const {
    const CappedLogit<E> capped = cap<kCapped>(logit, scale);
    const RowTerm<E> term = row_term(capped.value, largest, scale.inverse_temperature);
    return derivative.other(term, capped.slope);
  }
};

template <bool kCapped, typename E>
__device__ __forceinline__ RowPlan<E> plan_of(const RowDerivative<E>& derivative,
                                              const LogitScale<E>& scale, E largest,
                                              E label_logit) {
  const CappedLogit<E> label = cap<kCapped>(label_logit, scale);
  const RowTerm<E> term = row_term(label.value, largest, scale.inverse_temperature);
  return {scale, largest, derivative, derivative.factor(), derivative.label(term, label.slope)};
}

// The maximum and the sums of a part of a row, and the label's logit, which must be read before any
// gradient is written.
template <typename E>
struct RowPart {
  E largest;
  E label_logit;
  RowSums sums;
};

// Of 16 bytes each: a step of a thread, as it is held.
template <typename Stored>
constexpr int kHeldWords = kGroupColumns<Stored> * sizeof(Compute<Stored>) / sizeof(uint4);

template <typename Stored, int kThreads, int kAside = kHeldGroups<Stored> * kHeldWords<Stored>>
struct RowStorage {
  using E = Compute<Stored>;
  ClusterReduceStorage<E, kThreads> largest;
  ClusterReduceStorage<RowSums, kThreads> sums;
  uint4 steps_aside[kAside * kWarpSize];
  RowShare<Stored, kThreads> share_aside[kWarpSize];
  E extras[2 * kMostGroupColumns];
  LogitScale<E> scale;
  E label_logit;
  int label;
  RowPart<E> row;  // it and its result wait here while the loss is computed
  RowResult<E> result;
  RowSlopes<E> slopes;
  RowPlan<E> plan;
  void* gradient;  // of the row, or null

  // By all threads, before this block may be sent anything.
  __device__ __forceinline__ void prepare() {
    if (threadIdx.x != 0) return;
    largest.arrivals.prepare();
    sums.arrivals.prepare();
  }

  // Behind it lies what the block holds of its row.
  template <int kBytes = kStorageBytes>
  __device__ __forceinline__ uint4* held() {
    static_assert(sizeof(RowStorage) <= kBytes && kBytes % sizeof(uint4) == 0, "must hold it");
    return reinterpret_cast<uint4*>(this) + kBytes / sizeof(uint4);
  }
};

// Exponentials are relative to the maximum; nothing but -inf has none, and any number will do.
template <typename E>
__device__ __forceinline__ E finite_or_zero(E largest) {
  return largest == -std::numeric_limits<E>::infinity() ? E(0) : largest;
}

// A thread's sums. Each group is added up before it joins them: fewer roundings of large numbers.
// Without a softcap, in fp32, in powers of 2: a multiplication less for each logit.
template <typename E, bool kCapped>
class ThreadSums {
 public:
  static constexpr bool kBinary = !kCapped && std::is_same_v<E, float>;

  // `largest` of the row: capped, finite.
  __device__ __forceinline__ ThreadSums(const LogitScale<E>& scale, E largest)
      : scale_(scale),
        largest_(largest),
        distance_scale_(kBinary ? binary_scale(scale.inverse_temperature)
                                : scale.inverse_temperature) {}

  __device__ __forceinline__ RowTerm<E> term(E logit) const {
    if constexpr (kBinary) {
      return binary_row_term(logit, largest_, distance_scale_);
    } else {
      return row_term(cap<kCapped>(logit, scale_).value, largest_, distance_scale_);
    }
  }

  // Turns logits into their exponentials, but leaves them as they are under a softcap.
  template <int kCount>
  __device__ __forceinline__ void add(E (&logits)[kCount]) {
    E group_exponentials = 0, group_weighted = 0;
#pragma unroll
    for (E& logit : logits) {
      const RowTerm<E> of_logit = term(logit);
      group_exponentials += of_logit.exponential;
      group_weighted += weighted(of_logit);
      if (!kCapped) logit = of_logit.exponential;
    }
    exponentials_ += group_exponentials;
    weighted_ += group_weighted;
  }

  __device__ __forceinline__ void add_one(E& logit) {
    E logits[] = {logit};
    add(logits);
    logit = logits[0];
  }

  __device__ __forceinline__ RowSums total() const {
    constexpr double kUnit = kBinary ? 1 / ExponentialConstants<double>::kLog2E : 1;
    return {exponentials_, weighted_ * kUnit};
  }

 private:
  LogitScale<E> scale_;
  E largest_;
  E distance_scale_;  // from the difference to the largest
  E exponentials_ = 0;
  E weighted_ = 0;
};

// A block's share of a row between the passes: first steps in registers, further ones in shared
// memory, and where that ends each pass reads the rest again. Without a softcap, what is held turns
// from logits into their exponentials. A softcap needs the logit again, and registers for its own
// arithmetic: such a row is held in shared memory alone.
template <typename Stored, int kThreads, bool kCapped>
class HeldRow {
 public:
  using Share = RowShare<Stored, kThreads>;
  using Storage = RowStorage<Stored, kThreads>;
  using E = typename Share::E;
  static constexpr int kColumns = Share::kColumns;
  static constexpr int kRegisterSteps = kCapped ? 0 : kHeldGroups<Stored>;

  __device__ __forceinline__ HeldRow(const RowsArgs& rows, Share& share, Storage& storage)
      : share_(share), storage_(storage), steps_(rows.steps) {
    held_ = min(kRegisterSteps + rows.shared_steps, rows.steps);
  }

  __device__ __forceinline__ E logit(int64_t column) const {
    return convert<E>(share_.row[column]);
  }

  // The thread's largest logit, on the only way of what is held from memory; NaNs are passed over,
  // they show in the sums.
  __device__ __forceinline__ E load() {
    E largest = -std::numeric_limits<E>::infinity();
    if (has_extra()) {
      extra() = share_.load_extra();
      largest = Larger()(extra(), largest);
    }
    const auto raise = [&](const E(&values)[kColumns]) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) largest = Larger()(values[i], largest);
    };
    for (int step = kRegisterSteps; step < steps_; step += kBatch) {
      load_batch<kBatch>(step, steps_, [&](int step, const E(&values)[kColumns]) {
        raise(values);
        if (step < held_) put(step, values);
      });
    }
    if constexpr (kRegisterSteps > 0) {
      uint4 words[kRegisterSteps];
#pragma unroll
      for (int i = 0; i < kRegisterSteps; ++i) words[i] = share_.load(i);
#pragma unroll
      for (int i = 0; i < kRegisterSteps; ++i) {
        Share::widen(words[i], registers_[i]);
        raise(registers_[i]);
      }
    }
    return largest;
  }

  __device__ __forceinline__ RowSums exponentiate(const LogitScale<E>& scale, E largest) {
    ThreadSums<E, kCapped> sums(scale, largest);
#pragma unroll
    for (int i = 0; i < kRegisterSteps; ++i)
      if (share_.has_group(i)) sums.add(registers_[i]);
    for (int step = kRegisterSteps; step < held_ && share_.has_group(step); ++step) {
      E values[kColumns];
      get(step, values);
      sums.add(values);
      if (!kCapped) put(step, values);
    }
    for (int step = first_unheld(); step < steps_ && share_.has_group(step); ++step)
      load_batch<1>(step, steps_, [&](int, E(&values)[kColumns]) { sums.add(values); });
    if (has_extra()) sums.add_one(extra());
    return sums.total();
  }

  // May go over the logits. A gradient that is narrower than they are meets columns of other
  // threads, always lower ones: what is read again is read by all before anybody stores.
  template <typename Gradient>
  __device__ __forceinline__ void write_gradient(const RowPlan<E>& plan, Gradient* gradient) {
    const bool aligned = share_.is_aligned(gradient);
#pragma unroll
    for (int i = 0; i < kRegisterSteps; ++i) {
      finish(registers_[i], plan);
      share_.store(gradient, aligned, i, registers_[i]);
    }
    for (int step = kRegisterSteps; step < held_; ++step) {
      E values[kColumns];
      get(step, values);
      finish(values, plan);
      share_.store(gradient, aligned, step, values);
    }
    for (int step = first_unheld(); step < steps_; ++step) {
      load_batch<1>(step, steps_, [&](int step, E(&values)[kColumns]) {
        if constexpr (sizeof(Gradient) < sizeof(Stored)) __syncthreads();
#pragma unroll
        for (E& value : values) value = plan.template other<kCapped>(value);
        share_.store(gradient, aligned, step, values);
      });
    }
    if (has_extra()) {
      E values[] = {extra()};
      finish(values, plan);
      share_.store_extra(gradient, values[0]);
    }
  }

  // For the first warp: between the two calls its registers, those of the share included, are free
  // for other work, without which the compiler would spill those of all warps.
  __device__ __forceinline__ void put_aside() const {
#pragma unroll
    for (int i = 0; i < kRegisterSteps; ++i)
      put<kWarpSize>(storage_.steps_aside + threadIdx.x, i, registers_[i]);
    storage_.share_aside[threadIdx.x] = share_;
  }
  __device__ __forceinline__ void take_back() {
#pragma unroll
    for (int i = 0; i < kRegisterSteps; ++i)
      get<kWarpSize>(storage_.steps_aside + threadIdx.x, i, registers_[i]);
    share_ = storage_.share_aside[threadIdx.x];
  }

 private:
  // Loads of these many steps are under way at once.
  static constexpr int kBatch = 4;

  // The column outside of whole groups is held as a step in shared memory is.
  __device__ __forceinline__ bool has_extra() const { return share_.extra() >= 0; }
  __device__ __forceinline__ E& extra() { return storage_.extras[threadIdx.x]; }

  // From what is held to the gradient.
  template <int kCount>
  static __device__ __forceinline__ void finish(E (&values)[kCount], const RowPlan<E>& plan) {
#pragma unroll
    for (E& value : values) {
      if constexpr (kCapped) {
        value = plan.template other<true>(value);
      } else {
        value *= plan.factor;
      }
    }
  }

  __device__ __forceinline__ int first_unheld() const {
    return held_ > kRegisterSteps ? held_ : kRegisterSteps;
  }

  // body(step, values) for the steps from `first` on that come before `end`.
  template <int kSteps, typename Body>
  __device__ __forceinline__ void load_batch(int first, int end, const Body& body) const {
    uint4 words[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) words[i] = share_.load(first + i);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (first + i < end) {
        E values[kColumns];
        Share::widen(words[i], values);
        body(first + i, values);
      }
    }
  }

  // A step in shared memory: 16 bytes of each thread side by side. Only the thread itself reads
  // them, so no barrier is needed.
  static constexpr int kWords = kHeldWords<Stored>;

  template <int kWidth>
  static __device__ __forceinline__ void put(uint4* shared, int step, const E (&values)[kColumns]) {
    uint4 words[kWords];
    memcpy(words, values, sizeof(words));
#pragma unroll
    for (int i = 0; i < kWords; ++i) shared[(step * kWords + i) * kWidth] = words[i];
  }
  template <int kWidth>
  static __device__ __forceinline__ void get(const uint4* shared, int step, E (&values)[kColumns]) {
    uint4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = shared[(step * kWords + i) * kWidth];
    memcpy(values, words, sizeof(words));
  }
  __device__ __forceinline__ void put(int step, const E (&values)[kColumns]) {
    put<kThreads>(storage_.held() + threadIdx.x, step - kRegisterSteps, values);
  }
  __device__ __forceinline__ void get(int step, E (&values)[kColumns]) const {
    get<kThreads>(storage_.held() + threadIdx.x, step - kRegisterSteps, values);
  }

  Share& share_;
  Storage& storage_;
  int steps_;
  int held_;  // of them in registers and shared memory
  E registers_[kRegisterSteps > 0 ? kRegisterSteps : 1][kColumns];
};

// A block's share of a row in registers alone, whose threads have meanwhile started to copy the
// share of the cluster's next row to shared memory: while a row waits for barriers and is written,
// the next one arrives. Stored words are kept; where they are as wide as exponentials they turn
// into them, else those are computed again for the gradient.
template <typename Stored>
class RowInTurn {
 public:
  static constexpr int kSteps = kTurnSteps;
  using Share = RowShare<Stored, kTurnThreads>;
  using Storage = RowStorage<Stored, kTurnThreads, kSteps>;
  using E = typename Share::E;
  static constexpr int kColumns = Share::kColumns;
  static constexpr bool kKeepsExponentials = sizeof(Stored) == sizeof(E);

  __device__ __forceinline__ RowInTurn(Share& share, Storage& storage)
      : share_(share), storage_(storage) {}

  // Only the thread itself reads what it copies, so no barrier is needed.
  static __device__ __forceinline__ void fetch(const Share& share, Storage& storage) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      if (share.has_group(i)) copy_ahead(staged(storage, i), share.row + share.column(i));
  }

  __device__ __forceinline__ E logit(int64_t column) const {
    return convert<E>(share_.row[column]);
  }

  // From shared memory, which is then free for the next row.
  __device__ __forceinline__ void take() {
    wait_for_copies();
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      words_[i] = share_.has_group(i) ? *staged(storage_, i) : Share::minus_infinities();
    extra_ = share_.extra();
    if (has_extra()) extra() = share_.load_extra();
  }

  // The thread's largest logit; NaNs are passed over, they show in the sums.
  __device__ __forceinline__ E load() const {
    uint4 word = words_[0];
#pragma unroll
    for (int i = 1; i < kSteps; ++i) word = larger_of_each<Stored>(word, words_[i]);
    E values[kColumns];
    Share::widen(word, values);
    E largest = has_extra() ? extra() : -std::numeric_limits<E>::infinity();
#pragma unroll
    for (E value : values) largest = Larger()(value, largest);
    return largest;
  }

  __device__ __forceinline__ RowSums exponentiate(const LogitScale<E>& scale, E largest) {
    ThreadSums<E, false> sums(scale, largest);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (!share_.has_group(i)) continue;
      forget_uses(words_[i]);
      E values[kColumns];
      Share::widen(words_[i], values);
      sums.add(values);
      if constexpr (kKeepsExponentials) memcpy(&words_[i], values, sizeof(uint4));
    }
    if (has_extra()) sums.add_one(extra());
    return sums.total();
  }

  // May go over the logits: all of the row is in registers.
  template <typename Gradient>
  __device__ __forceinline__ void write_gradient(const RowPlan<E>& plan, Gradient* gradient) {
    const bool aligned = share_.is_aligned(gradient);
    const ThreadSums<E, false> terms(plan.scale, finite_or_zero(plan.largest));
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (!share_.has_group(i)) continue;
      forget_uses(words_[i]);
      E values[kColumns];
      Share::widen(words_[i], values);
#pragma unroll
      for (E& value : values) {
        if constexpr (!kKeepsExponentials) value = terms.term(value).exponential;
        value *= plan.factor;
      }
      share_.store(gradient, aligned, i, values);
    }
    if (has_extra()) gradient[extra_] = narrow<Gradient>(extra() * plan.factor);
  }

  // As HeldRow's.
  __device__ __forceinline__ void put_aside() const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) storage_.steps_aside[i * kWarpSize + threadIdx.x] = words_[i];
    storage_.share_aside[threadIdx.x] = share_;
  }
  __device__ __forceinline__ void take_back() {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) words_[i] = storage_.steps_aside[i * kWarpSize + threadIdx.x];
    share_ = storage_.share_aside[threadIdx.x];
  }

 private:
  static __device__ __forceinline__ uint4* staged(Storage& storage, int step) {
    return storage.template held<kTurnStorageBytes>() + step * kTurnThreads + threadIdx.x;
  }
  __device__ __forceinline__ bool has_extra() const { return extra_ >= 0; }
  __device__ __forceinline__ E& extra() const { return storage_.extras[threadIdx.x]; }

  Share& share_;
  Storage& storage_;
  int extra_ = -1;
  uint4 words_[kSteps];
};

// Of an active row, where nothing is at fault.
__device__ __forceinline__ int label_column(const LogitsArgs& args, int64_t row) {
  return static_cast<int>(label_of(args, row));
}

template <typename Gradient>
__device__ __forceinline__ Gradient* gradient_of_row(const LogitsArgs& args, int64_t index) {
  return args.gradient.data != nullptr ? args.gradient.row<Gradient>(index) : nullptr;
}

// Whether anything of the row must be read, by what is known before.
template <typename E>
__device__ __forceinline__ bool row_flows(const LogitsArgs& args, int64_t row) {
  if (*args.fault != 0 || !row_is_active(args, row)) return false;
  return !is_backward(args) || !upstream_slopes<E>(args, row).are_zero();
}

// What a row that does not flow gets: zeros, or NaN under a fault.
template <typename E, typename Share, typename Gradient>
__device__ __forceinline__ void fill_row(const LogitsArgs& args, int64_t row, bool stores_results,
                                         const Share& share, int steps, Gradient* gradient) {
  const E value = *args.fault != 0 ? std::numeric_limits<E>::quiet_NaN() : E(0);
  if (stores_results) fill_results(args, row, value);
  if (gradient != nullptr) share.fill(gradient, steps, value);
}

// By one thread: what a row's maximum and sums make of its token and, in `storage`, of its
// gradient. The row waits in memory while its loss is computed, whose arithmetic needs the
// registers.
template <bool kCapped, typename E, typename Storage>
__device__ __forceinline__ void finish_row(const LogitsArgs& args, int64_t index,
                                           const RowPart<E>& row, bool stores_results,
                                           Storage& storage) {
  storage.row = row;
  const E label_capped = cap<kCapped>(row.label_logit, storage.scale).value;
  const RowResult<E> result = result_of_row(args, index, row.sums, row.largest, label_capped);
  if (stores_results) store_results(args, index, result, row.sums, row.largest);
  storage.result = result;
  forget_memory();
  storage.slopes = slopes_of_row(args, index, result.logprob);
  forget_memory();
  const LogitScale<E> scale = storage.scale;
  const RowDerivative<E> derivative =
      row_derivative<E>(storage.slopes, storage.row.sums.exponentials, storage.result.entropy,
                        scale.inverse_temperature);
  storage.plan = plan_of<kCapped>(derivative, scale, storage.row.largest, storage.row.label_logit);
}

// The first two passes over what the blocks of a cluster hold. Leaves the label, its logit and the
// scale in `storage`; the maximum is valid in every thread, the sums in the first warp.
// `turn` counts the cluster's rows before it; `before_posting` is called before anything is sent
// to another block.
template <bool kCapped, int kThreads, typename Held, typename Storage, typename BeforePosting>
__device__ __forceinline__ auto reduce_row(const LogitsArgs& args, int64_t index, int label,
                                           const Cluster& cluster, unsigned turn, Held& held,
                                           Storage& storage, const BeforePosting& before_posting)
    -> RowPart<typename Held::E> {
  using E = typename Held::E;
  E label_logit = 0;
  if (threadIdx.x == 0) label_logit = held.logit(label);
  E largest = held.load();
  if (threadIdx.x == 0) storage.scale = scale_of<E>(args, index);
  before_posting();
  post_to_cluster<kThreads>(largest, Larger(), cluster, turn, storage.largest);
  largest = merge_posted<kThreads>(largest, Larger(), cluster, storage.largest);
  const LogitScale<E> scale = storage.scale;
  largest = cap<kCapped>(largest, scale).value;
  RowSums sums = held.exponentiate(scale, finite_or_zero(largest));
  if (threadIdx.x == 0) {  // only now are all done with the label of the row before
    storage.label = label;
    storage.label_logit = label_logit;  // loaded while all that went on
  }
  post_to_cluster<kThreads>(sums, MergeRowSums(), cluster, turn, storage.sums);
  if (threadIdx.x < kWarpSize)
    sums = merge_posted<kThreads>(RowSums{0, 0}, MergeRowSums(), cluster, storage.sums);
  return {largest, storage.label_logit, sums};
}

// The row, from its logits to its gradient.
template <typename Gradient, bool kCapped, typename Stored, int kThreads, typename Held,
          typename Storage, typename BeforePosting>
__device__ __forceinline__ void process_row(const RowsArgs& rows, int64_t index, int label,
                                            RowShare<Stored, kThreads>& share,
                                            const Cluster& cluster, unsigned turn, Held& held,
                                            Storage& storage, const BeforePosting& before_posting) {
  using E = Compute<Stored>;
  const LogitsArgs& args = rows.logits;
  const RowPart<E> row = reduce_row<kCapped, kThreads>(args, index, label, cluster, turn, held,
                                                       storage, before_posting);
  if (threadIdx.x < kWarpSize) {
    held.put_aside();
    if (threadIdx.x == 0) {
      finish_row<kCapped>(args, index, row, cluster.rank == 0, storage);
      storage.gradient = gradient_of_row<Gradient>(args, index);
    }
    held.take_back();
  }
  if (args.gradient.data == nullptr) return;
  __syncthreads();
  const RowPlan<E> plan = storage.plan;
  Gradient* gradient = static_cast<Gradient*>(storage.gradient);
  if (plan.derivative.slopes.are_zero()) return share.fill(gradient, rows.steps, E(0));
  held.write_gradient(plan, gradient);
  if (share.is_mine(storage.label)) gradient[storage.label] = narrow<Gradient>(plan.label);
}

// The gradient of a share of which nothing is held. May go over the logits; a narrower one must
// have its row to itself, for it meets columns of other threads.
template <bool kCapped, int kThreads, typename E, typename Stored, typename Gradient>
__device__ __forceinline__ void stream_gradient(const RowShare<Stored, kThreads>& share, int steps,
                                                const RowPlan<E>& plan, Gradient* gradient) {
  constexpr int kBatch = 4;
  const bool aligned = share.is_aligned(gradient);
  const E extra = share.load_extra();
  for (int step = 0; step < steps; step += kBatch) {
    uint4 words[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) words[i] = share.load(step + i);
    if constexpr (sizeof(Gradient) < sizeof(Stored)) __syncthreads();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      E values[kGroupColumns<Stored>];
      share.widen(words[i], values);
#pragma unroll
      for (E& value : values) value = plan.template other<kCapped>(value);
      share.store(gradient, aligned, step + i, values);
    }
  }
  if constexpr (sizeof(Gradient) < sizeof(Stored)) __syncthreads();
  share.store_extra(gradient, plan.template other<kCapped>(extra));
}

// The maximum and the sums of a row from those of its parts, in thread 0. All threads must call.
template <typename E, typename Stored, int kThreads>
__device__ __forceinline__ RowPart<E> merge_parts(const LogitsArgs& args, int64_t index,
                                                  const RowPart<E>* parts, int count,
                                                  RowStorage<Stored, kThreads>& storage) {
  const Cluster alone = {0, 1};
  E largest = -std::numeric_limits<E>::infinity();
  for (int part = threadIdx.x; part < count; part += kThreads)
    largest = Larger()(parts[part].largest, largest);
  post_to_cluster<kThreads>(largest, Larger(), alone, 0, storage.largest);
  largest = merge_posted<kThreads>(largest, Larger(), alone, storage.largest);
  const double temperature = temperature_of(args, index);
  RowSums sums = {0, 0};
  for (int part = threadIdx.x; part < count; part += kThreads) {
    const double below = static_cast<double>(parts[part].largest) - largest;
    sums = merge(sums, shifted(parts[part].sums, below / temperature));
  }
  post_to_cluster<kThreads>(sums, MergeRowSums(), alone, 0, storage.sums);
  sums = merge_posted<kThreads>(RowSums{0, 0}, MergeRowSums(), alone, storage.sums);
  return {largest, parts[0].label_logit, sums};
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------------------

// One block looks at whatever a host would have to synchronise for, before any row is read.
__global__ void __launch_bounds__(kFaultThreads) look_for_faults(const LogitsArgs args) {
  BlockReduceStorage<int64_t, kFaultThreads>& storage =
      shared_storage<BlockReduceStorage<int64_t, kFaultThreads>>();
  bool fault = false;
  int64_t active = 0;
  for (int64_t row = threadIdx.x; row < args.logits.rows; row += kFaultThreads) {
    if (!row_is_active(args, row)) continue;
    ++active;
    fault |= !label_is_valid(args, row) || !temperature_is_valid(args, row);
  }
  active = block_reduce<kFaultThreads>(active, Plus(), storage);
  if (has_loss(args)) {
    for (int64_t s = threadIdx.x; s <= args.loss.segments.count; s += kFaultThreads)
      fault |= !args.loss.segments.entry_is_valid(s);
    fault |= !(load_scalar(args.loss.normalizer) >= 0);
  }
  const int faults = __syncthreads_count(fault);
  if (threadIdx.x == 0) *args.fault = faults > 0 || active > args.max_active;
}

// One cluster a row.
template <typename Stored, typename Gradient, int kThreads, bool kCapped>
__global__ void __launch_bounds__(kThreads, blocks_together(kThreads))
    logits_rows(const RowsArgs rows) {
  using E = Compute<Stored>;
  RowStorage<Stored, kThreads>& storage = shared_storage<RowStorage<Stored, kThreads>>();
  const LogitsArgs& args = rows.logits;
  const Cluster cluster = this_cluster();
  const int64_t index = blockIdx.x / cluster.blocks;
  RowShare<Stored, kThreads> share(args.logits.row<Stored>(index),
                                   static_cast<int>(args.logits.columns), cluster.rank,
                                   cluster.blocks);
  if (!row_flows<E>(args, index)) {
    fill_row<E>(args, index, cluster.rank == 0, share, rows.steps,
                gradient_of_row<Gradient>(args, index));
  } else {
    storage.prepare();
    cluster.say_started();
    HeldRow<Stored, kThreads, kCapped> held(rows, share, storage);
    process_row<Gradient, kCapped>(rows, index, label_column(args, index), share, cluster, 0, held,
                                   storage, [&] { cluster.wait_for_all(); });
  }
}

// The same for rows that registers hold, some of them in turn: each is copied ahead while the one
// before is worked on.
template <typename Stored, typename Gradient>
__global__ void __launch_bounds__(kTurnThreads, kTurnBlocksTogether)
    logits_rows_in_turn(const RowsArgs rows) {
  using E = Compute<Stored>;
  using Held = RowInTurn<Stored>;
  typename Held::Storage& storage = shared_storage<typename Held::Storage>();
  const LogitsArgs& args = rows.logits;
  const Cluster cluster = this_cluster();
  const auto share_of = [&](int64_t index) {
    return
        typename Held::Share(args.logits.row<Stored>(index), static_cast<int>(args.logits.columns),
                             cluster.rank, cluster.blocks);
  };
  const int64_t first = blockIdx.x / cluster.blocks * int64_t{rows.rows_in_turn};
  const int64_t end = min(first + rows.rows_in_turn, args.logits.rows);
  // The label's column, or -1 for a row that does not flow.
  const auto label_if_flowing = [&](int64_t index) {
    return index < end && row_flows<E>(args, index) ? label_column(args, index) : -1;
  };
  unsigned turn = 0;
  storage.prepare();
  cluster.say_started();
  int label = label_if_flowing(first);
  if (label >= 0) Held::fetch(share_of(first), storage);
  cluster.wait_for_all();
  for (int64_t index = first; index < end; ++index) {
    const int next_label = label_if_flowing(index + 1);
    typename Held::Share share = share_of(index);
    Held held(share, storage);
    if (label >= 0) held.take();
    if (next_label >= 0) Held::fetch(share_of(index + 1), storage);
    if (label >= 0) {
      process_row<Gradient, false>(rows, index, label, share, cluster, turn++, held, storage,
                                   [] {});
    } else {
      fill_row<E>(args, index, cluster.rank == 0, share, rows.steps,
                  gradient_of_row<Gradient>(args, index));
    }
    label = next_label;
  }
}

// Few rows: `parts` blocks for each, which leave what they found in the workspace.
template <typename Stored, bool kCapped>
__global__ void __launch_bounds__(kPartThreads, blocks_together(kPartThreads))
    logits_parts(const RowsArgs rows) {
  using E = Compute<Stored>;
  RowStorage<Stored, kPartThreads>& storage = shared_storage<RowStorage<Stored, kPartThreads>>();
  const LogitsArgs& args = rows.logits;
  const int64_t index = blockIdx.x / rows.parts;
  if (!row_flows<E>(args, index)) return;
  RowShare<Stored, kPartThreads> share(args.logits.row<Stored>(index),
                                       static_cast<int>(args.logits.columns),
                                       blockIdx.x % rows.parts, rows.parts);
  const Cluster alone = {0, 1};
  HeldRow<Stored, kPartThreads, kCapped> held(rows, share, storage);
  const RowPart<E> part = reduce_row<kCapped, kPartThreads>(args, index, label_column(args, index),
                                                            alone, 0, held, storage, [] {});
  if (threadIdx.x == 0) static_cast<RowPart<E>*>(args.workspace)[blockIdx.x] = part;
}

// The second launch for few rows, and the whole backward pass: rows whose sums are known, each
// shared by `stream_parts` blocks.
template <typename Stored, typename Gradient, bool kCapped>
__global__ void __launch_bounds__(kStreamThreads, sizeof(Stored) == 8 ? 2 : 3)
    logits_stream(const RowsArgs rows) {
  using E = Compute<Stored>;
  RowStorage<Stored, kStreamThreads>& storage =
      shared_storage<RowStorage<Stored, kStreamThreads>>();
  const LogitsArgs& args = rows.logits;
  const int64_t index = blockIdx.x / rows.stream_parts;
  const int part = blockIdx.x % rows.stream_parts;
  Gradient* gradient = gradient_of_row<Gradient>(args, index);
  const RowShare<Stored, kStreamThreads> share(args.logits.row<Stored>(index),
                                               static_cast<int>(args.logits.columns), part,
                                               rows.stream_parts);
  if (!row_flows<E>(args, index))
    return fill_row<E>(args, index, part == 0, share, rows.stream_steps, gradient);
  const int label = label_column(args, index);
  if (is_backward(args)) {
    // Only the block that has the label's column may read it: others may have overwritten theirs.
    const bool owner = share.is_mine(label);
    if (owner) storage.label_logit = convert<E>(share.row[label]);
    const bool owned = __syncthreads_or(owner);
    if (threadIdx.x == 0) {
      const RowDerivative<E> derivative =
          restore_row<E>(args, index, upstream_slopes<E>(args, index));
      storage.plan =
          plan_of<kCapped>(derivative, scale_of<E>(args, index), saved_largest<E>(args, index),
                           owned ? storage.label_logit : E(0));
    }
  } else {
    const RowPart<E>* parts = static_cast<const RowPart<E>*>(args.workspace) + index * rows.parts;
    const RowPart<E> row = merge_parts(args, index, parts, rows.parts, storage);
    if (threadIdx.x == 0) {
      storage.scale = scale_of<E>(args, index);
      finish_row<kCapped>(args, index, row, part == 0, storage);
    }
  }
  if (gradient == nullptr) return;
  __syncthreads();
  const RowPlan<E> plan = storage.plan;
  if (plan.derivative.slopes.are_zero()) return share.fill(gradient, rows.stream_steps, E(0));
  stream_gradient<kCapped>(share, rows.stream_steps, plan, gradient);
  if (share.is_mine(label)) gradient[label] = narrow<Gradient>(plan.label);
}

// ---------------------------------------------------------------------------------------------------------------------
// Launchers
// ---------------------------------------------------------------------------------------------------------------------

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

template <typename Stored, typename Gradient, int kThreads, bool kCapped>
cudaError_t launch_rows(const RowsArgs& rows, const RowSharing& sharing, const Device& device,
                        cudaStream_t stream) {
  const auto kernel = logits_rows<Stored, Gradient, kThreads, kCapped>;
  const cudaError_t error = allow_all_shared_memory(kernel, device);
  if (error != cudaSuccess) return error;
  return launch(kernel, rows.logits.logits.rows * sharing.blocks, kThreads, sharing.shared_bytes,
                stream, rows, sharing.blocks);
}

template <typename Stored, typename Gradient>
cudaError_t launch_rows_in_turn(const RowsArgs& rows, const RowSharing& sharing,
                                const Device& device, cudaStream_t stream) {
  const auto kernel = logits_rows_in_turn<Stored, Gradient>;
  const cudaError_t error = allow_all_shared_memory(kernel, device);
  if (error != cudaSuccess) return error;
  const int64_t clusters = divide_up(rows.logits.logits.rows, sharing.rows_in_turn);
  return launch(kernel, clusters * sharing.blocks, kTurnThreads, sharing.shared_bytes, stream, rows,
                sharing.blocks);
}

template <typename Stored, typename Gradient>
cudaError_t launch_stream(const RowsArgs& rows, cudaStream_t stream) {
  const auto kernel = rows.logits.softcap == 0 ? logits_stream<Stored, Gradient, false>
                                               : logits_stream<Stored, Gradient, true>;
  return launch(kernel, rows.logits.logits.rows * rows.stream_parts, kStreamThreads, kStorageBytes,
                stream, rows);
}

template <typename Stored>
cudaError_t launch_parts(RowsArgs rows, const RowSharing& sharing, const Device& device,
                         cudaStream_t stream) {
  const auto kernel =
      rows.logits.softcap == 0 ? logits_parts<Stored, false> : logits_parts<Stored, true>;
  cudaError_t error = allow_all_shared_memory(kernel, device);
  if (error != cudaSuccess) return error;
  error = launch(kernel, rows.logits.logits.rows * rows.parts, kPartThreads, sharing.shared_bytes,
                 stream, rows);
  if (error != cudaSuccess) return error;
  if (rows.logits.gradient.data == nullptr) rows.stream_parts = 1;
  return launch_stream<Stored, Stored>(rows, stream);
}

template <typename Stored, typename Gradient>
cudaError_t launch_variant(const LogitsArgs& args, const Device& device, cudaStream_t stream) {
  const RowSharing sharing = sharing_of<Stored>(args, device);
  const RowsArgs rows = {args,
                         sharing.steps,
                         sharing.shared_steps,
                         sharing.parts,
                         sharing.stream_parts,
                         sharing.stream_steps,
                         sharing.rows_in_turn};
  if (is_backward(args)) return launch_stream<Stored, Gradient>(rows, stream);
  if (sharing.parts > 0) return launch_parts<Stored>(rows, sharing, device, stream);
  if constexpr (sizeof(Compute<Stored>) == 4) {
    if (sharing.rows_in_turn > 0)
      return launch_rows_in_turn<Stored, Gradient>(rows, sharing, device, stream);
  }
  if (args.softcap != 0)
    return launch_rows<Stored, Gradient, kCappedThreads, true>(rows, sharing, device, stream);
  return sharing.threads == 256
             ? launch_rows<Stored, Gradient, 256, false>(rows, sharing, device, stream)
             : launch_rows<Stored, Gradient, 512, false>(rows, sharing, device, stream);
}

// fp32 logits may have a narrower gradient.
template <typename Stored>
cudaError_t launch_logits(const LogitsArgs& args, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  if constexpr (std::is_same_v<Stored, float>) {
    if (args.gradient.data != nullptr) {
      if (args.gradient.dtype == DType::kFloat16)
        return launch_variant<float, Float16>(args, device, stream);
      if (args.gradient.dtype == DType::kBFloat16)
        return launch_variant<float, BFloat16>(args, device, stream);
    }
  }
  return launch_variant<Stored, Stored>(args, device, stream);
}

// launcher<Stored>(args, with) for the dtype at hand.
#define IPO_EXT_FOR_DTYPE(dtype, launcher, with)               \
  dtype == DType::kFloat16    ? launcher<Float16>(args, with)  \
  : dtype == DType::kBFloat16 ? launcher<BFloat16>(args, with) \
  : dtype == DType::kFloat64  ? launcher<double>(args, with)   \
                              : launcher<float>(args, with)

// Columns are counted in 32 bits, with room for the groups around a row.
constexpr int64_t kMostColumns = int64_t{1} << 30;

}  // namespace

size_t workspace_bytes(const LogitsArgs& args) {
  Device device;
  if (args.logits.rows == 0 || current_device(device) != cudaSuccess) return 0;
  return IPO_EXT_FOR_DTYPE(args.logits.dtype, part_bytes, device);
}

const char* find_faults(const LogitsArgs& args, CUstream_st* stream) {
  using Storage = BlockReduceStorage<int64_t, kFaultThreads>;
  return error_text(launch(look_for_faults, 1, kFaultThreads, sizeof(Storage), stream, args));
}

const char* logits(const LogitsArgs& args, CUstream_st* stream) {
  if (args.logits.rows == 0) return nullptr;
  if (args.logits.columns > kMostColumns) return "more than 2^30 columns";
  return error_text(IPO_EXT_FOR_DTYPE(args.logits.dtype, launch_logits, stream));
}

}  // namespace ipo_ext::cuda
