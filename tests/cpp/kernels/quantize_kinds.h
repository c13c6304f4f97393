// SPDX-License-Identifier: Apache-2.0
// The formats that quantize.h states, for the tests of both devices.
#pragma once

#include "kernels/quantize/quantize.h"

namespace ds::kernels::testing {

struct Kind {
  QuantFormat format;
  bool symmetric;
  const char* name;
  double largest;
  int mantissa, smallest_exponent;  // floating point: bits, exponent of the smallest normal; integers: 0
};
inline constexpr Kind kKinds[] = {
    {QuantFormat::INT8, true, "int8", 127, 0, 0},           {QuantFormat::INT8, false, "int8 asymmetric", 255, 0, 0},
    {QuantFormat::INT4, true, "int4", 7, 0, 0},             {QuantFormat::INT4, false, "int4 asymmetric", 15, 0, 0},
    {QuantFormat::FP8_E4M3, true, "fp8 e4m3", 448, 3, -6},  {QuantFormat::FP8_E5M2, true, "fp8 e5m2", 57344, 2, -14},
    {QuantFormat::FP6_E3M2, true, "fp6 e3m2", 28, 2, -2},   {QuantFormat::FP4_E2M1, true, "fp4 e2m1", 6, 1, 0},
    {QuantFormat::FP12_E4M7, true, "fp12 e4m7", 510, 7, -6},
};

}  // namespace ds::kernels::testing
