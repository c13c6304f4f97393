// SPDX-License-Identifier: Apache-2.0
// The one error header. Every failed check throws; nothing in the library prints, asserts or exits.
//   DS_CHECK(n > 0, "n must be positive, got " << n);      -> ds::Error,      Python RuntimeError
//   DS_CHECK_VALUE(n > 0, "n must be positive, got " << n);-> ds::ValueError, Python ValueError
//   DS_FAIL("cannot open " << path);
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace ds {

// what() is "file:line: message"; the file is given without the directories above csrc/.
struct Error : std::runtime_error {
  Error(const char* file_, int line_, const std::string& message_)
      : std::runtime_error(std::string(trim(file_)) + ":" + std::to_string(line_) + ": " + message_),
        file(trim(file_)), line(line_), message(message_) {}

  const char* file;
  int line;
  std::string message;

 private:
  static const char* trim(const char* path) {
    const char* result = path;
    for (const char* p = path; *p != '\0'; ++p) {
      if (p[0] == 'c' && p[1] == 's' && p[2] == 'r' && p[3] == 'c' && p[4] == '/') result = p;
    }
    return result;
  }
};

// The caller's argument is wrong, as opposed to the world's state.
struct ValueError : Error {
  using Error::Error;
};

}  // namespace ds

#define DS_THROW_(type, msg)                                    \
  do {                                                          \
    std::ostringstream ds_message_;                             \
    ds_message_ << msg;                                         \
    throw type(__FILE__, __LINE__, ds_message_.str());          \
  } while (false)

#define DS_FAIL(msg) DS_THROW_(::ds::Error, msg)
#define DS_FAIL_VALUE(msg) DS_THROW_(::ds::ValueError, msg)

#define DS_CHECK(cond, msg)                                     \
  do {                                                          \
    if (!(cond)) DS_THROW_(::ds::Error, msg);                   \
  } while (false)

#define DS_CHECK_VALUE(cond, msg)                               \
  do {                                                          \
    if (!(cond)) DS_THROW_(::ds::ValueError, msg);              \
  } while (false)
