// SPDX-License-Identifier: Apache-2.0
#include "platform/env.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "base/error.h"

namespace ds::platform {

const std::vector<EnvVariable>& env_table() {
  static const std::vector<EnvVariable> table = {
      {"RANK", nullptr, "global rank of this process, set by the launcher"},
      {"LOCAL_RANK", nullptr, "rank of this process on its host, set by the launcher"},
      {"WORLD_SIZE", nullptr, "number of processes, set by the launcher"},
      {"DS_HUGE_PAGES", "1", "0: do not advise huge pages for large buffers"},
      {"DS_IO_ENGINE", "auto", "auto, uring or threads: how files are read and written"},
      {"DS_IO_FAULTS", nullptr, "for tests: faults of the file engine at random, e.g. seed=1,error=0.01,torn=0.01,cut=0.1,again=0.1,delay=0.1"},
  };
  return table;
}

std::optional<std::string> env_string(const char* name) {
  for (const EnvVariable& variable : env_table()) {
    if (std::strcmp(variable.name, name) != 0) continue;
    const char* value = std::getenv(name);
    if (value != nullptr && *value != '\0') return std::string(value);
    if (variable.fallback != nullptr) return std::string(variable.fallback);
    return std::nullopt;
  }
  DS_FAIL("environment variable " << name << " is not in the table of platform/env.cpp");
}

std::optional<int64_t> env_int(const char* name) {
  const std::optional<std::string> text = env_string(name);
  if (!text) return std::nullopt;
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text->c_str(), &end, 10);
  DS_CHECK_VALUE(errno == 0 && end != text->c_str() && *end == '\0',
                 "environment variable " << name << " must be an integer, got '" << *text << "'");
  return value;
}

std::optional<bool> env_bool(const char* name) {
  const std::optional<std::string> text = env_string(name);
  if (!text) return std::nullopt;
  for (const char* word : {"1", "true", "on", "yes"}) {
    if (*text == word) return true;
  }
  for (const char* word : {"0", "false", "off", "no"}) {
    if (*text == word) return false;
  }
  DS_FAIL_VALUE("environment variable " << name << " must be 1/0, true/false, on/off or yes/no, got '" << *text << "'");
}

}  // namespace ds::platform
