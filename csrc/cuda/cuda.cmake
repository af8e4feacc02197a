# fastdp._cuda: the kernels on GPUs. FASTDP_CUDA=ON builds it, for the architectures of FASTDP_CUDA_ARCHITECTURES; AUTO,
# the default, only where there are a toolkit and a GPU with its driver, and for that GPU; OFF never. It links neither
# libtorch nor libcudart's shared library: `import fastdp` works where there is no driver. ptxas (13.0) spills nothing on
# 7.5, 8.0 and 9.0; on 12.0, 8 bytes in ClipSumHeld of long rows and in SquareNorms of 16-bit numbers.
set(FASTDP_CUDA "AUTO" CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set(FASTDP_CUDA_ARCHITECTURES "80-real;90" CACHE STRING "With FASTDP_CUDA=ON; 75 to 120, and PTX of those without -real")
set_property(CACHE FASTDP_CUDA PROPERTY STRINGS AUTO ON OFF)

set(fastdp_cuda ${FASTDP_CUDA})
if(FASTDP_CUDA STREQUAL "AUTO")
  set(fastdp_cuda OFF)
  find_program(fastdp_nvidia_smi nvidia-smi)
  find_program(fastdp_nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(fastdp_nvidia_smi AND fastdp_nvcc)
    execute_process(COMMAND ${fastdp_nvidia_smi} --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE fastdp_capability RESULT_VARIABLE fastdp_failed ERROR_QUIET)
    if(fastdp_failed EQUAL 0 AND fastdp_capability MATCHES "^([0-9]+)\\.([0-9]+)")
      set(FASTDP_CUDA_ARCHITECTURES "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
      set(CMAKE_CUDA_COMPILER ${fastdp_nvcc})
      set(fastdp_cuda ON)
    endif()
  endif()
elseif(NOT FASTDP_CUDA MATCHES "^(ON|OFF)$")
  message(FATAL_ERROR "FASTDP_CUDA is ${FASTDP_CUDA}: must be AUTO, ON or OFF")
endif()
message(STATUS "fastdp: CUDA kernels ${fastdp_cuda}")
if(NOT fastdp_cuda)
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES ${FASTDP_CUDA_ARCHITECTURES})
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION) # CMake 3.25 does not know nvcc 13's
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
add_library(fastdp_cuda_kernels OBJECT csrc/cuda/kernels.cu)
set_target_properties(fastdp_cuda_kernels PROPERTIES POSITION_INDEPENDENT_CODE ON)
# No contraction, as on the CPU (P2); what the compiler made of each kernel is printed, and read by tests/test_cuda.py.
target_compile_options(fastdp_cuda_kernels PRIVATE -fmad=false -Xptxas -v)
pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/cuda/bindings.cpp $<TARGET_OBJECTS:fastdp_cuda_kernels>)
find_package(CUDAToolkit REQUIRED)
target_link_libraries(_cuda PRIVATE fastdp_flags CUDA::cudart_static)
install(TARGETS _cuda DESTINATION fastdp)
