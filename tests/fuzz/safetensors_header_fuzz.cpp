// SPDX-License-Identifier: Apache-2.0
// Any bytes as the header of a safetensors file: parsed, or refused with SafetensorsError; nothing else. What is accepted must keep the promises
// that readers rely on: entries lie inside the data one behind the other, each as large as its dtype and shape say, names told apart.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <set>
#include <string>

#include "base/dtype.h"
#include "io/safetensors.h"
#include "io/safetensors_header.h"

namespace {

[[noreturn]] void broken(const char* promise) {
  std::cerr << "promise broken: " << promise << "\n";
  std::abort();
}

void check(const ds::io::SafetensorsHeader& header, int64_t data_bytes) {
  int64_t end = 0;
  std::set<std::string> names;
  for (const auto& tensor : header.tensors) {
    if (tensor.begin_bytes != end || tensor.end_bytes < tensor.begin_bytes) broken("entries follow each other");
    end = tensor.end_bytes;
    if (end > data_bytes) broken("entries lie inside the data");
    int64_t bytes = static_cast<int64_t>(ds::dtype_size(tensor.dtype));
    for (const int64_t extent : tensor.shape) {
      if (extent < 0) broken("extents are not negative");
      if (__builtin_mul_overflow(bytes, extent, &bytes)) broken("sizes can be counted");
    }
    if (bytes != tensor.bytes()) broken("bytes fit dtype and shape");
    if (!names.insert(tensor.name).second) broken("names are told apart");
  }
  if (end != data_bytes) broken("entries cover the data");
}

}  // namespace

// The first 8 bytes choose the size of the data; the rest is the header.
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 8) return 0;
  int64_t data_bytes = 0;
  std::memcpy(&data_bytes, data, 8);
  const std::string text(reinterpret_cast<const char*>(data) + 8, size - 8);
  try {
    check(ds::io::parse_safetensors_header(text, data_bytes), data_bytes);
  } catch (const ds::io::SafetensorsError&) {
  }
  try {
    ds::io::json_quote(text);
  } catch (const ds::io::SafetensorsError&) {
  }
  return 0;
}
