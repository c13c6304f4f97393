// SPDX-License-Identifier: Apache-2.0
// Memory that is kept from step to step. On the host it comes from the system and not from malloc: blocks that live for
// the whole run, allocated between activations that come and go, would leave the heap full of holes (130 MiB of them
// for a model of 300 M parameters), and large pages make the step's one pass over it faster.
#pragma once

#include <ATen/core/Tensor.h>

namespace ds::optim {

// uint8 [bytes], zero-filled, page-aligned, given back in full when freed; pages become resident when written.
at::Tensor host_bytes(int64_t bytes);

// [numel] zeros of `type` on `device`.
at::Tensor long_lived_zeros(int64_t numel, at::ScalarType type, at::Device device);

// A contiguous copy of `source` in such memory.
at::Tensor long_lived_copy(const at::Tensor& source);

// Moves the pages of a tensor on the host that is there to stay, whoever allocated it, together into huge pages; its address stays. Advice.
void settle(const at::Tensor& t);

// For what may stay or not, as gradients: settled when it is seen a second time and has been alive in between. Small tensors are left alone.
void settle_if_it_stays(const at::Tensor& t);

// Frees what a dense tensor on the host occupies, and its values with it; its address stays. False, with errno, where the system keeps it.
bool discard(const at::Tensor& t);

}  // namespace ds::optim
