// SPDX-License-Identifier: Apache-2.0
// Include this first in a source file whose results must have the same bits on every instruction set: from here on the
// compiler may not contract a * b + c into one rounding. (GCC does so by default, even across SIMD intrinsics.)
#pragma once

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC optimize("fp-contract=off")
#endif
