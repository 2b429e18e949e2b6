// Calls the bare CPU kernels on nasty shapes, for a sanitizer to watch: every buffer is exactly as
// long as it must be, threads are std::thread's, and memory that a kernel is to fill holds 0xff
// bytes in one call and zeros in another, whose results must agree in every bit.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/histogram.h"
#include "kernels/logits.h"
#include "kernels/scale.h"
#include "kernels/score_centering.h"

namespace {

using namespace ipo_ext;
using math::MaskRule;

std::mt19937 generator(0);

int below(int count) { return static_cast<int>(generator() % count); }
bool coin() { return below(2) == 0; }
double normal() { return std::normal_distribution<double>()(generator); }

const DType kFloating[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64};

// Memory that ends where its last element does, and starts `offset` bytes past an aligned address.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int fill = 0, int64_t offset = 0)
      : bytes_(bytes), offset_(offset), memory_(new char[bytes + offset]) {
    memset(memory_.get(), fill, bytes + offset);
  }
  template <typename T = void>
  T* as() const {
    return reinterpret_cast<T*>(memory_.get() + offset_);
  }
  bool operator==(const Buffer& other) const {
    return bytes_ == other.bytes_ && memcmp(as(), other.as(), bytes_) == 0;
  }

 private:
  int64_t bytes_, offset_;
  std::unique_ptr<char[]> memory_;
};

int64_t size_of(DType dtype) {
  return dispatch_dtype(
      dtype, [](auto tag) { return static_cast<int64_t>(sizeof(TypeOf<decltype(tag)>)); });
}

// Numbers of any dtype, a few of them infinite, NaN or huge; aligned to their own size alone.
Buffer numbers(int64_t count, DType dtype, double scale, bool nasty) {
  Buffer buffer(count * size_of(dtype), 0, size_of(dtype) * below(3));
  const double odd[] = {std::numeric_limits<double>::infinity(),
                        -std::numeric_limits<double>::infinity(),
                        std::numeric_limits<double>::quiet_NaN(),
                        1e38,
                        -1e38,
                        1e-45};
  dispatch_floating(dtype, [&](auto tag) {
    using Stored = TypeOf<decltype(tag)>;
    for (int64_t i = 0; i < count; ++i) {
      const double value = nasty && below(8) == 0 ? odd[below(6)] : scale * normal();
      buffer.as<Stored>()[i] = narrow<Stored>(static_cast<Compute<Stored>>(value));
    }
  });
  return buffer;
}

Buffer mask(int64_t count) {
  Buffer buffer(count);
  for (int64_t i = 0; i < count; ++i) buffer.as<uint8_t>()[i] = below(4) == 0 ? 0 : 1 + below(255);
  return buffer;
}

// Ends of segments: none, one, or cuts anywhere, at tiles' ends above all, some of them empty.
std::vector<int32_t> segment_ends(int64_t tokens) {
  std::vector<int32_t> ends = {0};
  const int64_t cuts = below(3) == 0 ? 0 : below(20);
  std::vector<int64_t> places;
  for (int64_t i = 0; i < cuts; ++i) {
    const int64_t edge = below(6) * 2048 + below(3) - 1;
    places.push_back(coin() ? below(static_cast<int>(tokens) + 1) : edge);
  }
  std::sort(places.begin(), places.end());
  for (const int64_t place : places) {
    ends.push_back(static_cast<int32_t>(std::clamp<int64_t>(place, 0, tokens)));
  }
  ends.push_back(static_cast<int32_t>(tokens));
  return ends;
}

// -------------------------------------------------------------------------------------------------
// Threads

void serially(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  if (count > 0) body(0, count);
}

// A thread for each part, as many parts as `grain` allows, three at most.
void in_threads(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t parts = std::min<int64_t>(3, (count + grain - 1) / std::max<int64_t>(1, grain));
  std::vector<std::thread> threads;
  for (int64_t part = 0; part < parts; ++part) {
    threads.emplace_back([=, &body] { body(part * count / parts, (part + 1) * count / parts); });
  }
  for (std::thread& thread : threads) thread.join();
}

