// SPDX-License-Identifier: Apache-2.0
// Which instruction sets the kernels were compiled for, and which of them this processor gets.
#pragma once

#include <string>
#include <vector>

namespace ds::kernels {

// Names as Highway has them ("AVX3", "AVX2", "SSE4", "NEON", "EMU128" for plain code), best first.
std::vector<std::string> compiled_targets();

// The one the kernels run with here.
std::string chosen_target();

}  // namespace ds::kernels
