// The only place that chooses an instruction set.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastdp {

namespace scalar {
extern const Kernels table;
}
#ifdef FASTDP_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

struct Level {
  const Kernels* table;
  bool runs_here;
};

const Kernels& choose() {
#ifdef FASTDP_X86
  __builtin_cpu_init();
  const bool avx2_runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512_runs = avx2_runs && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Level levels[] = {{&avx512::table, avx512_runs}, {&avx2::table, avx2_runs}, {&scalar::table, true}};
#else
  const Level levels[] = {{&scalar::table, true}};
#endif
  const char* asked = std::getenv("FASTDP_ISA");
  const std::string name = asked == nullptr ? "" : asked;
  std::string usable;
  for (const Level& level : levels) {
    if (!level.runs_here) continue;
    if (name.empty() || name == level.table->name) return *level.table;
    usable += usable.empty() ? level.table->name : std::string(", ") + level.table->name;
  }
  throw std::runtime_error("FASTDP_ISA='" + name + "': must be one of " + usable + " on this machine");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fastdp
