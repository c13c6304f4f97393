// SPDX-License-Identifier: Apache-2.0
#include "config/source.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sys/stat.h>

#include "config/error.h"
#include "config/relaxed_json.h"

namespace ds::config {

namespace {

constexpr size_t kMaxBytes = size_t{1} << 20;  // a configuration, not a data set
constexpr size_t kMaxShownPath = 200;

int base64_digit(char c) {
  if (c >= 'A' && c <= 'Z') return c - 'A';
  if (c >= 'a' && c <= 'z') return c - 'a' + 26;
  if (c >= '0' && c <= '9') return c - '0' + 52;
  if (c == '-' || c == '+') return 62;
  if (c == '_' || c == '/') return 63;
  return -1;
}

bool starts_like_json(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\r\n\xEF\xBB\xBF");
  return first != std::string::npos &&
         (text[first] == '{' || text[first] == '#' || text.compare(first, 2, "//") == 0 || text.compare(first, 2, "/*") == 0);
}

void check_size(size_t bytes, const std::string& source) {
  if (bytes > kMaxBytes)
    throw ConfigError(source + ": larger than " + std::to_string(kMaxBytes >> 20) + " MiB; this is not a configuration file");
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw ConfigError(path + ": cannot be opened: " + std::strerror(errno));
  std::string text(kMaxBytes + 1, '\0');  // not by the size the system tells: pipes have none
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (file.bad()) throw ConfigError(path + ": cannot be read: " + std::strerror(errno));
  text.resize(static_cast<size_t>(file.gcount()));
  check_size(text.size(), path);
  return text;
}

}  // namespace

std::optional<std::string> decode_base64(std::string_view text) {
  while (!text.empty() && (text.back() == '=' || text.back() == '\n')) text.remove_suffix(1);
  if (text.size() % 4 == 1) return std::nullopt;
  std::string result;
  uint32_t bits = 0;
  int count = 0;
  for (const char c : text) {
    const int digit = base64_digit(c);
    if (digit < 0) return std::nullopt;
    bits = (bits << 6) | static_cast<uint32_t>(digit);
    count += 6;
    if (count >= 8) {
      count -= 8;
      result += static_cast<char>((bits >> count) & 0xFF);
    }
  }
  return result;
}

Document read_document(const std::string& text) {
  const std::string shown = printable(shortened(text, kMaxShownPath));
  if (text.empty()) throw ConfigError("config: the path is empty");
  struct stat info;
  if (text.find('\0') == std::string::npos && ::stat(text.c_str(), &info) == 0) {
    if (S_ISDIR(info.st_mode)) throw ConfigError(shown + ": this is a directory, not a configuration file");
    return {parse_relaxed(read_file(text), text), text};
  }
  if (starts_like_json(text)) {
    check_size(text.size(), "config text");
    return {parse_relaxed(text, "config text"), "config text"};
  }
  const std::optional<std::string> decoded = decode_base64(text);
  if (decoded && starts_like_json(*decoded)) {
    check_size(decoded->size(), "base64 config");
    return {parse_relaxed(*decoded, "base64 config"), "base64 config"};
  }
  throw ConfigError("file not found: " + shown + " (nor is it base64 text of a configuration)");
}

}  // namespace ds::config
