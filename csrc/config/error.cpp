// SPDX-License-Identifier: Apache-2.0
#include "config/error.h"

#include <cmath>

#include "config/opaque.h"

namespace ds::config {

namespace {

constexpr size_t kMaxShown = 80;      // characters of a value in a message
constexpr size_t kMaxProblems = 50;   // a fuzzer's file should not print a novel

const char* type_word(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null: return "null";
    case Json::value_t::boolean: return "true/false";
    case Json::value_t::number_integer:
    case Json::value_t::number_unsigned: return "integer";
    case Json::value_t::number_float: return "number";
    case Json::value_t::string: return "string";
    case Json::value_t::array: return "list";
    case Json::value_t::object: return "object";
    default: return "Python object";
  }
}

}  // namespace

std::string printable(const std::string& text) {
  std::string result = text;
  for (char& c : result) {
    if ((static_cast<unsigned char>(c) < 0x20 && c != '\n') || c == 0x7F) c = '?';
  }
  return result;
}

std::string shortened(const std::string& text, size_t bytes) {
  if (text.size() <= bytes) return text;
  size_t cut = bytes - 3;
  while (cut > 0 && (static_cast<unsigned char>(text[cut]) & 0xC0) == 0x80) --cut;
  return text.substr(0, cut) + "...";
}

void Findings::problem(const std::string& path, const std::string& text) {
  problems_.push_back(printable(path.empty() ? text : path + ": " + text));
}

void Findings::throw_if_any(const std::string& source) const {
  if (problems_.empty()) return;
  if (problems_.size() == 1) throw ConfigError(source + ": " + problems_[0]);
  std::string text = source + ": " + std::to_string(problems_.size()) + " problems";
  for (size_t i = 0; i < problems_.size() && i < kMaxProblems; ++i) {
    text += "\n  " + std::to_string(i + 1) + ". " + problems_[i];
  }
  if (problems_.size() > kMaxProblems) text += "\n  ...";
  throw ConfigError(text);
}

std::string join(const std::string& path, const std::string& name) { return path.empty() ? name : path + "." + name; }

std::string in_quotes(const std::string& text) { return "\"" + text + "\""; }

std::string show(const Json& value) {
  if (is_opaque(value)) return opaque_type(value);
  if (value.is_number_float() && !std::isfinite(value.get<double>())) {
    const double number = value.get<double>();
    return std::isnan(number) ? "NaN" : number > 0 ? "Infinity" : "-Infinity";
  }
  const std::string text = value.is_structured() && value.size() > kMaxShown
                         ? std::string(value.is_array() ? "[...]" : "{...}")
                         : value.dump(-1, ' ', false, Json::error_handler_t::replace);
  return shortened(text, kMaxShown);
}

std::string show_typed(const Json& value) {
  if (value.is_null()) return "null";
  return show(value) + " (" + type_word(value) + ")";
}

}  // namespace ds::config
