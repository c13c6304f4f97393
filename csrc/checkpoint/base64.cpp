// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/base64.h"

#include <array>
#include <cstdint>

namespace ds::checkpoint {
namespace {

constexpr std::array<int8_t, 256> make_values() {
  std::array<int8_t, 256> values{};
  for (auto& v : values) v = -1;
  const char* letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (int i = 0; i < 64; ++i) values[static_cast<unsigned char>(letters[i])] = static_cast<int8_t>(i);
  return values;
}

constexpr std::array<int8_t, 256> kValues = make_values();

}  // namespace

bool decode_base64(const std::string& text, std::string* bytes) {
  if (text.size() % 4 != 0) return false;
  size_t length = text.size();
  while (length > 0 && text.size() - length < 2 && text[length - 1] == '=') --length;
  uint32_t bits = 0;
  int count = 0;
  bytes->clear();
  bytes->reserve(length / 4 * 3 + 2);
  for (size_t i = 0; i < length; ++i) {
    const int8_t value = kValues[static_cast<unsigned char>(text[i])];
    if (value < 0) return false;
    bits = bits << 6 | static_cast<uint32_t>(value);
    count += 6;
    if (count >= 8) {
      count -= 8;
      bytes->push_back(static_cast<char>(bits >> count & 0xffu));
    }
  }
  return (bits & ((1u << count) - 1)) == 0;
}

}  // namespace ds::checkpoint
