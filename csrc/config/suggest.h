// SPDX-License-Identifier: Apache-2.0
// "Did you mean": the known name that is closest to a misspelt one.
#pragma once

#include <string>
#include <vector>

#include "config/schema.h"

namespace ds::config {

// Insertions, deletions, substitutions and swaps of neighbours that turn one into the other; letter case and _ - are not counted.
size_t edit_distance(const std::string& a, const std::string& b);

// For a name that `section` (at `path`) does not know: `nearest known key: ...`, and the places where just this name is known.
std::string suggestion(const Key& section, const std::string& path, const std::string& name);

}  // namespace ds::config
