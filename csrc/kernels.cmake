# The module _kernels: every file once, the kernels once per instruction set.
pybind11_add_module(
  _kernels MODULE NO_EXTRAS csrc/bindings.cpp csrc/ops.cpp csrc/layers.cpp csrc/clip_sum.cpp csrc/dispatch.cpp
                  csrc/threads.cpp csrc/isa_scalar.cpp)
target_link_libraries(_kernels PRIVATE fastdp_flags ${CMAKE_DL_LIBS})

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  target_sources(_kernels PRIVATE csrc/isa_avx2.cpp csrc/isa_avx512.cpp)
  target_compile_definitions(_kernels PRIVATE FASTDP_X86)
  set_source_files_properties(csrc/isa_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma")
  set_source_files_properties(
    csrc/isa_avx512.cpp PROPERTIES COMPILE_OPTIONS
                                   "-mfma;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mprefer-vector-width=512")
endif()
# GCC 12 vectorises at -O3 only with the unlimited cost model when trip counts are unknown.
set_source_files_properties(csrc/isa_scalar.cpp PROPERTIES COMPILE_OPTIONS "-O3")

install(TARGETS _kernels DESTINATION fastdp)
