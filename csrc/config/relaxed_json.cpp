// SPDX-License-Identifier: Apache-2.0
#include "config/relaxed_json.h"

#include <charconv>
#include <cstdlib>
#include <limits>
#include <unordered_map>

#include "config/error.h"
#include "config/values.h"

namespace ds::config {

namespace {

bool is_name_start(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c == '$'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_name_char(char c) { return is_name_start(c) || is_digit(c) || c == '-' || c == '.'; }

// Length of the UTF-8 character at p, 0 if there is none. Overlong forms and surrogates are not UTF-8.
size_t utf8_length(const char* p, const char* end) {
  const auto byte = [p](size_t i) { return static_cast<unsigned char>(p[i]); };
  const size_t left = static_cast<size_t>(end - p);
  const auto tail = [&](size_t i) { return i < left && (byte(i) & 0xC0) == 0x80; };
  if (byte(0) < 0x80) return 1;
  if (byte(0) >= 0xC2 && byte(0) <= 0xDF) return tail(1) ? 2 : 0;
  if (byte(0) >= 0xE0 && byte(0) <= 0xEF) {
    if (!tail(1) || !tail(2) || (byte(0) == 0xE0 && byte(1) < 0xA0) || (byte(0) == 0xED && byte(1) > 0x9F)) return 0;
    return 3;
  }
  if (byte(0) >= 0xF0 && byte(0) <= 0xF4) {
    if (!tail(1) || !tail(2) || !tail(3) || (byte(0) == 0xF0 && byte(1) < 0x90) || (byte(0) == 0xF4 && byte(1) > 0x8F)) return 0;
    return 4;
  }
  return 0;
}

class Reader {
 public:
  Reader(std::string_view text, const std::string& source) : text_(text), source_(source) {}

  Json document() {
    check_utf8();
    if (text_.substr(0, 3) == "\xEF\xBB\xBF") at_ = 3;
    skip_blank();
    if (at_ == text_.size()) fail(at_, "the document is empty");
    if (text_[at_] != '{') fail(at_, "the document must be an object, starting with '{'");
    Json result = value();
    skip_blank();
    if (at_ != text_.size()) fail(at_, "unexpected text after the end of the document");
    return result;
  }

 private:
  [[noreturn]] void fail(size_t where, const std::string& what) const {
    throw ConfigError(source_ + ", " + place(where) + ": " + printable(what));
  }

  std::string place(size_t where) const {
    size_t line = 1, column = 1;
    for (size_t i = 0; i < where && i < text_.size(); ++i) {
      column = text_[i] == '\n' ? 1 : column + 1;
      line += text_[i] == '\n';
    }
    return "line " + std::to_string(line) + " column " + std::to_string(column);
  }

  void check_utf8() const {
    for (size_t i = 0; i < text_.size();) {
      const size_t length = utf8_length(text_.data() + i, text_.data() + text_.size());
      if (length == 0) fail(i, "the text is not UTF-8");
      i += length;
    }
  }

  char peek(size_t ahead = 0) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0'; }
  bool at_end() const { return at_ >= text_.size(); }

  // Skips white space and comments; true if a line ended in between.
  bool skip_blank() {
    bool line_ended = false;
    while (!at_end()) {
      const char c = text_[at_];
      if (c == '\n') line_ended = true;
      if (c == ' ' || c == '\t' || c == '\r' || c == '\n') {
        ++at_;
      } else if (c == '#' || (c == '/' && peek(1) == '/')) {
        while (!at_end() && text_[at_] != '\n') ++at_;
      } else if (c == '/' && peek(1) == '*') {
        const size_t close = text_.find("*/", at_ + 2);
        if (close == std::string_view::npos) fail(at_, "this comment is never closed");
        at_ = close + 2;
      } else {
        break;
      }
    }
    return line_ended;
  }

  Json value() {
    const char c = peek();
    if (at_end()) fail(at_, "the text ends where a value should stand");
    if (c == '{' || c == '[') {
      if (depth_ == kMaxDepth) fail(at_, "nested deeper than " + std::to_string(kMaxDepth) + " levels");
      ++depth_;
      Json result = c == '{' ? object() : array();
      --depth_;
      return result;
    }
    if (c == '"' || c == '\'') return string();
    if (c == '-' || c == '+' || c == '.' || is_digit(c)) return number();
    return word();
  }

  // After a member: true if another may follow. A comma may be missing at the end of a line.
  bool separator(char close) {
    const bool line_ended = skip_blank();
    if (peek() == ',' && !at_end()) {
      ++at_;
      skip_blank();
      if (peek() == ',') fail(at_, "two commas in a row");
      return true;
    }
    if (peek() == close || line_ended) return true;
    if (at_end()) fail(at_, std::string("the text ends before '") + close + "'");
    fail(at_, std::string("expected ',' or '") + close + "'");
  }

  Json object() {
    Json result = Json::object();
    std::unordered_map<std::string, size_t> seen;  // where each name stands
    ++at_;
    skip_blank();
    while (peek() != '}' || at_end()) {
      if (at_end()) fail(at_, "the text ends before '}'");
      const size_t where = at_;
      std::string key = name();
      const auto [first, fresh] = seen.emplace(key, where);
      const std::string outer = path_;
      path_ = join(path_, key);
      if (!fresh) fail(where, in_quotes(path_) + " is given twice, first at " + place(first->second) + "; keep one");
      skip_blank();
      if (peek() != ':') fail(at_, "expected ':' after the name " + in_quotes(key));
      ++at_;
      skip_blank();
      append_member(result, std::move(key), value());
      path_ = outer;
      separator('}');
    }
    ++at_;
    return result;
  }

  Json array() {
    Json result = Json::array();
    ++at_;
    skip_blank();
    while (peek() != ']' || at_end()) {
      if (at_end()) fail(at_, "the text ends before ']'");
      result.push_back(value());
      separator(']');
    }
    ++at_;
    return result;
  }

  std::string name() {
    if (peek() == '"' || peek() == '\'') return string();
    if (!is_name_start(peek())) fail(at_, "expected a name in quotes");
    const size_t begin = at_;
    while (!at_end() && is_name_char(text_[at_])) ++at_;
    return std::string(text_.substr(begin, at_ - begin));
  }

  std::string string() {
    const size_t begin = at_;
    const char quote = text_[at_++];
    std::string result;
    while (true) {
      if (at_end() || text_[at_] == '\n') fail(begin, "this string is never closed");
      const char c = text_[at_++];
      if (c == quote) return result;
      if (static_cast<unsigned char>(c) < 0x20 && c != '\t') fail(at_ - 1, "a control character in a string; write it as \\uXXXX");
      if (c == '\\') {
        escape(result);
      } else {
        result += c;
      }
    }
  }

  unsigned hex4() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      const int digit = is_digit(c) ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
      if (digit < 0) fail(at_, "\\u needs four hexadecimal digits");
      code = code * 16 + static_cast<unsigned>(digit);
    }
    return code;
  }

