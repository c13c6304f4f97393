// SPDX-License-Identifier: Apache-2.0
// The subset of JSON that a safetensors header is made of. Own, because general parsers accept what this format forbids
// (repeated names, fractions, nesting without bound).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace ds::io {

struct RawTensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<int64_t> data_offsets;
};

struct RawHeader {
  std::vector<RawTensor> tensors;  // in the order written
  std::map<std::string, std::string> metadata;
};

// Syntax, encoding and repeated names are checked here, meaning by the caller. Throws SafetensorsError.
RawHeader parse_header_json(const std::string& text);

// One tensor as the header states it; offsets count from the start of the data.
struct HeaderEntry {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  int64_t begin_bytes = 0;
  int64_t end_bytes = 0;
};

// The JSON of a header, tensors in the order given.
std::string write_header_json(const std::vector<HeaderEntry>& tensors, const std::map<std::string, std::string>& metadata);

// `text` as a JSON string with quotes. Throws SafetensorsError when it is not UTF-8.
std::string json_quote(const std::string& text);

}  // namespace ds::io
