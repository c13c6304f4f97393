// SPDX-License-Identifier: Apache-2.0
#include "comm/memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

#include "base/error.h"
#include "platform/file.h"
#include "platform/memory.h"

namespace ds::comm {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// Anonymous pages: zero, not resident until touched.
class HostBuffer : public SymmetricBuffer {
 public:
  static std::shared_ptr<HostBuffer> make(size_t bytes, const std::string& folder) {
    if (!folder.empty()) return in_folder(bytes, folder);
    const size_t slack = bytes >= kHugePage ? kHugePage : 0;
    const size_t mapped = (bytes == 0 ? 1 : bytes) + slack;
    void* base = ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    DS_CHECK(base != MAP_FAILED, "cannot map " << bytes << " bytes: " << std::strerror(errno));
    auto address = reinterpret_cast<uintptr_t>(base);
    if (slack != 0) {
      address = (address + slack - 1) / slack * slack;
      platform::advise_huge_pages(reinterpret_cast<void*>(address), bytes);
    }
    return std::shared_ptr<HostBuffer>(new HostBuffer(base, mapped, reinterpret_cast<void*>(address), bytes));
  }
  static std::shared_ptr<HostBuffer> in_folder(size_t bytes, const std::string& folder) {
    const size_t mapped = bytes == 0 ? 1 : bytes;
    platform::File file = platform::File::scratch(folder);
    file.reserve(0, static_cast<int64_t>(mapped));
    void* base = ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file.fd(), 0);
    if (base == MAP_FAILED) DS_FAIL_FILE("mapping " + std::to_string(mapped) + " bytes", file.path(), errno);
    return std::shared_ptr<HostBuffer>(new HostBuffer(base, mapped, base, bytes, true));
  }
  bool in_file() const override { return in_file_; }
  ~HostBuffer() override { ::munmap(base_, mapped_); }

 private:
  HostBuffer(void* base, size_t mapped, void* data, size_t bytes, bool in_file = false)
      : SymmetricBuffer(data, bytes, Device::Cpu, 0), base_(base), mapped_(mapped), in_file_(in_file) {}
  void* base_;
  size_t mapped_;
  const bool in_file_;
};

class BorrowedBuffer : public SymmetricBuffer {
 public:
  BorrowedBuffer(void* data, size_t bytes, Device device, int device_index, std::shared_ptr<void> owner)
      : SymmetricBuffer(data, bytes, device, device_index), owner_(std::move(owner)) {}

 private:
  const std::shared_ptr<void> owner_;
};

}  // namespace

std::shared_ptr<SymmetricBuffer> borrow(void* data, size_t bytes, Device device, int device_index, std::shared_ptr<void> owner) {
  return std::make_shared<BorrowedBuffer>(data, bytes, device, device_index, std::move(owner));
}

std::shared_ptr<SymmetricBuffer> HostMemory::allocate(size_t bytes, const std::string& folder) { return HostBuffer::make(bytes, folder); }

void HostMemory::copy(void* dst, const void* src, size_t bytes) {
  if (bytes != 0) std::memmove(dst, src, bytes);
}

}  // namespace ds::comm
