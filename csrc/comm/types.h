#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace fastdp::comm {

// Codes travel in headers and index the tables below, which Python reads: the only place that lists them.
enum class DType : std::int64_t { float32, float64, int64, bfloat16, float16, int32, int16, int8, uint8, bool_ };
inline constexpr std::array<std::string_view, 10> kDTypeNames = {"float32", "float64", "int64", "bfloat16", "float16",
                                                                 "int32",   "int16",   "int8",  "uint8",    "bool"};
inline constexpr std::array<std::size_t, 10> kDTypeBytes = {4, 8, 8, 2, 2, 4, 2, 1, 1, 1};
// The first four can be summed, bfloat16 in float32; the others only moved.
inline constexpr std::size_t kSummableDTypes = 4;

enum class Algorithm : std::int64_t { ring, tree, shared, hierarchical, mpi };
inline constexpr std::array<std::string_view, 5> kAlgorithmNames = {"ring", "tree", "shared", "hierarchical", "mpi"};

enum class Operation : std::int64_t {
  all_reduce,
  reduce_scatter,
  all_gather,
  broadcast,
  barrier,
  empty,
  noise_step,
  sparse,
  // The meetings that end these: not a barrier, which a signal handler may call between the two.
  noise_step_end,
  sparse_rows
};
inline constexpr std::array<std::string_view, 10> kOperationNames = {"all_reduce",
                                                                     "reduce_scatter",
                                                                     "all_gather",
                                                                     "broadcast",
                                                                     "barrier",
                                                                     "empty",
                                                                     "reduce_noise_step",
                                                                     "sparse_all_reduce",
                                                                     "reduce_noise_step_end",
                                                                     "sparse_all_reduce_rows"};

inline std::size_t item_bytes(DType dtype) { return kDTypeBytes[static_cast<std::size_t>(dtype)]; }

}  // namespace fastdp::comm
