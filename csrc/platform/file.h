// SPDX-License-Identifier: Apache-2.0
// An owned file descriptor. Every error names the path, the operation and the system's reason.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "base/error.h"

namespace ds::platform {

// An operation on a file failed; `code` is the errno, 0 for an unexpected end of file.
struct FileError : Error {
  FileError(const char* file, int line, const std::string& message, int code_) : Error(file, line, message), code(code_) {}
  int code;
};

[[noreturn]] void throw_file_error(const char* file, int line, const std::string& what, const std::string& path, int code);
#define DS_FAIL_FILE(what, path, code) ::ds::platform::throw_file_error(__FILE__, __LINE__, what, path, code)

class File {
 public:
  enum class Mode {
    Read,
    Create,     // read and write; created or emptied
    CreateNew,  // as Create, but an existing file is an error
    ReadWrite,  // an existing file
    OpenOrCreate,  // read and write; created, or kept as it is
  };

  File() = default;
  File(const std::string& path, Mode mode);
  // A nameless file in memory; `name` appears in /proc only.
  static File memory(const std::string& name, size_t bytes);
  // A new file in `folder` whose name begins with `prefix` and nobody else has.
  static File unique(const std::string& folder, const std::string& prefix);
  // A file without a name on the file system of `folder`: it is gone when its last descriptor is, however the process ends.
  static File scratch(const std::string& folder);
  // Takes over a descriptor opened elsewhere.
  static File adopt(int fd, const std::string& path);

  ~File();
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool is_open() const { return fd_ >= 0; }
  int fd() const { return fd_; }
  const std::string& path() const { return path_; }

  int64_t size() const;
  void resize(int64_t bytes);
  // Makes the file at least offset + bytes long and sets the disk space of that range aside, so that writing there, also through a mapping,
  // does not meet a full disk later. On systems that cannot do that only the length changes.
  void reserve(int64_t offset, int64_t bytes);
  void read(void* dst, size_t bytes, int64_t offset) const;         // exactly `bytes`, or throws
  void write(const void* src, size_t bytes, int64_t offset) const;  // exactly `bytes`, or throws
  void sync() const;                                                // contents are on the medium afterwards
  void close();                                                     // throws when the system reports a late error

 private:
  File(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}

  int fd_ = -1;
  std::string path_;
};

// Two existing paths of one file system change places at once. False when kernel or file system cannot do that.
bool exchange_paths(const std::string& a, const std::string& b);

// Makes a rename or a new entry in `path`'s directory durable.
void sync_directory_of(const std::string& path);

}  // namespace ds::platform
