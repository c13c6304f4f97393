// SPDX-License-Identifier: Apache-2.0
// all_reduce of gathered values: in rank order, so that all ranks and all carriers get the same bits.
#pragma once

#include "base/error.h"
#include "comm/transport.h"

namespace ds::comm {

// NaN wins over everything in Max and Min: a non-finite value must not vanish on the way.
inline double combine(Op op, double a, double b) {
  switch (op) {
    case Op::Sum: return a + b;
    case Op::Max: return a != a ? a : (b != b || b > a) ? b : a;
    case Op::Min: return a != a ? a : (b != b || b < a) ? b : a;
  }
  DS_FAIL("all_reduce: not an Op: " << static_cast<int>(op));
}

}  // namespace ds::comm
