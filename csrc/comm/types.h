#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace fastdp::comm {

// Codes travel in headers and index the tables below, which Python reads: the only place that lists them.
enum class DType : std::int64_t { float32, float64, int64, float16, bfloat16, int32, int16, int8, uint8, bool_ };
inline constexpr std::array<std::string_view, 10> kDTypeNames = {"float32", "float64", "int64", "float16", "bfloat16",
                                                                 "int32",   "int16",   "int8",  "uint8",   "bool"};
inline constexpr std::array<std::size_t, 10> kDTypeBytes = {4, 8, 8, 2, 2, 4, 2, 1, 1, 1};
// The first three can be summed; the others only moved.
inline constexpr std::size_t kSummableDTypes = 3;

enum class Algorithm : std::int64_t { ring, tree, mpi };
inline constexpr std::array<std::string_view, 3> kAlgorithmNames = {"ring", "tree", "mpi"};

enum class Operation : std::int64_t { all_reduce, reduce_scatter, all_gather, broadcast, barrier };
inline constexpr std::array<std::string_view, 5> kOperationNames = {"all_reduce", "reduce_scatter", "all_gather",
                                                                    "broadcast", "barrier"};

inline std::size_t item_bytes(DType dtype) { return kDTypeBytes[static_cast<std::size_t>(dtype)]; }

}  // namespace fastdp::comm