  void escape(std::string& out) {
    const size_t where = at_;
    const char c = peek();
    ++at_;
    switch (c) {
      case '"': case '\'': case '\\': case '/': out += c; return;
      case 'b': out += '\b'; return;
      case 'f': out += '\f'; return;
      case 'n': out += '\n'; return;
      case 'r': out += '\r'; return;
      case 't': out += '\t'; return;
      case 'u': break;
      default: fail(where, "unknown escape in a string; a backslash itself is written \\\\");
    }
    unsigned code = hex4();
    if (code >= 0xD800 && code < 0xDC00 && peek() == '\\' && peek(1) == 'u') {
      at_ += 2;
      const unsigned low = hex4();
      if (low < 0xDC00 || low > 0xDFFF) fail(where, "half of a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xD800 && code <= 0xDFFF) {
      fail(where, "half of a surrogate pair");
    }
    append_utf8(out, code);
  }

  static void append_utf8(std::string& out, unsigned code) {
    const auto put = [&out](unsigned byte) { out += static_cast<char>(byte); };
    if (code < 0x80) {
      put(code);
    } else if (code < 0x800) {
      put(0xC0 | (code >> 6)); put(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      put(0xE0 | (code >> 12)); put(0x80 | ((code >> 6) & 0x3F)); put(0x80 | (code & 0x3F));
    } else {
      put(0xF0 | (code >> 18)); put(0x80 | ((code >> 12) & 0x3F)); put(0x80 | ((code >> 6) & 0x3F)); put(0x80 | (code & 0x3F));
    }
  }

  Json number() {
    const size_t begin = at_;
    if (text_.substr(at_, 9) == "-Infinity") {
      at_ += 9;
      return -std::numeric_limits<double>::infinity();
    }
    bool whole = true;
    if (peek() == '-') ++at_;
    const size_t digits = at_;
    while (is_digit(peek())) ++at_;
    if (at_ == digits || (at_ - digits > 1 && text_[digits] == '0')) bad_number(begin);
    if (peek() == '.') { whole = false; ++at_; fraction(begin); }
    if (peek() == 'e' || peek() == 'E') {
      whole = false;
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      fraction(begin);
    }
    if (!at_end() && (is_name_char(peek()) || peek() == '+')) bad_number(begin);
    const char* first = text_.data() + begin;
    const char* last = text_.data() + at_;
    int64_t integer = 0;
    if (whole && std::from_chars(first, last, integer).ec == std::errc()) return integer;
    return std::strtod(std::string(first, last).c_str(), nullptr);  // too large becomes Infinity, and fails its range
  }

  void fraction(size_t begin) {
    if (!is_digit(peek())) bad_number(begin);
    while (is_digit(peek())) ++at_;
  }

  [[noreturn]] void bad_number(size_t begin) {
    size_t end = begin;
    while (end < text_.size() && end - begin < 40 && (is_name_char(text_[end]) || text_[end] == '+')) ++end;
    fail(begin, in_quotes(std::string(text_.substr(begin, end - begin))) + " is not a number in JSON");
  }

  Json word() {
    const size_t begin = at_;
    while (!at_end() && is_name_char(text_[at_])) ++at_;
    const std::string_view found = text_.substr(begin, at_ - begin);
    if (found == "true") return true;
    if (found == "false") return false;
    if (found == "null") return nullptr;
    if (found == "NaN") return std::numeric_limits<double>::quiet_NaN();
    if (found == "Infinity") return std::numeric_limits<double>::infinity();
    if (found == "True" || found == "False") fail(begin, "JSON writes true and false in small letters");
    if (found == "None") fail(begin, "JSON writes null");
    if (found.empty()) fail(begin, "expected a value");
    fail(begin, "expected a value; text needs quotes: " + in_quotes(std::string(found.substr(0, 40))));
  }

  std::string_view text_;
  const std::string& source_;
  size_t at_ = 0;
  int depth_ = 0;
  std::string path_;
};

}  // namespace

Json parse_relaxed(std::string_view text, const std::string& source) { return Reader(text, source).document(); }

}  // namespace ds::config