// Runs a call twice: alone and in threads, over memory of ones and of zeros.
void agree(const std::string& what,
           const std::function<std::vector<Buffer>(const cpu::ParallelFor&, int fill)>& call) {
  const auto first = call(serially, 0xff), second = call(in_threads, 0);
  if (first == second) return;
  std::printf("%s: a result depends on the threads or on what memory held before\n", what.c_str());
  std::exit(1);
}

// -------------------------------------------------------------------------------------------------
// From log-probabilities

// A loss over `tokens`, whose inputs the kernels may read: any dtypes, settings and segments.
struct Loss {
  IpoLossArgs args = {};
  std::vector<Buffer> inputs;
  std::vector<int32_t> ends;

  explicit Loss(int64_t tokens, bool packed = true) : ends(segment_ends(tokens)) {
    const bool nasty = coin();
    bool float64 = false;
    const auto input = [&](double scale, bool decides = false) {
      const DType dtype = kFloating[below(4)];
      if (decides) float64 |= dtype == DType::kFloat64;
      inputs.push_back(numbers(tokens, dtype, scale, nasty));
      return TokenInput{inputs.back().as(), dtype};
    };
    args.trainer_logprobs = input(1, true);
    args.inference_logprobs = input(1, true);
    args.advantages = input(2);
    if (coin()) args.teacher_logprobs = input(1);
    if (coin()) args.loss_weights = input(1);
    args.compute_dtype = float64 ? DType::kFloat64 : DType::kFloat32;
    inputs.push_back(mask(tokens));
    args.loss_mask = inputs.back().as<uint8_t>();
    args.normalizer.value = 17;
    args.params = settings();
    args.sequence_rules = sequence_rules();
    args.segments = {nullptr, 1, tokens, 0};
    if (packed && coin()) {
      args.segments.cu_seqlens = ends.data();
      args.segments.count = static_cast<int64_t>(ends.size()) - 1;
    }
  }

  static math::LossParams<double> settings() {
    math::LossParams<double> params = {};
    params.low = -1.6;
    params.high = 1.6;
    params.adv_tau = 1;
    params.kl_tau = 1e-3;
    params.teacher_tau = coin() ? 0.3 : 0;
    if (coin()) return params;
    params.mask_rule = static_cast<MaskRule>(below(static_cast<int>(MaskRule::kCount)));
    params.kl_active = coin();
    params.judges_sequences = coin();
    params.rollout_low = -2;
    return params;
  }

  static math::SequenceRules sequence_rules() {
    math::SequenceRules rules = {};
    rules.count = below(3);
    for (int i = 0; i < rules.count; ++i) rules.rules[i] = {below(math::kNumStatistics), -1, 0.5};
    rules.only_negative = coin();
    rules.weight = static_cast<math::SequenceWeight>(below(3));
    rules.weight_cap = 2;
    return rules;
  }
};

std::vector<Buffer> run_loss(IpoLossArgs args, const cpu::ParallelFor& parallel_for, int fill) {
  const int64_t element = size_of(args.compute_dtype), segments = args.segments.count;
  const int64_t doubles = sizeof(double);
  std::vector<Buffer> out;
  const auto output = [&](int64_t bytes) {
    out.emplace_back(bytes, fill);
    return out.back().as();
  };
  out.reserve(5);
  args.loss = output(element);
  args.gradient = args.gradient != nullptr ? output(args.segments.tokens * element) : nullptr;
  args.means = output(math::mean::kNumRows * segments * element);
  args.sums = static_cast<double*>(output(math::kNumSumRows * segments * doubles));
  args.extremes = static_cast<double*>(output(math::extreme::kNumRows * segments * doubles));
  const Buffer workspace(cpu::workspace_bytes(args), fill);
  args.workspace = workspace.as();
  cpu::ipo_loss(args, parallel_for);
  const Buffer means(math::mean::kNumRows * segments * element, fill);
  cpu::metric_means({args.compute_dtype, segments, args.sums, args.extremes, means.as()});
  if (memcmp(means.as(), args.means, math::mean::kNumRows * segments * element) != 0) {
    std::puts("metric_means: other means than the loss's");
    std::exit(1);
  }
  return out;
}

