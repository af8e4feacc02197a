#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <string>
#include <utility>

#include "transport.h"

namespace fastdp::comm {

// Memory that processes of one host map: a memfd, so that neither the size of /dev/shm nor a file left behind matters.
// The one that makes it tells the others its process and file descriptor. The kernel takes it back when the last of
// them unmaps it or ends.
class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(SharedMemory&& other) noexcept { *this = std::move(other); }
  SharedMemory& operator=(SharedMemory&& other) noexcept {
    std::swap(file_, other.file_), std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~SharedMemory() {
    close_file();
    if (data_ != nullptr) munmap(data_, bytes_);
  }

  static SharedMemory create(std::size_t bytes) {
    SharedMemory memory;
    memory.bytes_ = bytes;
    memory.file_ = check(memfd_create("fastdp", MFD_CLOEXEC), "memfd_create");
    check(ftruncate(memory.file_, static_cast<off_t>(bytes)), "ftruncate");
    return memory;
  }

  // What process `owner` has made. Refused across users and process namespaces.
  static SharedMemory open(int owner, int file, std::size_t bytes) {
    SharedMemory memory;
    memory.bytes_ = bytes;
    const std::string path = "/proc/" + std::to_string(owner) + "/fd/" + std::to_string(file);
    memory.file_ = check(::open(path.c_str(), O_RDWR | O_CLOEXEC), path.c_str());
    return memory;
  }

  // Takes the pages now, on this process's NUMA node: too little memory is an error here, not a SIGBUS later.
  void reserve(std::size_t begin, std::size_t bytes) {
    if (bytes == 0) return;
    int result;
    do {
      result = fallocate(file_, 0, static_cast<off_t>(begin), static_cast<off_t>(bytes));
    } while (result != 0 && errno == EINTR);
    check(result, "fallocate");
  }

  void map() {
    void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file_, 0);
    if (at == MAP_FAILED) check(-1, "mmap");
    data_ = static_cast<std::byte*>(at);
  }

  // Fills the page tables, so that no collective takes a page fault. Once every process has reserved its part.
  void touch() const {
#ifdef MADV_POPULATE_WRITE  // Linux 5.14
    if (madvise(data_, bytes_, MADV_POPULATE_WRITE) == 0) return;
#endif
    constexpr std::size_t page = 4096;
    for (std::size_t at = 0; at < bytes_; at += page) static_cast<void>(*static_cast<volatile std::byte*>(data_ + at));
  }

  // Once every process has opened it.
  void close_file() {
    if (file_ >= 0) close(file_);
    file_ = -1;
  }

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  int file() const { return file_; }

 private:
  static int check(int result, const char* what) {
    if (result < 0) throw Failure(std::string("shared memory: ") + what + ": " + std::strerror(errno));
    return result;
  }

  int file_ = -1;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace fastdp::comm
