#pragma once

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace fastdp::comm {

// A process of this host, known by its number and when it began, since numbers are used again.
struct Process {
  std::int64_t id = 0, began = 0;

  enum class State { running, stopped, gone, unknown };

  static Process of(std::int64_t id) {
    char state;
    Process process{id, 0};
    read(id, state, process.began);
    return process;
  }

  // One that has ended counts as gone even while nobody has asked for its exit status.
  State state() const {
    char letter;
    std::int64_t since;
    if (!read(id, letter, since)) return errno == ENOENT || errno == ESRCH ? State::gone : State::unknown;
    if (began != 0 && since != began) return State::gone;
    if (letter == 'Z' || letter == 'X') return State::gone;
    return letter == 'T' || letter == 't' ? State::stopped : State::running;
  }

 private:
  // False, and errno says why: no such process, or, say, no file descriptor left to ask with. proc(5): the name, field
  // 2, may hold anything, so the last bracket counts; field 22 is the start.
  static bool read(std::int64_t id, char& state, std::int64_t& began) {
    char path[64], text[1024];
    std::snprintf(path, sizeof path, "/proc/%lld/stat", static_cast<long long>(id));
    std::FILE* file = std::fopen(path, "re");
    if (file == nullptr) return false;
    errno = 0;
    const std::size_t length = std::fread(text, 1, sizeof text - 1, file);
    const int error = errno;  // ESRCH: it has ended since
    std::fclose(file);
    errno = error;
    text[length] = 0;
    const char* at = std::strrchr(text, ')');
    if (at == nullptr || at[1] == 0) return false;
    state = at[2];
    at += 2;
    for (int field = 3; field < 22 && at != nullptr; ++field) {
      at = std::strchr(at, ' ');
      if (at != nullptr) ++at;
    }
    long long value = 0;
    if (at == nullptr || std::sscanf(at, "%lld", &value) != 1) return false;
    began = value;
    return true;
  }
};

}  // namespace fastdp::comm
