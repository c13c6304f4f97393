// SPDX-License-Identifier: Apache-2.0
#include "config/values.h"

#include <cctype>
#include <charconv>
#include <cmath>

#include "config/opaque.h"

namespace ds::config {

namespace {

std::string plain_number(double value) {
  if (value == std::floor(value) && std::abs(value) < 1e15) return std::to_string(static_cast<int64_t>(value));
  return Json(value).dump();
}

std::string range_words(const Key& key) {
  if (key.low && key.high) {
    return (key.low->open ? " above " : " from ") + plain_number(key.low->value) + (key.high->open ? " to below " : " to ") +
           plain_number(key.high->value);
  }
  if (key.low) return key.low->open ? " above " + plain_number(key.low->value) : " of at least " + plain_number(key.low->value);
  if (key.high) return key.high->open ? " below " + plain_number(key.high->value) : " of at most " + plain_number(key.high->value);
  return "";
}

std::string choice_words(const Key& key) {
  std::string text;
  for (const std::string& item : key.choices) text += (text.empty() ? "" : ", ") + in_quotes(item);
  return text;
}

bool in_range(const Key& key, double value) {
  if (std::isnan(value)) return false;
  if (std::isinf(value) && !key.infinite_ok) return false;
  if (key.low && (key.low->open ? value <= key.low->value : value < key.low->value)) return false;
  if (key.high && (key.high->open ? value >= key.high->value : value > key.high->value)) return false;
  return true;
}

std::optional<int64_t> as_integer(const Key& key, const Json& value) {
  if (value.is_number_unsigned()) {
    const uint64_t number = value.get<uint64_t>();
    if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
    return static_cast<int64_t>(number);
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (value.is_number_float()) {
    const double number = value.get<double>();
    if (number != std::floor(number) || !(std::abs(number) < 9.2e18)) return std::nullopt;
    return static_cast<int64_t>(number);
  }
  if (value.is_string() && key.text_numbers) {
    const auto& text = value.get_ref<const std::string&>();
    int64_t number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error == std::errc() && end == text.data() + text.size() && !text.empty()) return number;
  }
  if (value.is_boolean() && key.bool_as_int) return value.get<bool>() ? 1 : 0;
  return std::nullopt;
}

std::optional<double> as_number(const Key& key, const Json& value) {
  if (value.is_number()) return value.get<double>();
  if (value.is_string() && key.text_numbers) {
    const auto& text = value.get_ref<const std::string&>();
    if (text.empty() || std::isspace(static_cast<unsigned char>(text[0]))) return std::nullopt;
    char* end = nullptr;
    const double number = std::strtod(text.c_str(), &end);
    if (end == text.c_str() + text.size()) return number;
  }
  return std::nullopt;
}

std::optional<Json> as_number_list(const Key& key, const Json& value) {
  if (!value.is_array() || (key.length != 0 && value.size() != key.length)) return std::nullopt;
  Json result = Json::array();
  for (const Json& item : value) {
    if (key.type == Type::IntList) {
      const auto number = as_integer(key, item);
      if (!number || !in_range(key, static_cast<double>(*number))) return std::nullopt;
      result.push_back(*number);
    } else {
      const auto number = as_number(key, item);
      if (!number || !in_range(key, *number)) return std::nullopt;
      result.push_back(*number);
    }
  }
  return result;
}

std::optional<Json> as_text_list(const Key& key, const Json& value) {
  if (value.is_string()) {
    if (key.one_text_ok) return Json::array({value});
    return std::nullopt;
  }
  if (!value.is_array()) return std::nullopt;
  for (const Json& item : value) {
    if (!item.is_string()) return std::nullopt;
  }
  return value;
}

std::optional<Json> as_choice(const Key& key, const Json& value) {
  if (!value.is_string()) return std::nullopt;
  const auto& text = value.get_ref<const std::string&>();
  for (const std::string& item : key.choices) {
    if (text == item || (key.any_case && lower(text) == lower(item))) return Json(item);
  }
  return std::nullopt;
}

std::optional<Json> as_dtype(const Json& value) {
  std::string name;
  if (value.is_string()) name = dtype_short_name(value.get<std::string>());
  if (is_opaque(value)) name = dtype_short_name(opaque_type(value));
  if (name.empty()) return std::nullopt;
  return Json(name);
}

std::optional<Json> converted(const Key& key, const Json& value) {
  switch (key.type) {
    case Type::Bool: {
      if (key.real_bool && !value.is_boolean()) return std::nullopt;
      const auto truth = as_bool(value);
      if (truth) return Json(*truth);
      return std::nullopt;
    }
    case Type::Int: {
      const auto number = as_integer(key, value);
      if (number && in_range(key, static_cast<double>(*number))) return Json(*number);
      return std::nullopt;
    }
    case Type::Number: {
      const auto number = as_number(key, value);
      if (number && in_range(key, *number)) return Json(*number);
      return std::nullopt;
    }
    case Type::NumberOrList: {
      if (value.is_array()) return as_number_list(key, value);
      const auto number = as_number(key, value);
      if (number && in_range(key, *number)) return Json(*number);
      return std::nullopt;
    }
    case Type::Text: return value.is_string() ? std::optional<Json>(value) : std::nullopt;
    case Type::Choice: return as_choice(key, value);
    case Type::Dtype: return as_dtype(value);
    case Type::TextList: return as_text_list(key, value);
    case Type::NumberList:
    case Type::IntList: return as_number_list(key, value);
    default: return value;
  }
}

}  // namespace

std::string lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

std::string dtype_short_name(std::string name) {
  name = lower(std::move(name));
  if (name.rfind("torch.", 0) == 0) name = name.substr(6);
  if (name == "fp16" || name == "float16" || name == "half") return "fp16";
  if (name == "bf16" || name == "bfloat16" || name == "bfloat") return "bf16";
  if (name == "fp32" || name == "float32" || name == "float") return "fp32";
  return "";
}

std::optional<bool> as_bool(const Json& value) {
  if (value.is_boolean()) return value.get<bool>();
  if (value.is_number()) {
    if (value == 0) return false;
    if (value == 1) return true;
    return std::nullopt;
  }
  if (!value.is_string()) return std::nullopt;
  const std::string text = lower(value.get<std::string>());
  for (const char* word : {"true", "yes", "on", "1", "t", "y"}) {
    if (text == word) return true;
  }
  for (const char* word : {"false", "no", "off", "0", "f", "n"}) {
    if (text == word) return false;
  }
  return std::nullopt;
}

Json without_auto(const Json& value) {
  if (value.is_array()) {
    Json result = Json::array();
    for (const Json& item : value) result.push_back(without_auto(item));
    return result;
  }
  if (!value.is_object()) return value;
  Json result = Json::object();
  for (const auto& [name, item] : value.items()) {
    if (!(item.is_string() && item.get_ref<const std::string&>() == "auto")) append_member(result, name, without_auto(item));
  }
  return result;
}

std::string allowed(const Key& key) {
  switch (key.type) {
    case Type::Bool: return "true or false";
    case Type::Int: return "an integer" + range_words(key);
    case Type::Number: return "a number" + range_words(key) + (key.infinite_ok ? ", or Infinity" : "");
    case Type::Text: return "a string";
    case Type::Choice: return "one of " + choice_words(key) + (key.any_case ? " (in any case)" : "");
    case Type::Dtype: return "one of \"fp32\", \"fp16\", \"bf16\"";
    case Type::TextList:
      return std::string("a list of strings") + (key.one_text_ok ? " or one string" : "") +
             (key.listed_word ? " or " + choice_words(key) : "");
    case Type::NumberList:
      return "a list of " + (key.length ? std::to_string(key.length) + " " : std::string()) + "numbers" + range_words(key);
    case Type::NumberOrList: return "a number" + range_words(key) + " or a list of such";
    case Type::IntList: return "a list of integers" + range_words(key);
    case Type::Object: return std::string("an object {...}") + (key.bool_as_int ? ", or true or false" : "");
    case Type::Map: return "an object of objects";
    case Type::ObjectList: return "a list of objects";
    case Type::Free: return "an object {...}";
    case Type::Any: return "any value";
  }
  return "";
}

std::optional<Json> typed_value(const Key& key, const Json& value, const std::string& path, Findings& findings) {
  std::optional<Json> result = converted(key, value);
  if (!result) findings.problem(path, "found " + show_typed(value) + "; allowed: " + allowed(key));
  return result;
}

}  // namespace ds::config
