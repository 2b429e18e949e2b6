// Runs the last tile of a batch of more than 2^31 tokens, on tensors that are reserved but, before
// that tile, never touched: an index that passed through 32 bits would read or write elsewhere.
// The kernels' sources are included, so that the test can run a single tile.
#pragma GCC diagnostic ignored "-Wpsabi"  // the SIMD types never cross a library's boundary
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "kernels/cpu/dispatch.cpp"
#include "kernels/cpu/ipo_loss.cpp"
#include "kernels/cuda/ipo_loss/ipo_loss.cu"

#define IPO_EXT_CPU_ARCH baseline
#include "kernels/cpu/components_simd.cpp"
#include "kernels/cpu/ipo_loss_simd.cpp"
#include "kernels/cpu/sequence_simd.cpp"
#if defined(__x86_64__)
#undef IPO_EXT_CPU_ARCH
#define IPO_EXT_CPU_ARCH x86_64_v3
#include "kernels/cpu/components_simd.cpp"
#include "kernels/cpu/ipo_loss_simd.cpp"
#include "kernels/cpu/sequence_simd.cpp"
#undef IPO_EXT_CPU_ARCH
#define IPO_EXT_CPU_ARCH x86_64_v4
#include "kernels/cpu/components_simd.cpp"
#include "kernels/cpu/ipo_loss_simd.cpp"
#include "kernels/cpu/sequence_simd.cpp"
#endif

namespace {

using namespace ipo_ext;

constexpr int64_t kBase = int64_t(1) << 31;  // a multiple of every tile size
constexpr int64_t kTail = 1003;              // tokens behind it: whole vectors and a remainder
constexpr size_t kMostResident = 512 << 20;

// Zeros that take no memory until they are written.
class Sparse {
 public:
  explicit Sparse(size_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (data_ == MAP_FAILED) {
      std::perror("mmap");
      std::exit(2);
    }
    madvise(data_, bytes, MADV_NOHUGEPAGE);
  }
  ~Sparse() { munmap(data_, bytes_); }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  size_t bytes_;
  void* data_;
};

template <typename E>
constexpr DType kDType = sizeof(E) == sizeof(float) ? DType::kFloat32 : DType::kFloat64;

// A batch of base + kTail tokens, data in the last kTail alone; `shift` elements off alignment.
template <typename E>
struct Batch {
  int64_t tokens;
  Sparse trainer, inference, advantages, mask, gradient;
  std::vector<double> sums, extremes;
  std::vector<E> means;
  E loss = 0;
  IpoLossArgs args = {};

