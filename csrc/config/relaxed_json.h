// SPDX-License-Identifier: Apache-2.0
// JSON as people write it in configuration files. On top of JSON it reads: comments (//, #, /* */), commas left out at a line's end
// or left over at a list's end, names without quotes, 'single quotes', NaN and Infinity (Python's json writes them).
// It refuses: a name given twice, nesting deeper than 64, bytes that are not UTF-8. Errors name line and column.
#pragma once

#include <string>
#include <string_view>

#include "config/schema.h"

namespace ds::config {

constexpr int kMaxDepth = 64;

// `source` stands in front of error messages. Throws ConfigError.
Json parse_relaxed(std::string_view text, const std::string& source);

}  // namespace ds::config
