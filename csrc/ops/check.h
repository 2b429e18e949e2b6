// IPO_EXT_CHECK: raises a RuntimeError in Python whose text is the message alone. (STD_TORCH_CHECK
// prefixes a source path.)
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace ipo_ext {

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace ipo_ext

#define IPO_EXT_CHECK(condition, ...)                                            \
  do {                                                                           \
    if (!(condition)) throw std::runtime_error(::ipo_ext::message(__VA_ARGS__)); \
  } while (false)
