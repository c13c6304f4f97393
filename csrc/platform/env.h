// SPDX-License-Identifier: Apache-2.0
// The one reader of environment variables in C++. A variable that is not in the table (env.cpp) cannot be read, so the table
// is the complete list; a value that does not parse throws and names the variable.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace ds::platform {

struct EnvVariable {
  const char* name;
  const char* fallback;  // the value when unset; nullptr: none
  const char* meaning;
};

const std::vector<EnvVariable>& env_table();

// The set value, else the table's fallback, else nothing. An empty value counts as unset.
std::optional<std::string> env_string(const char* name);
std::optional<int64_t> env_int(const char* name);
std::optional<bool> env_bool(const char* name);  // 1/0, true/false, on/off, yes/no

}  // namespace ds::platform