  Batch(int64_t base, int shift, bool weighed)
      : tokens(base + kTail),
        trainer((tokens + shift) * sizeof(E)),
        inference((tokens + shift) * sizeof(E)),
        advantages((tokens + shift) * sizeof(E)),
        mask(tokens + shift),
        gradient((tokens + shift) * sizeof(E)),
        sums(math::kNumSumRows),
        extremes(math::extreme::kNumRows),
        means(math::mean::kNumRows) {
    args.compute_dtype = kDType<E>;
    args.trainer_logprobs = {trainer.template as<E>() + shift, kDType<E>};
    args.inference_logprobs = {inference.template as<E>() + shift, kDType<E>};
    args.advantages = {advantages.template as<E>() + shift, kDType<E>};
    args.loss_mask = mask.template as<uint8_t>() + shift;
    args.gradient = gradient.template as<E>() + shift;
    args.params = {std::log(0.2),          std::log(5.0), 1,    1e-3, 0, 1,
                   math::MaskRule::kRatio, false,         false};
    if (weighed) {  // by the mean of the log-ratios, which are the tail's alone
      args.params.judges_sequences = true;
      args.params.rollout_low = -std::numeric_limits<double>::infinity();
      args.sequence_rules.weight = math::SequenceWeight::kMean;
      args.sequence_rules.weight_cap = 100;
    }
    args.segments = {nullptr, 1, tokens, 0};
    args.loss = &loss;
    args.means = means.data();
    args.sums = sums.data();
    args.extremes = extremes.data();
    for (int64_t i = 0; i < kTail; ++i) {
      trainer.template as<E>()[shift + base + i] = E(-0.001) * E(i + 1);
      inference.template as<E>()[shift + base + i] = E(-0.003) * E(i + 1);
      advantages.template as<E>()[shift + base + i] = E(i % 7) - E(3);
      mask.template as<uint8_t>()[shift + base + i] = i % 5 != 0;
    }
  }
  const E* tail() const { return static_cast<const E*>(args.gradient) + tokens - kTail; }
};

// Runs the kernel's last tile, then what finishes the batch. The other tiles' partial sums are the
// workspace's zeros.
struct OnCpu {
  static size_t workspace_bytes(const IpoLossArgs& args) { return cpu::workspace_bytes(args); }
  template <typename E>
  static void run(const IpoLossArgs& args) {
    cpu::ipo_loss(args, [](int64_t tiles, int64_t, const auto& body) { body(tiles - 1, tiles); });
  }
};

template <math::Rules kRules, int kCount>
__global__ void last_block_tile(const IpoLossArgs args) {
  blockIdx.x = static_cast<unsigned>(args.segments.num_tiles() - 1);
  cuda::ipo_loss_tiles<kRules, double, kCount>(args);
}

template <math::Rules kRules, cuda::Inputs kInputs>
__global__ void last_warp_tiles(const cuda::WarpTilesArgs args) {
  blockIdx.x = static_cast<unsigned>(cuda::blocks_of_warps(args.loss.segments.num_tiles()) - 1);
  cuda::ipo_loss_warp_tiles<kRules, kInputs>(args);
}

template <math::Rules kRules>
void launch_last_tile(const IpoLossArgs& args) {
  constexpr size_t kBlockTile = sizeof(cuda::TileStorage<double>);
  if (!cuda::has_warp_tiles(args)) {
    cuda::launch(cuda::vectorizable(args) ? last_block_tile<kRules, 2> : last_block_tile<kRules, 1>,
                 1, cuda::kThreads, kBlockTile, nullptr, args);
    return;
  }
  const cuda::WarpTilesArgs all = {args, settings_for<float>(args.params)};
  cuda::launch(kRules == math::Rules::kDefault ? last_warp_tiles<kRules, cuda::Inputs::kPlain>
                                               : last_warp_tiles<kRules, cuda::Inputs::kAny>,
               1, cuda::kThreads, 0, nullptr, all);
}

template <typename E>
__global__ void last_sequence_tiles(const IpoLossArgs args) {
  const int64_t tiles = cuda::judged_segments(args.segments).num_tiles();
  blockIdx.x = static_cast<unsigned>(cuda::blocks_of_warps(tiles) - 1);
  cuda::ipo_loss_sum_sequences<E>(args);
}

// The arguments with as large a tile as the large batch has, so that both sum in the same order.
IpoLossArgs with_large_tiles(IpoLossArgs args) {
  IpoLossArgs large = args;
  large.segments.tokens = kBase + kTail;
  args.segments.tile_log2 = cuda::with_tiles(large).tile_log2;
  return args;
}

struct OnCuda {
  static size_t workspace_bytes(const IpoLossArgs& args) { return cuda::workspace_bytes(args); }
  template <typename E>
  static void run(IpoLossArgs args) {
    args = with_large_tiles(args);
    const bool judged = args.params.judges_sequences;
    if (judged) {
      cuda::launch(last_sequence_tiles<E>, 1, cuda::kThreads, 0, nullptr, args);
      cuda::launch(cuda::ipo_loss_judge_sequences<E>, 1, cuda::kThreads, 0, nullptr, args);
    }
    (judged ? launch_last_tile<math::Rules::kAny> : launch_last_tile<math::Rules::kDefault>)(args);
    cuda::launch(cuda::ipo_loss_finish<E, false>, 2, cuda::kFinishThreads,
                 sizeof(cuda::FinishStorage), nullptr, args);
  }
};

template <typename Backend, typename E>
void run(Batch<E>& batch) {
  const Sparse workspace(Backend::workspace_bytes(batch.args));
  batch.args.workspace = workspace.as<void>();
  Backend::template run<E>(batch.args);
}

bool check(bool condition, const char* name, const char* what) {
  if (!condition) std::printf("%s: %s\n", name, what);
  return condition;
}

// The batch must give what its last tokens alone give.
template <typename Backend, typename E>
bool same_as_alone(const char* name, int shift, bool weighed = false) {
  Batch<E> large(kBase, shift, weighed), alone(0, shift, weighed);
  run<Backend, E>(large);
  run<Backend, E>(alone);
  bool ok = check(std::memcmp(large.tail(), alone.tail(), kTail * sizeof(E)) == 0, name,
                  "the gradients past 2^31 are not those of the same tokens alone");
  ok &= check(large.tail()[1] != 0, name, "no gradient was written past 2^31");
  for (int64_t i = 0; i < kTail; ++i) {
    if (static_cast<E*>(large.args.gradient)[i] != 0)
      return check(false, name, "a gradient was written at a truncated index");
  }
  ok &= check(large.sums == alone.sums, name, "the sums differ");
  ok &= check(large.sums[math::count::active] == kTail - (kTail + 4) / 5, name, "wrong count");
  return ok & check(large.loss == alone.loss, name, "the loss differs");
}

// From the kernel's own page, not getrusage: that inherits the peak of the process that forked
// this.
size_t most_resident_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    size_t kibibytes;
    if (word == "VmHWM:" && status >> kibibytes) return kibibytes * 1024;
  }
  return SIZE_MAX;
}

}  // namespace

int main() {
  bool ok = same_as_alone<OnCpu, float>("cpu float", 0);
  ok &= same_as_alone<OnCpu, double>("cpu double", 1);
  ok &= same_as_alone<OnCuda, float>("cuda float, vectors", 0);
  ok &= same_as_alone<OnCuda, float>("cuda float", 1);
  ok &= same_as_alone<OnCuda, double>("cuda double, vectors", 0);
  ok &= same_as_alone<OnCpu, float>("cpu float, weighed", 0, true);
  ok &= same_as_alone<OnCuda, float>("cuda float, vectors, weighed", 0, true);
  ok &= check(most_resident_bytes() < kMostResident, "memory", "the sparse tensors were touched");
  std::printf("%zu MiB resident at most\n", most_resident_bytes() >> 20);
  return ok ? 0 : 1;
}
