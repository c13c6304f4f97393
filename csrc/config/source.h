// SPDX-License-Identifier: Apache-2.0
// Where a document comes from when it is not an object yet: a file, base64 text, or JSON text.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "config/schema.h"

namespace ds::config {

struct Document {
  Json json;
  std::string source;  // for messages: the path, or what else it was
};

// `text` is a path if such a file exists; else JSON if it starts with '{'; else base64 of JSON (URL-safe or plain alphabet, padding
// optional) if it decodes to something that starts like JSON; else the error is "file not found".
Document read_document(const std::string& text);

std::optional<std::string> decode_base64(std::string_view text);

}  // namespace ds::config
