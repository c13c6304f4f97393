// SPDX-License-Identifier: Apache-2.0
#include "comm/shm/heap.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>

#include "base/error.h"
#include "platform/memory.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif

namespace ds::comm::shm {
namespace {

constexpr size_t kPage = 4096;

size_t up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

size_t page_bytes() {
  static const auto bytes = std::max(kPage, static_cast<size_t>(::sysconf(_SC_PAGESIZE)));
  return bytes;
}

}  // namespace

size_t extent(size_t bytes) { return up(std::max<size_t>(bytes, 1), bytes >= kHugePage ? kHugePage : page_bytes()); }

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

std::shared_ptr<File> File::anonymous() {
  int fd = ::memfd_create("deepspeed", MFD_CLOEXEC | MFD_NOEXEC_SEAL);
  if (fd < 0 && errno == EINVAL) fd = ::memfd_create("deepspeed", MFD_CLOEXEC | MFD_ALLOW_SEALING);  // before Linux 6.3
  DS_CHECK(fd >= 0, "memfd_create: " << std::strerror(errno));
  ::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK);  // a shorter file would turn the peers' reads into SIGBUS
  return std::make_shared<File>(fd);
}

void File::discard(size_t offset, size_t bytes) const {
  ::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset), static_cast<off_t>(bytes));
}

Mapping::Mapping(std::shared_ptr<File> file, size_t offset, size_t bytes, bool writable) : file_(std::move(file)), bytes_(bytes) {
  const int access = writable ? PROT_READ | PROT_WRITE : PROT_READ;
  const bool huge = bytes >= kHugePage;
  const size_t slack = huge ? kHugePage : 0;
  // Reserve, then map over the aligned part and return the rest.
  void* room = ::mmap(nullptr, bytes + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  DS_CHECK(room != MAP_FAILED, "cannot reserve " << bytes << " bytes of address space: " << std::strerror(errno));
  const auto begin = reinterpret_cast<uintptr_t>(room);
  const uintptr_t aligned = huge ? up(begin, kHugePage) : begin;
  if (aligned > begin) ::munmap(room, aligned - begin);
  const size_t tail = begin + bytes + slack - (aligned + bytes);
  if (tail > 0) ::munmap(reinterpret_cast<void*>(aligned + bytes), tail);
  void* data = ::mmap(reinterpret_cast<void*>(aligned), bytes, access, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, file_->fd(),
                      static_cast<off_t>(offset));
  if (data == MAP_FAILED) {
    const int problem = errno;
    ::munmap(reinterpret_cast<void*>(aligned), bytes);
    DS_FAIL("cannot map " << bytes << " bytes of shared memory: " << std::strerror(problem));
  }
  data_ = static_cast<char*>(data);
  platform::advise_huge_pages(data, bytes);
  if (!writable) ::madvise(data, bytes, MADV_DONTDUMP);  // a core file holds this process's memory once, not everybody's
}

Mapping::~Mapping() { ::munmap(data_, bytes_); }

void Mapping::drop(size_t begin, size_t bytes) const {
  const size_t first = begin / page_bytes() * page_bytes();
  const size_t last = std::min(up(begin + bytes, page_bytes()), up(bytes_, page_bytes()));
  if (last > first) ::madvise(data_ + first, last - first, MADV_DONTNEED);
}

void Mapping::collapse() const { platform::collapse_huge_pages(data_, bytes_); }

Heap::Heap(size_t head_bytes) : file_(File::anonymous()), end_(up(head_bytes, kHugePage)) {
  DS_CHECK(::ftruncate(file_->fd(), static_cast<off_t>(end_)) == 0, "ftruncate of shared memory: " << std::strerror(errno));
}

size_t Heap::allocate(size_t bytes) {
  const size_t offset = up(end_, bytes >= kHugePage ? kHugePage : page_bytes());
  const size_t end = offset + extent(bytes);
  DS_CHECK(end > offset && ::ftruncate(file_->fd(), static_cast<off_t>(end)) == 0,
           "cannot set aside " << bytes << " bytes of shared memory: " << std::strerror(errno));
  end_ = end;
  return offset;
}

}  // namespace ds::comm::shm
