// SPDX-License-Identifier: Apache-2.0
#include "io/safetensors_header.h"

#include <cstdio>
#include <cstring>
#include <set>

#include "io/safetensors.h"

namespace ds::io {
namespace {

[[noreturn]] void fail(SafetensorsFault fault, const std::string& message) {
  throw SafetensorsError(__FILE__, __LINE__, std::string(fault_name(fault)) + ": " + message, fault);
}

// Length of the well-formed UTF-8 sequence at text[i], 0 if there is none (overlong forms and surrogates included).
size_t utf8_length(const std::string& text, size_t i) {
  const auto byte = [&](size_t k) { return k < text.size() ? static_cast<unsigned char>(text[k]) : 0u; };
  const auto follows = [&](size_t k) { return (byte(k) & 0xc0u) == 0x80u; };
  const unsigned first = byte(i);
  if (first < 0x80) return 1;
  if (first >= 0xc2 && first <= 0xdf) return follows(i + 1) ? 2 : 0;
  if ((first & 0xf0u) == 0xe0u) {
    if ((first == 0xe0 && byte(i + 1) < 0xa0) || (first == 0xed && byte(i + 1) > 0x9f)) return 0;
    return follows(i + 1) && follows(i + 2) ? 3 : 0;
  }
  if (first >= 0xf0 && first <= 0xf4) {
    if ((first == 0xf0 && byte(i + 1) < 0x90) || (first == 0xf4 && byte(i + 1) > 0x8f)) return 0;
    return follows(i + 1) && follows(i + 2) && follows(i + 3) ? 4 : 0;
  }
  return 0;
}

void append_utf8(std::string& out, uint32_t code) {
  const auto put = [&](uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 | (code >> 6)), put(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    put(0xe0 | (code >> 12)), put(0x80 | ((code >> 6) & 0x3f)), put(0x80 | (code & 0x3f));
  } else {
    put(0xf0 | (code >> 18)), put(0x80 | ((code >> 12) & 0x3f)), put(0x80 | ((code >> 6) & 0x3f)), put(0x80 | (code & 0x3f));
  }
}

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  RawHeader parse() {
    RawHeader header;
    std::set<std::string> names;
    bool has_metadata = false;
    object([&](const std::string& name) {
      if (name == "__metadata__") {
        if (has_metadata) fail(SafetensorsFault::DuplicateName, "'__metadata__' occurs twice");
        has_metadata = true;
        header.metadata = metadata();
        return;
      }
      if (!names.insert(name).second) fail(SafetensorsFault::DuplicateName, "tensor '" + name + "' occurs twice");
      header.tensors.push_back(tensor(name));
    });
    skip_space();
    if (at_ != text_.size()) syntax("characters after the closing brace");
    return header;
  }

 private:
  [[noreturn]] void syntax(const std::string& message) const {
    fail(SafetensorsFault::HeaderSyntax, message + " at byte " + std::to_string(at_) + " of the header");
  }

