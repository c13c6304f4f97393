// SPDX-License-Identifier: Apache-2.0
// int64 arithmetic that throws where the plain operators would wrap.
#pragma once

#include <cstdint>

#include "base/error.h"

namespace ds {

inline int64_t checked_add(int64_t a, int64_t b) {
  int64_t r;
  DS_CHECK(!__builtin_add_overflow(a, b, &r), "integer overflow in " << a << " + " << b);
  return r;
}

inline int64_t checked_sub(int64_t a, int64_t b) {
  int64_t r;
  DS_CHECK(!__builtin_sub_overflow(a, b, &r), "integer overflow in " << a << " - " << b);
  return r;
}

inline int64_t checked_mul(int64_t a, int64_t b) {
  int64_t r;
  DS_CHECK(!__builtin_mul_overflow(a, b, &r), "integer overflow in " << a << " * " << b);
  return r;
}

// Smallest multiple of `multiple` that is >= n. n >= 0, multiple > 0.
inline int64_t round_up(int64_t n, int64_t multiple) {
  DS_CHECK_VALUE(multiple > 0, "round_up: multiple must be positive, got " << multiple);
  DS_CHECK_VALUE(n >= 0, "round_up: n must not be negative, got " << n);
  const int64_t rest = n % multiple;
  return rest == 0 ? n : checked_add(n, multiple - rest);
}

inline int64_t ceil_div(int64_t n, int64_t divisor) {
  DS_CHECK_VALUE(divisor > 0, "ceil_div: divisor must be positive, got " << divisor);
  DS_CHECK_VALUE(n >= 0, "ceil_div: n must not be negative, got " << n);
  return n / divisor + (n % divisor != 0 ? 1 : 0);
}

}  // namespace ds
