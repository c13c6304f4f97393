// SPDX-License-Identifier: Apache-2.0
// What this machine's processor can do, asked once.
#pragma once

#include <string>
#include <vector>

namespace ds::platform {

struct CpuFeatures {
  bool sse42 = false;
  bool avx2 = false;   // with FMA and F16C, as every AVX2 processor has them
  bool avx512 = false; // F, BW, CD, DQ, VL: the Skylake-X set
  bool avx512_bf16 = false;
  bool amx_bf16 = false;
  bool vpclmulqdq = false;  // with avx512: carry-less products of four pairs at once
  bool neon = false;
  bool sve = false;
};

const CpuFeatures& cpu_features();

// The names of the features present, weakest first, e.g. {"sse4.2", "avx2"}.
std::vector<std::string> cpu_feature_names();

// Marketing name from the operating system, or the architecture when it gives none.
std::string cpu_model_name();

// Cores this process may run on (its affinity mask), at least 1.
int available_cores();

}  // namespace ds::platform