  void skip_space() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_]) != nullptr && text_[at_] != '\0') ++at_;
  }

  bool take(char c) {
    skip_space();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!take(c)) syntax(std::string("expected '") + c + "'");
  }

  // Calls member(key) with the position at the key's value.
  template <typename Member>
  void object(Member member) {
    expect('{');
    if (take('}')) return;
    do {
      const std::string key = string();
      expect(':');
      member(key);
    } while (take(','));
    expect('}');
  }

  std::map<std::string, std::string> metadata() {
    std::map<std::string, std::string> result;
    object([&](const std::string& key) {
      if (!result.emplace(key, string()).second) fail(SafetensorsFault::DuplicateName, "metadata key '" + key + "' occurs twice");
    });
    return result;
  }

  RawTensor tensor(const std::string& name) {
    RawTensor result;
    result.name = name;
    bool dtype = false, shape = false, offsets = false;
    object([&](const std::string& key) {
      bool* seen = key == "dtype" ? &dtype : key == "shape" ? &shape : key == "data_offsets" ? &offsets : nullptr;
      if (seen == nullptr) syntax("tensor '" + name + "' has the unknown key '" + key + "'");
      if (*seen) fail(SafetensorsFault::DuplicateName, "key '" + key + "' of tensor '" + name + "' occurs twice");
      *seen = true;
      if (key == "dtype") result.dtype = string();
      if (key == "shape") result.shape = integers();
      if (key == "data_offsets") result.data_offsets = integers();
    });
    if (!dtype || !shape || !offsets) syntax("tensor '" + name + "' lacks dtype, shape or data_offsets");
    if (result.data_offsets.size() != 2) syntax("data_offsets of tensor '" + name + "' are not two numbers");
    return result;
  }

  std::vector<int64_t> integers() {
    std::vector<int64_t> result;
    expect('[');
    if (take(']')) return result;
    do {
      result.push_back(integer());
    } while (take(','));
    expect(']');
    return result;
  }

  int64_t integer() {
    skip_space();
    const size_t begin = at_;
    int64_t value = 0;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, text_[at_] - '0', &value)) {
        syntax("a number is too large");
      }
      ++at_;
    }
    if (at_ == begin) syntax("expected a whole number >= 0");
    if (text_[begin] == '0' && at_ - begin > 1) syntax("a number begins with 0");
    return value;
  }

  std::string string() {
    expect('"');
    std::string result;
    while (true) {
      if (at_ >= text_.size()) syntax("a string does not end");
      const unsigned char c = static_cast<unsigned char>(text_[at_]);
      if (c == '"') break;
      if (c < 0x20) syntax("control character in a string");
      if (c == '\\') {
        ++at_;
        escape(result);
        continue;
      }
      const size_t length = utf8_length(text_, at_);
      if (length == 0) fail(SafetensorsFault::HeaderEncoding, "byte " + std::to_string(at_) + " of the header is not UTF-8");
      result.append(text_, at_, length);
      at_ += length;
    }
    ++at_;
    return result;
  }

  void escape(std::string& out) {
    const char c = at_ < text_.size() ? text_[at_++] : '\0';
    static const char kFrom[] = "\"\\/bfnrt";
    static const char kTo[] = "\"\\/\b\f\n\r\t";
    if (c == 'u') {
      uint32_t code = hex4();
      if (code >= 0xd800 && code < 0xdc00) {  // first half of a surrogate pair
        if (text_.compare(at_, 2, "\\u") != 0) syntax("half a surrogate pair");
        at_ += 2;
        const uint32_t low = hex4();
        if (low < 0xdc00 || low > 0xdfff) syntax("half a surrogate pair");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
      } else if (code >= 0xdc00 && code <= 0xdfff) {
        syntax("half a surrogate pair");
      }
      append_utf8(out, code);
      return;
    }
    const char* found = c == '\0' ? nullptr : std::strchr(kFrom, c);
    if (found == nullptr) syntax("unknown escape in a string");
    out.push_back(kTo[found - kFrom]);
  }

  uint32_t hex4() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      static const char kDigits[] = "0123456789abcdef0123456789ABCDEF";
      const char* digit = at_ < text_.size() && text_[at_] != '\0' ? std::strchr(kDigits, text_[at_]) : nullptr;
      if (digit == nullptr) syntax("\\u needs four hexadecimal digits");
      value = value * 16 + static_cast<uint32_t>(digit - kDigits) % 16;
    }
    return value;
  }

  const std::string& text_;
  size_t at_ = 0;
};

}  // namespace

RawHeader parse_header_json(const std::string& text) { return Parser(text).parse(); }

std::string write_header_json(const std::vector<HeaderEntry>& tensors, const std::map<std::string, std::string>& metadata) {
  std::string text = "{";
  if (!metadata.empty()) {
    text += "\"__metadata__\":{";
    bool first = true;
    for (const auto& [key, value] : metadata) {
      text += (first ? "" : ",") + json_quote(key) + ":" + json_quote(value);
      first = false;
    }
    text += '}';
  }
  for (const HeaderEntry& tensor : tensors) {
    if (text.size() > 1) text += ',';
    text += json_quote(tensor.name) + ":{\"dtype\":\"" + tensor.dtype + "\",\"shape\":[";
    for (size_t i = 0; i < tensor.shape.size(); ++i) text += (i ? "," : "") + std::to_string(tensor.shape[i]);
    text += "],\"data_offsets\":[" + std::to_string(tensor.begin_bytes) + "," + std::to_string(tensor.end_bytes) + "]}";
  }
  return text + '}';
}

std::string json_quote(const std::string& text) {
  std::string out = "\"";
  for (size_t i = 0; i < text.size();) {
    const size_t length = utf8_length(text, i);
    if (length == 0) fail(SafetensorsFault::HeaderEncoding, "a tensor name or metadata text is not UTF-8");
    const unsigned char c = static_cast<unsigned char>(text[i]);
    if (c == '"' || c == '\\') {
      out += '\\';
      out += text[i];
    } else if (c < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), "\\u%04x", c);
      out += escaped;
    } else {
      out.append(text, i, length);
    }
    i += length;
  }
  return out + '"';
}

}  // namespace ds::io
