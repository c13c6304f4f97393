// SPDX-License-Identifier: Apache-2.0
#include "platform/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace ds::platform {
namespace {

std::string describe(const char* verb, size_t bytes, int64_t offset) {
  return std::string(verb) + " of " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset);
}

int open_flags(File::Mode mode) {
  switch (mode) {
    case File::Mode::Read: return O_RDONLY;
    case File::Mode::Create: return O_RDWR | O_CREAT | O_TRUNC;
    case File::Mode::CreateNew: return O_RDWR | O_CREAT | O_EXCL;
    case File::Mode::ReadWrite: return O_RDWR;
    case File::Mode::OpenOrCreate: return O_RDWR | O_CREAT;
  }
  DS_FAIL("not a File::Mode: " << static_cast<int>(mode));
}

}  // namespace

void throw_file_error(const char* file, int line, const std::string& what, const std::string& path, int code) {
  std::string message = what + (path.empty() ? "" : " of " + path) + " failed";
  if (code != 0) message += std::string(": ") + std::strerror(code) + " (errno " + std::to_string(code) + ")";
  throw FileError(file, line, message, code);
}

File::File(const std::string& path, Mode mode) : path_(path) {
  do {
    fd_ = ::open(path.c_str(), open_flags(mode) | O_CLOEXEC, 0666);
  } while (fd_ < 0 && errno == EINTR);
  if (fd_ < 0) DS_FAIL_FILE("opening", path, errno);
}

File File::memory(const std::string& name, size_t bytes) {
  const int fd = memfd_create(name.c_str(), MFD_CLOEXEC);
  if (fd < 0) DS_FAIL_FILE("creating memory file", name, errno);
  File file(fd, "memory:" + name);
  file.resize(static_cast<int64_t>(bytes));
  return file;
}

File File::unique(const std::string& folder, const std::string& prefix) {
  std::string path = folder + "/" + prefix + "XXXXXX";
  const int fd = ::mkostemp(path.data(), O_CLOEXEC);
  if (fd < 0) DS_FAIL_FILE("creating a file", folder, errno);
  return File(fd, path);
}

File File::scratch(const std::string& folder) {
  const int fd = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0) return File(fd, folder + "/(a file without a name)");
  if (errno != EOPNOTSUPP && errno != EISDIR && errno != EINVAL) DS_FAIL_FILE("creating a file", folder, errno);
  File file = unique(folder, ".deepspeed-");
  if (::unlink(file.path().c_str()) != 0) DS_FAIL_FILE("removing the name", file.path(), errno);
  return file;
}

File File::adopt(int fd, const std::string& path) {
  DS_CHECK_VALUE(fd >= 0, "not a file descriptor: " << fd);
  return File(fd, path);
}

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

File::File(File&& other) noexcept : fd_(std::exchange(other.fd_, -1)), path_(std::move(other.path_)) {}

File& File::operator=(File&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = std::exchange(other.fd_, -1);
    path_ = std::move(other.path_);
  }
  return *this;
}

int64_t File::size() const {
  struct stat status;
  if (fstat(fd_, &status) != 0) DS_FAIL_FILE("size query", path_, errno);
  return status.st_size;
}

void File::resize(int64_t bytes) {
  if (ftruncate(fd_, bytes) != 0) DS_FAIL_FILE("resizing to " + std::to_string(bytes) + " bytes", path_, errno);
}

void File::reserve(int64_t offset, int64_t bytes) {
  const int64_t before = size();
  // Asked first: a system that runs out midway would have taken everybody's last free block.
  struct statvfs system;
  const bool known = fstatvfs(fd_, &system) == 0 && system.f_blocks > 0;
  int code = known && static_cast<uint64_t>(bytes) / system.f_frsize > system.f_bavail ? ENOSPC : EINTR;
  while (code == EINTR) code = fallocate(fd_, 0, offset, bytes) == 0 ? 0 : errno;
  if (code == ENOSPC && size() > before) resize(before);
  if (code == EOPNOTSUPP || code == ENOSYS) {
    if (size() < offset + bytes) resize(offset + bytes);
    return;
  }
  if (code != 0) DS_FAIL_FILE("setting " + std::to_string(bytes) + " bytes aside", path_, code);
}

void File::read(void* dst, size_t bytes, int64_t offset) const {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t n = pread(fd_, static_cast<char*>(dst) + done, bytes - done, offset + static_cast<int64_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) DS_FAIL_FILE(describe("read", bytes, offset), path_, errno);
    if (n == 0) DS_FAIL_FILE(describe("read", bytes, offset) + " (the file ends after " + std::to_string(done) + " of them)", path_, 0);
    done += static_cast<size_t>(n);
  }
}

void File::write(const void* src, size_t bytes, int64_t offset) const {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t n = pwrite(fd_, static_cast<const char*>(src) + done, bytes - done, offset + static_cast<int64_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) DS_FAIL_FILE(describe("write", bytes, offset), path_, n < 0 ? errno : ENOSPC);
    done += static_cast<size_t>(n);
  }
}

void File::sync() const {
  while (fdatasync(fd_) != 0) {
    if (errno == EINVAL || errno == EROFS) return;  // not something that can be synchronised, e.g. a pipe
    if (errno != EINTR) DS_FAIL_FILE("sync", path_, errno);
  }
}

void File::close() {
  if (fd_ < 0) return;
  // Linux frees the descriptor even when close reports an error, EINTR included: never call it twice.
  if (::close(std::exchange(fd_, -1)) != 0 && errno != EINTR) DS_FAIL_FILE("close", path_, errno);
}

bool exchange_paths(const std::string& a, const std::string& b) {
  if (renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) == 0) return true;
  if (errno == ENOSYS || errno == EINVAL || errno == EOPNOTSUPP) return false;
  DS_FAIL_FILE("exchanging with " + b, a, errno);
}

void sync_directory_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string directory = slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
  File(directory, File::Mode::Read).sync();
}

}  // namespace ds::platform
