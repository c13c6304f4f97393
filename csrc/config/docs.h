// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace ds::config {

// docs/config.md, whole. A test holds the file in step with the schema.
std::string documentation();

}  // namespace ds::config
