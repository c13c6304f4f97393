// SPDX-License-Identifier: Apache-2.0
// A Python object that JSON has no form for (a torch.dtype, a class, a process group) stands in the document as a numbered
// placeholder: a JSON binary whose subtype is the number and whose bytes are the type's name. The bindings hold the objects.
#pragma once

#include <string>

#include "config/schema.h"

namespace ds::config {

inline Json make_opaque(uint64_t number, const std::string& type_name) {
  return Json::binary(Json::binary_t::container_type(type_name.begin(), type_name.end()), number);
}
inline bool is_opaque(const Json& value) { return value.is_binary(); }
inline uint64_t opaque_number(const Json& value) { return value.get_binary().subtype(); }
inline std::string opaque_type(const Json& value) {
  return std::string(value.get_binary().begin(), value.get_binary().end());
}

}  // namespace ds::config
