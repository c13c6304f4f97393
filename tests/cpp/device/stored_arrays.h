// SPDX-License-Identifier: Apache-2.0
// An array in some form (kernels/optim/stored.h), with its scales or low bits, guarded as DeviceArray is.
#pragma once

#include <string>
#include <vector>

#include "arrays.h"
#include "kernels/optim/forms.h"
#include "kernels/optim/stored.h"

namespace ds::kernels::testing {

class StoredArray {
 public:
  StoredArray(Form form, int64_t n, int64_t offset = 0) : StoredArray(form, n, offset, offset) {}
  StoredArray(Form form, int64_t n, int64_t offset, int64_t extra_offset)
      : form_(form), n_(n), offset_(offset), data_(type_of(form), n, offset),
        extra_(form == Form::Split ? DType::I16 : DType::F32, extras(form, n), extra_offset) {}

  Stored stored() { return {form_, data_.data(), extra_.size() > 0 ? extra_.data() : nullptr}; }
  int64_t offset() const { return offset_; }
  void fill(unsigned seed, float low, float high) {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<float> value(low, high);
    std::vector<float> x(static_cast<size_t>(n_));
    for (float& v : x) v = value(generator);
    narrow_ref(x.data(), stored(), {}, n_);
  }
  std::vector<float> values() {
    std::vector<float> x(static_cast<size_t>(n_));
    widen_ref(stored(), x.data(), n_);
    return x;
  }
  bool same_bits(StoredArray& other) { return data_.same_bits(other.data_) && extra_.same_bits(other.extra_); }
  bool guards_intact() const { return data_.guards_intact() && extra_.guards_intact(); }
  std::string bits() const { return data_.bits() + extra_.bits(); }

 private:
  static DType type_of(Form form) { return form == Form::F32 ? DType::F32 : form_size(form) == 1 ? DType::U8 : DType::I16; }
  static int64_t extras(Form form, int64_t n) { return form == Form::Split ? n : form_size(form) == 1 ? code_blocks(n) : 0; }
  Form form_;
  int64_t n_, offset_;
  DeviceArray data_, extra_;
};

}  // namespace ds::kernels::testing
