// SPDX-License-Identifier: Apache-2.0
// Include before any Highway header. Which instruction sets are compiled: SSE4, AVX2, AVX-512 (x86), NEON (Arm) and
// plain scalar code. The kernels keep vectors in arrays, which rules out the sizeless ones; SSSE3 machines run scalar.
#pragma once

#define HWY_DISABLED_TARGETS (HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128 | HWY_RVV | HWY_SSSE3)
