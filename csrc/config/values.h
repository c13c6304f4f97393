// SPDX-License-Identifier: Apache-2.0
// One value against one row of the schema.
#pragma once

#include <optional>
#include <string>

#include "config/error.h"
#include "config/schema.h"

namespace ds::config {

// What a row allows, in words: `an integer from 0 to 3`. Used in messages and in the documentation.
std::string allowed(const Key& key);

// The value in the row's type, e.g. 5e8 as an integer; nothing, and a problem recorded, if it does not fit.
// Not for objects; null and "auto" never get here.
std::optional<Json> typed_value(const Key& key, const Json& value, const std::string& path, Findings& findings);

// true, 1, "yes", ... ; nothing if it is no truth value.
std::optional<bool> as_bool(const Json& value);

// "fp16", "bf16" or "fp32" for any common spelling, empty otherwise.
std::string dtype_short_name(std::string name);

std::string lower(std::string text);

// Adds a member whose name is not there yet. ordered_json's own insertion compares with every name before it.
inline void append_member(Json& object, std::string name, Json value) {
  auto& members = object.get_ref<Json::object_t&>();
  static_cast<Json::object_t::Container&>(members).emplace_back(std::move(name), std::move(value));
}

// A copy without the members that are "auto", at any depth.
Json without_auto(const Json& value);

inline bool not_given(const Json& value) { return value.is_null() || (value.is_string() && value.get_ref<const std::string&>() == "auto"); }

}  // namespace ds::config
