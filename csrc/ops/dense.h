// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace ds::ops {

// Every operator of deepspeed:: refuses sparse, quantized, nested and MKL-DNN tensors by the argument's name. Call once, when all are registered.
void refuse_what_is_not_dense();

}  // namespace ds::ops