void drive_loss(int64_t tokens) {
  Loss loss(tokens);
  static char wanted;
  if (below(4) != 0) loss.args.gradient = &wanted;  // any address: run_loss has the memory
  agree("ipo_loss of " + std::to_string(tokens) + " tokens",
        [&](const cpu::ParallelFor& parallel_for, int fill) {
          return run_loss(loss.args, parallel_for, fill);
        });
}

// -------------------------------------------------------------------------------------------------
// From logits

// [rows, columns] in blocks, with a few elements behind each row and each block.
struct Layout {
  LogitsMatrix matrix;
  int64_t elements;

  Layout(int64_t rows, int64_t columns, DType dtype) {
    matrix.dtype = dtype;
    matrix.rows = rows;
    matrix.columns = columns;
    matrix.row_stride = columns + below(3);
    matrix.block_rows = rows % 2 == 0 && rows > 0 && coin() ? rows / 2 : std::max<int64_t>(1, rows);
    matrix.block_stride = matrix.block_rows * matrix.row_stride + below(3);
    elements = rows == 0 ? 0 : matrix.offset(rows - 1) + columns;
  }
};

// Where the gradient goes: nowhere, into memory of its own, over the logits, or narrower over them.
enum class Place { kNowhere, kApart, kOver, kNarrowerOver };

struct Rows {
  LogitsArgs args = {};
  Layout layout;
  Buffer logits;
  std::vector<Buffer> inputs;
  Loss loss;
  Place place;

  Rows(int64_t rows, int64_t columns)
      : layout(rows, columns, kFloating[below(4)]),
        logits(numbers(layout.elements, layout.matrix.dtype, 3, below(4) == 0)),
        loss(rows, false),
        place(static_cast<Place>(below(4))) {
    const DType dtype = layout.matrix.dtype;
    if (place == Place::kNarrowerOver && dtype != DType::kFloat32) place = Place::kOver;
    args.compute_dtype = dtype == DType::kFloat64 ? dtype : DType::kFloat32;
    args.mode = coin() ? LogitsMode::kLoss : LogitsMode::kForward;
    if (args.mode == LogitsMode::kForward) place = Place::kNowhere;
    args.softcap = coin() ? 0 : 4;
    take_labels(rows, columns);
    args.temperature.value = 0.7;
    if (coin()) {
      inputs.push_back(numbers(rows, DType::kFloat32, 0, false));
      for (int64_t i = 0; i < rows; ++i) inputs.back().as<float>()[i] = 0.5f + 0.1f * below(9);
      args.temperatures = {inputs.back().as(), DType::kFloat32};
    }
    if (args.mode == LogitsMode::kLoss) {
      loss.args.params.judges_sequences = false;
      args.loss = loss.args;
      args.active = loss.args.loss_mask;
    }
  }

  void take_labels(int64_t rows, int64_t columns) {
    args.label_dtype = coin() ? DType::kInt32 : DType::kInt64;
    inputs.emplace_back(rows * size_of(args.label_dtype));
    for (int64_t i = 0; i < rows; ++i) {
      const int label =
          below(4) == 0 ? static_cast<int>(kIgnoredLabel) : below(static_cast<int>(columns));
      const bool is_active = args.mode == LogitsMode::kLoss && loss.args.loss_mask[i] != 0;
      const int value = is_active ? std::max(label, 0) : label;
      if (args.label_dtype == DType::kInt32) {
        inputs.back().as<int32_t>()[i] = value;
      } else {
        inputs.back().as<int64_t>()[i] = value;
      }
    }
    args.labels = inputs.back().as();
  }
};

