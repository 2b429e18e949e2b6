// The Python module `_C`: what this build is and what its operators' rows are called. Importing it
// registers the operators (ops/register.cpp); no torch header is seen here, because torch bundles
// an older pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "kernels/cpu_arch.h"
#include "math/components.h"
#include "math/histogram.h"
#include "math/metrics.h"
#include "math/softmax_row.h"
#include "math/support.h"

namespace {

#define IPO_EXT_NAME(name, ...) #name,

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    items.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return items;
}

pybind11::tuple names(const std::vector<std::string>& items) {
  return pybind11::tuple(pybind11::cast(items));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("VERSION") = IPO_EXT_VERSION;
  m.attr("COMMIT") = IPO_EXT_COMMIT;  // empty for a build from an archive
  m.attr("TORCH_AT_BUILD") = IPO_EXT_TORCH_AT_BUILD;
  m.attr("CUDA_COMPILER") = IPO_EXT_CUDA_COMPILER;  // empty without CUDA
  m.attr("CUDA_ARCHITECTURES") = names(split(IPO_EXT_CUDA_ARCHITECTURES));
  m.attr("CPU_ARCHITECTURE") = ipo_ext::cpu::chosen_arch();  // throws for a name of none
  // In float32 and in float64.
  m.attr("HIGHEST_TEMPERATURES") = pybind11::make_tuple(ipo_ext::math::kHighestTemperature<float>,
                                                        ipo_ext::math::kHighestTemperature<double>);
  m.attr("SUM_ROWS") = names({IPO_EXT_COUNT_ROWS(IPO_EXT_NAME) IPO_EXT_SUM_ROWS(IPO_EXT_NAME)
                                  IPO_EXT_SEGMENT_ROWS(IPO_EXT_NAME)});
  m.attr("EXTREME_ROWS") = names({IPO_EXT_EXTREME_ROWS(IPO_EXT_NAME)});
  m.attr("MEAN_ROWS") = names({IPO_EXT_MEAN_ROWS(IPO_EXT_NAME)});
  // How many rows the statistics of sequences have, which ranks exchange.
  m.attr("STATISTIC_SUMS") = static_cast<int>(ipo_ext::math::statistics::kNumSums);
  m.attr("STATISTIC_EXTREMES") = static_cast<int>(ipo_ext::math::statistics::kNumExtremes);
  m.attr("SEQUENCE_TOTALS") = static_cast<int>(ipo_ext::math::statistics::kNumTotals);
  m.attr("COMPONENT_MEAN_ROWS") = names({IPO_EXT_COMPONENT_MEANS(IPO_EXT_NAME)});
  m.attr("HISTOGRAM_BINS") = ipo_ext::math::kBins;
  // Behind the rows of sums and means, where a sampling mask is replayed.
  m.attr("REPLAY_ROWS") = names({IPO_EXT_REPLAY_ROWS(IPO_EXT_NAME)});
}
