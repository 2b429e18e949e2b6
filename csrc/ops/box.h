// Makes an operator of a C++ function, as TORCH_BOX does, but of a function that takes the structs
// of ops/arguments.h, each of which stands for several arguments of the schema.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>

#include "ops/arguments.h"
#include "ops/check.h"

namespace ipo_ext {

// Reads the arguments of one call from torch's stack, each once, in the order of the schema.
class ArgumentReader {
 public:
  ArgumentReader(const StableIValue* stack, uint64_t count) : next_(stack), end_(stack + count) {}

  template <typename T>
  T read() {
    IPO_EXT_CHECK(next_ != end_, "ipo_ext: the schema has fewer arguments than the operator");
    return torch::stable::detail::to<T>(*next_++);
  }
  bool at_end() const { return next_ == end_; }

 private:
  const StableIValue* next_;
  const StableIValue* end_;
};

template <typename Words>
Words word_of(const char* name, int64_t index) {
  IPO_EXT_CHECK(index >= 0 && index < static_cast<int64_t>(Words::kCount), name,
                ": expected the index of a word, got ", index);
  return static_cast<Words>(index);
}

template <>
inline math::MaskRule ArgumentReader::read<math::MaskRule>() {
  return word_of<math::MaskRule>("mask_rule", read<int64_t>());
}

template <>
inline math::PolicyForm ArgumentReader::read<math::PolicyForm>() {
  return word_of<math::PolicyForm>("pg_form", read<int64_t>());
}

template <>
inline math::SequenceWeight ArgumentReader::read<math::SequenceWeight>() {
  return word_of<math::SequenceWeight>("sequence_weight", read<int64_t>());
}

// Returns the infinity that the largest number stands for: AOTInductor (torch 2.14) writes settings
// as JSON, which has no infinity.
inline double with_infinities(double bound) {
  constexpr double kMost = std::numeric_limits<double>::max();
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  return bound >= kMost ? kInfinity : bound <= -kMost ? -kInfinity : bound;
}

// `given` are the statistic, low and high of each rule, one after the other.
inline void take_rules(const std::vector<double>& given, math::SequenceRules& rules) {
  constexpr size_t kNumbers = 3;
  const size_t count = given.size() / kNumbers;
  IPO_EXT_CHECK(count <= math::kNumStatistics && given.size() % kNumbers == 0,
                "sequence_rules: expected 3 numbers for each of at most ", math::kNumStatistics,
                " rules, got ", given.size(), " numbers");
  rules.count = static_cast<int>(count);
  for (size_t i = 0; i < count; ++i) {
    const double* rule = given.data() + kNumbers * i;
    IPO_EXT_CHECK(rule[0] >= 0 && rule[0] < math::kNumStatistics,
                  "sequence_rules: expected the index of a statistic, got ", rule[0]);
    rules.rules[i] = {static_cast<int>(rule[0]), with_infinities(rule[1]),
                      with_infinities(rule[2])};
  }
}

// Within braces, arguments are read from left to right.
#define IPO_EXT_READ(schema, Type, name) read<Type>(),

template <>
inline LogitScaling ArgumentReader::read<LogitScaling>() {
  return {IPO_EXT_LOGIT_SCALING(IPO_EXT_READ)};
}

template <>
inline LossInputs ArgumentReader::read<LossInputs>() {
  return {IPO_EXT_LOSS_INPUTS(IPO_EXT_READ)};
}

template <>
inline Components ArgumentReader::read<Components>() {
  using E = double;
  Components components = {
      IPO_EXT_COMPONENT_INPUTS(IPO_EXT_READ){IPO_EXT_COMPONENT_SETTINGS(IPO_EXT_READ) 0, 0}};
  components.params.ref_kl_cap = with_infinities(components.params.ref_kl_cap);
  return components;
}

template <>
inline LossSettings ArgumentReader::read<LossSettings>() {
  using namespace math;
  using E = double;
  LossSettings settings = {
      {IPO_EXT_LOSS_NUMBERS(IPO_EXT_READ) 0, IPO_EXT_LOSS_RULES(IPO_EXT_READ){}}, {}};
#define IPO_EXT_READ_VARIABLE(schema, Type, name) const auto name = read<Type>();
  IPO_EXT_SEQUENCE_SETTINGS(IPO_EXT_READ_VARIABLE)
#undef IPO_EXT_READ_VARIABLE
  IPO_EXT_CHECK(settings.params.judges_sequences ||
                    (!sequence_rules.has_value() && sequence_weight == SequenceWeight::kNone),
                "judges_sequences: expected True with sequence_rules or a sequence_weight");
  SequenceRules& rules = settings.sequence_rules;
  if (sequence_rules.has_value()) take_rules(*sequence_rules, rules);
  rules.only_negative = only_negative;
  rules.weight = sequence_weight;
  rules.weight_cap = with_infinities(sequence_weight_cap);
  settings.params.rollout_low = with_infinities(settings.params.rollout_low);
  return settings;
}

#undef IPO_EXT_READ

template <typename... Results, size_t... kIndex>
void write_results(StableIValue* stack, const std::tuple<Results...>& results,
                   std::index_sequence<kIndex...>) {
  ((stack[kIndex] = torch::stable::detail::from(std::get<kIndex>(results))), ...);
}

template <typename... Results>
void write_results(StableIValue* stack, const std::tuple<Results...>& results) {
  write_results(stack, results, std::index_sequence_for<Results...>());
}

inline void write_results(StableIValue* stack, const Tensor& result) {
  stack[0] = torch::stable::detail::from(result);
}

// What torch calls: takes the arguments from the stack and leaves the results there.
using BoxedFunction = void (*)(StableIValue* stack, uint64_t arguments, uint64_t results);

template <auto kFunction>
struct Box;

template <typename Result, typename... Parameters, Result (*kFunction)(Parameters...)>
struct Box<kFunction> {
  static void call(StableIValue* stack, uint64_t count, uint64_t) {
    ArgumentReader reader(stack, count);
    const std::tuple<std::decay_t<Parameters>...> arguments{
        reader.read<std::decay_t<Parameters>>()...};
    IPO_EXT_CHECK(reader.at_end(), "ipo_ext: the schema has more arguments than the operator");
    if constexpr (std::is_void_v<Result>) {
      std::apply(kFunction, arguments);
    } else {
      write_results(stack, std::apply(kFunction, arguments));
    }
  }
};

template <auto kFunction>
constexpr BoxedFunction box = &Box<kFunction>::call;

}  // namespace ipo_ext