std::vector<Buffer> run_forward(const Rows& rows, const cpu::ParallelFor& parallel_for, int fill) {
  LogitsArgs args = rows.args;
  const int64_t element = size_of(args.compute_dtype), count = rows.layout.matrix.rows;
  const int64_t stored = size_of(rows.layout.matrix.dtype);
  std::vector<Buffer> out;
  out.reserve(5);
  out.emplace_back(rows.layout.elements * stored);  // the logits, which the gradient may lie over
  memcpy(out[0].as(), rows.logits.as(), rows.layout.elements * stored);
  args.logits = rows.layout.matrix;
  args.logits.data = out[0].as();
  for (void** result : {&args.logprobs, &args.entropy}) {
    out.emplace_back(count * element, fill);
    *result = out.back().as();
  }
  if (args.mode == LogitsMode::kForward) {
    out.emplace_back(2 * count * element, fill);
    args.softmax_stats = out.back().as();
  }
  if (rows.place == Place::kApart) {
    args.gradient = rows.layout.matrix;
    args.gradient.row_stride = args.gradient.columns;
    args.gradient.block_rows = std::max<int64_t>(1, count);
    out.emplace_back(count * args.gradient.columns * stored, fill);
    args.gradient.data = out.back().as();
  } else if (rows.place != Place::kNowhere) {
    args.gradient = args.logits;
    if (rows.place == Place::kNarrowerOver) {
      args.gradient.dtype = DType::kBFloat16;
      args.gradient.row_stride *= 2;
      args.gradient.block_stride *= 2;
    }
  }
  cpu::logits(args, parallel_for);
  return out;
}

// The backward pass after a forward pass.
std::vector<Buffer> run_backward(const Rows& rows, const Buffer& grads,
                                 const cpu::ParallelFor& parallel_for, int fill) {
  std::vector<Buffer> out = run_forward(rows, parallel_for, fill);
  LogitsArgs args = rows.args;
  args.mode = LogitsMode::kBackward;
  args.logits = args.gradient = rows.layout.matrix;
  args.logits.data = args.gradient.data = out[0].as();
  args.entropy = out[2].as();
  args.softmax_stats = out[3].as();
  args.grad_logprobs = {grads.as(), args.compute_dtype};
  if (rows.layout.matrix.columns % 2 == 0) args.grad_entropy = args.grad_logprobs;
  cpu::logits(args, parallel_for);
  return out;
}

void drive_logits(int64_t count, int64_t columns) {
  const Rows rows(count, columns);
  const std::string what =
      "logits of " + std::to_string(count) + " x " + std::to_string(columns) + " columns";
  agree(what, [&](const cpu::ParallelFor& parallel_for, int fill) {
    return run_forward(rows, parallel_for, fill);
  });
  if (rows.args.mode != LogitsMode::kForward) return;
  const Buffer grads = numbers(count, rows.args.compute_dtype, 1, false);
  agree(what + ", backward", [&](const cpu::ParallelFor& parallel_for, int fill) {
    return run_backward(rows, grads, parallel_for, fill);
  });
}

// -------------------------------------------------------------------------------------------------
// What is made of a loss's inputs besides

void drive_histogram(int64_t tokens) {
  const Loss loss(tokens);
  const Segments& segments = loss.args.segments;
  agree("histogram of " + std::to_string(tokens) + " tokens",
        [&](const cpu::ParallelFor& parallel_for, int) {
          std::vector<Buffer> out;
          out.emplace_back(math::kBins * segments.count * sizeof(int64_t));
          cpu::histogram(
              {loss.args.compute_dtype, loss.args.trainer_logprobs, loss.args.inference_logprobs,
               loss.args.loss_mask, segments, out[0].as<int64_t>()},
              parallel_for);
          return out;
        });
}

