#!/usr/bin/env bash
# Builds tests/cuda/host.cpp with the CPU's kernels beside it: build.sh PROGRAM [FLAGS OF g++]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
csrc=$here/../../csrc
program=$1
shift
"${CXX:-g++}" -std=gnu++20 -O1 -g -ffp-contract=off -Wall -Wextra -Werror -pthread "$@" \
  "$here/host.cpp" "$csrc/dispatch.cpp" "$csrc/isa_scalar.cpp" "$csrc/ops.cpp" "$csrc/threads.cpp" -o "$program"
