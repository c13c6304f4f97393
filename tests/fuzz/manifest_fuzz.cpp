// SPDX-License-Identifier: Apache-2.0
// Any bytes as a checkpoint's manifest: parsed, or refused with ManifestError; nothing else. The text is sealed before it is parsed, or the checksum would
// stop all of it; it is also parsed as it came. What is accepted must keep what readers rely on: no name leaves the folder, no piece its file,
// every element lies in one piece, and any run of elements is found.
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <set>
#include <string>
#include <utility>

#include "checkpoint/manifest.h"
#include "plan/pieces.h"

namespace {

using ds::checkpoint::Manifest;
using ds::checkpoint::ManifestError;

[[noreturn]] void broken(const char* promise) {
  std::cerr << "promise broken: " << promise << "\n";
  std::abort();
}

void check_files(const Manifest& manifest) {
  std::set<std::string> names;
  for (const auto& file : manifest.files) {
    if (file.name.empty() || file.name[0] == '.' || file.name.find('/') != std::string::npos || file.name.find('\0') != std::string::npos) {
      broken("files are plain names");
    }
    if (!names.insert(file.name).second) broken("files are told apart");
    if (file.bytes < 0) broken("files have a size");
    const auto blocks = static_cast<uint64_t>(file.bytes) / static_cast<uint64_t>(manifest.block_bytes) +
                        (file.bytes % manifest.block_bytes != 0 ? 1 : 0);
    if (file.sums.size() != blocks) broken("every block has a checksum");
  }
}

void check_runs(const ds::checkpoint::TensorRecord& tensor, int64_t begin, int64_t numel) {
  const auto parts = ds::plan::parts_of(tensor.runs, {begin, numel});
  int64_t at = 0;
  for (const auto& part : parts) {
    const auto& run = tensor.runs.at(static_cast<size_t>(part.piece));
    if (part.want_begin != at || part.numel <= 0 || part.piece_begin < 0 || part.piece_begin + part.numel > run.numel ||
        run.begin + part.piece_begin != begin + at) {
      broken("the parts of a run follow each other");
    }
    at += part.numel;
  }
  if (at != numel) broken("the parts of a run are all of it");
}

void check(const Manifest& manifest) {
  check_files(manifest);
  std::set<std::pair<std::string, std::string>> keys;
  for (const auto& tensor : manifest.tensors) {
    if (!keys.insert({tensor.kind, tensor.name}).second) broken("tensors are told apart");
    if (tensor.runs.size() != tensor.places.size()) broken("every run has its place");
    int64_t at = 0;
    for (size_t i = 0; i < tensor.runs.size(); ++i) {
      const auto& run = tensor.runs[i];
      if (run.begin != at || run.numel <= 0) broken("runs cover the tensor once");
      at += run.numel;
      const auto& file = manifest.files.at(static_cast<size_t>(tensor.places[i].file));
      int64_t bytes = 0;
      if (__builtin_mul_overflow(run.numel, tensor.item_bytes, &bytes) || tensor.places[i].offset < 0 ||
          bytes > file.bytes - tensor.places[i].offset) {
        broken("pieces lie inside their files");
      }
    }
    if (at != tensor.numel) broken("runs cover the tensor");
    if (tensor.numel > 0) {
      check_runs(tensor, 0, tensor.numel);
      check_runs(tensor, tensor.numel / 3, tensor.numel - tensor.numel / 3);
      check_runs(tensor, tensor.numel - 1, 1);
    }
  }
}

void parse(const std::string& text) {
  try {
    check(ds::checkpoint::parse_manifest(text));
  } catch (const ManifestError&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string body(reinterpret_cast<const char*>(data), size);
  parse(ds::checkpoint::seal_manifest(body));
  parse(body);
  return 0;
}
