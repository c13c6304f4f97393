// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "base/error.h"

namespace ds {

// A borrowed range of elements: pointer and size, no ownership. at() and sub() check; operator[] does not.
template <typename T>
class Span {
 public:
  constexpr Span() = default;
  constexpr Span(T* data, int64_t size) : data_(data), size_(size) {}

  // From any contiguous container (vector, string, array, Span<U> with U* convertible to T*).
  template <typename C, typename = std::enable_if_t<std::is_convertible_v<decltype(std::declval<C&>().data()), T*>>>
  constexpr Span(C& c) : data_(c.data()), size_(static_cast<int64_t>(c.size())) {}
  template <typename C, typename = std::enable_if_t<std::is_convertible_v<decltype(std::declval<const C&>().data()), T*>>,
            typename = void>
  constexpr Span(const C& c) : data_(c.data()), size_(static_cast<int64_t>(c.size())) {}

  constexpr T* data() const { return data_; }
  constexpr int64_t size() const { return size_; }
  constexpr bool empty() const { return size_ == 0; }
  constexpr T* begin() const { return data_; }
  constexpr T* end() const { return data_ + size_; }
  constexpr T& operator[](int64_t i) const { return data_[i]; }

  T& at(int64_t i) const {
    DS_CHECK_VALUE(i >= 0 && i < size_, "index " << i << " is outside a span of " << size_ << " elements");
    return data_[i];
  }

  // Elements [begin, begin + count).
  Span sub(int64_t begin, int64_t count) const {
    DS_CHECK_VALUE(begin >= 0 && count >= 0 && begin <= size_ && count <= size_ - begin,
                   "range [" << begin << ", +" << count << ") is outside a span of " << size_ << " elements");
    return Span(data_ + begin, count);
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace ds