void drive_centering(int64_t tokens, int64_t width) {
  const Loss loss(tokens);
  const int64_t segments = loss.args.segments.count;
  const DType compute = loss.args.compute_dtype, of_ids = kFloating[below(4)];
  const Buffer trainer = numbers(tokens * width, of_ids, 1, true);
  const Buffer inference = numbers(tokens * width, DType::kFloat32, 1, true);
  const Buffer active = numbers(segments, DType::kFloat64, 9, false), replays = mask(tokens);
  const bool some = coin(), with_gradient = coin(), with_means = coin();
  agree("score centering of " + std::to_string(tokens) + " tokens",
        [&](const cpu::ParallelFor& parallel_for, int fill) {
          std::vector<Buffer> out;
          out.reserve(5);
          const auto output = [&](int64_t bytes) {
            out.emplace_back(bytes, fill);
            return out.back().as();
          };
          CenteringArgs args = {};
          args.compute_dtype = compute;
          args.trainer_mask_logprobs = {trainer.as(), of_ids};
          args.inference_mask_logprobs = {inference.as(), DType::kFloat32};
          args.width = width;
          args.trainer_logprobs = loss.args.trainer_logprobs;
          args.inference_logprobs = loss.args.inference_logprobs;
          args.advantages = loss.args.advantages;
          args.loss_weights = loss.args.loss_weights;
          args.loss_mask = loss.args.loss_mask;
          args.replays = some ? replays.as<uint8_t>() : nullptr;
          args.normalizer = loss.args.normalizer;
          args.segments = loss.args.segments;
          args.params.largest_difference = 0.2;
          args.params.log_ratio_cap = 1;
          args.params.adv_tau = 1;
          args.gradient_dtype = of_ids == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
          if (with_gradient) args.gradient = output(tokens * width * size_of(args.gradient_dtype));
          args.terms = static_cast<double*>(output(tokens * sizeof(double)));
          args.sums = static_cast<double*>(output(segments * sizeof(double)));
          if (with_means) args.means = output(segments * size_of(compute));
          args.active = active.as<double>();
          args.loss = output(size_of(compute));
          cpu::score_centering(args, parallel_for);
          return out;
        });
}

// -------------------------------------------------------------------------------------------------
// A gradient times a factor

void drive_scale(int64_t count) {
  const DType dtype = kFloating[below(4)];
  const DType narrower = dtype == DType::kFloat32 ? kFloating[below(3)] : dtype;
  const Buffer gradient = numbers(count, dtype, 1, true);
  agree("scale", [&](const cpu::ParallelFor& parallel_for, int fill) {
    std::vector<Buffer> out;
    out.emplace_back(count * size_of(narrower), fill);
    cpu::scale(
        {gradient.as(), dtype, out[0].as(), narrower, count, {nullptr, DType::kFloat64, 0.3}},
        parallel_for);
    return out;
  });
}

void drive_scale_rows(int64_t count, int64_t columns) {
  const Layout layout(count, columns, kFloating[below(4)]);
  const int64_t bytes = layout.elements * size_of(layout.matrix.dtype);
  const Buffer gradient = numbers(layout.elements, layout.matrix.dtype, 1, true);
  agree("scale_rows", [&](const cpu::ParallelFor& parallel_for, int) {
    std::vector<Buffer> out;
    out.emplace_back(bytes);
    memcpy(out[0].as(), gradient.as(), bytes);
    ScaleRowsArgs args = {layout.matrix, {nullptr, DType::kFloat64, 0.3}};
    args.gradient.data = out[0].as();
    cpu::scale_rows(args, parallel_for);
    return out;
  });
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 1;
  for (int round = 0; round < rounds; ++round) {
    for (const int64_t tokens :
         {0,  1,  2,    7,    8,    9,    15,   16,   17,   31,   33,   63,
          64, 65, 1023, 1025, 2047, 2048, 2049, 4097, 8191, 8192, 8193, 20011}) {
      for (int repeat = 0; repeat < 4; ++repeat) drive_loss(tokens);
      drive_histogram(tokens);
      drive_centering(tokens, 1 + below(9));
    }
    for (const int64_t columns :
         {1, 2, 3, 7, 8, 15, 16, 17, 33, 63, 64, 65, 127, 129, 511, 512, 513, 1024, 1031}) {
      for (const int64_t rows : {0, 1, 2, 5}) drive_logits(rows, columns);
      drive_scale_rows(6, columns);
    }
    drive_logits(200, 1031);  // more than one batch for every thread
    for (const int64_t count : {0, 1, 3, 16, 17, 1000, 100'003}) drive_scale(count);
  }
  std::printf("%d rounds: no report, and the same bits alone and in threads\n", rounds);
}
