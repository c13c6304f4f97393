// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace ds::checkpoint {

// RFC 4648 with padding, strictly: no other character, no line ends, unused bits zero. False when `text` is not that.
bool decode_base64(const std::string& text, std::string* bytes);

}  // namespace ds::checkpoint
