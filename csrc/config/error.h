// SPDX-License-Identifier: Apache-2.0
// What is said about a document: problems (all of them, in one exception) and remarks.
#pragma once

#include <string>
#include <vector>

#include "base/error.h"
#include "config/schema.h"

namespace ds::config {

// The document is refused. `message` is for the user and names every problem by its path; Python: DeepSpeedConfigError.
struct ConfigError : ds::ValueError {
  explicit ConfigError(const std::string& message) : ds::ValueError(__FILE__, __LINE__, message) {}
};

struct Remark {
  enum class Level { Info, Warning } level;
  std::string text;
};

std::string printable(const std::string& text);                // control characters other than line ends become "?"
std::string shortened(const std::string& text, size_t bytes);  // cut between UTF-8 characters

// Collects what is wrong so that the user mends a file once, not line by line.
class Findings {
 public:
  void problem(const std::string& path, const std::string& text);
  void warn(const std::string& text) { remarks_.push_back({Remark::Level::Warning, printable(text)}); }
  void note(const std::string& text) { remarks_.push_back({Remark::Level::Info, printable(text)}); }
  bool clean() const { return problems_.empty(); }
  void throw_if_any(const std::string& source) const;
  const std::vector<Remark>& remarks() const { return remarks_; }

 private:
  std::vector<std::string> problems_;
  std::vector<Remark> remarks_;
};

std::string join(const std::string& path, const std::string& name);  // "a" + "b" -> "a.b"
std::string show(const Json& value);                                 // a value as the user would write it, shortened
std::string show_typed(const Json& value);                           // the same with its type: 5 (integer)
std::string in_quotes(const std::string& text);

}  // namespace ds::config
