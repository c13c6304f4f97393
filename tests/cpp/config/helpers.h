// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "config/config.h"
#include "config/relaxed_json.h"

namespace ds::config {

inline Config loaded(const std::string& text, Options options = {}) {
  return load(parse_relaxed(text, "test"), options);
}

inline ::testing::AssertionResult has(const std::string& text, const std::vector<std::string>& parts, bool wanted) {
  for (const std::string& part : parts) {
    if ((text.find(part) != std::string::npos) != wanted) {
      return ::testing::AssertionFailure() << (wanted ? "missing: " : "should not be there: ") << part << "\nin: " << text;
    }
  }
  return ::testing::AssertionSuccess();
}

// Every part stands in the text; none does.
#define EXPECT_HAS(text, ...) EXPECT_TRUE(::ds::config::has(text, {__VA_ARGS__}, true))
#define EXPECT_LACKS(text, ...) EXPECT_TRUE(::ds::config::has(text, {__VA_ARGS__}, false))

// The message that `text` is refused with; empty if it loads.
inline std::string refusal(const std::string& text, Options options = {}) {
  try {
    loaded(text, options);
    return "";
  } catch (const ConfigError& error) {
    return error.message;
  }
}

inline Options ranks(int64_t size) {
  Options options;
  options.world.size = size;
  options.world.size_source = "the test";
  return options;
}

// A document with a batch size and `rest`.
inline std::string with_batch(const std::string& rest) { return "{\"train_micro_batch_size_per_gpu\": 1, " + rest + "}"; }

}  // namespace ds::config
