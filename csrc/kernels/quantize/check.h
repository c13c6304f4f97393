// SPDX-License-Identifier: Apache-2.0
// The argument checks of quantize.h, the same for SIMD, reference and CUDA.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/quantize/quantize.h"

namespace ds::kernels::quant {

inline void check_blocks(const Blocks& b, int64_t n) {
  DS_CHECK_VALUE(b.group_size >= 1, "group_size must be at least 1, got " << b.group_size);
  DS_CHECK_VALUE(n >= 0, "n must not be negative, got " << n);
  DS_CHECK_VALUE(b.symmetric || b.format == QuantFormat::INT8 || b.format == QuantFormat::INT4,
                 "symmetric: only integer formats can be asymmetric");
}

inline void check_range(const Blocks& b, int64_t n, int64_t first, int64_t last) {
  check_blocks(b, n);
  DS_CHECK_VALUE(first >= 0 && first <= last && last <= quant_blocks(n, b.group_size),
                 "blocks [" << first << ", " << last << ") lie outside the " << quant_blocks(n, b.group_size) << " of the array");
}

inline void check_output(bool symmetric, const Quantized& out, int64_t n) {
  check_arrays(n, {{out.data, "out.data"}, {out.scale, "out.scale"}});
  DS_CHECK_VALUE(symmetric == (out.zero == nullptr) || n == 0, "out.zero belongs to asymmetric blocks and to no others");
}

inline void check_sources(const Blocks& b, const ConstQuantized* src, int nsrc, int64_t n) {
  DS_CHECK_VALUE(nsrc >= 1, "nsrc must be at least 1, got " << nsrc);
  DS_CHECK_VALUE(src != nullptr, "src is null");
  for (int k = 0; k < nsrc; ++k) {
    check_arrays(n, {{src[k].data, "src.data"}, {src[k].scale, "src.scale"}});
    DS_CHECK_VALUE(b.symmetric == (src[k].zero == nullptr) || n == 0, "src.zero belongs to asymmetric blocks and to no others");
  }
}

}  // namespace ds::kernels::quant
