# fastdp._mpi: the collectives. The only target that sees MPI.
# FASTDP_MPI or MPI_HOME (prefix of a user's own MPI) win over PATH, where pip's isolated build has put the wheel `mpich`.
set(fastdp_mpi_prefix "$ENV{FASTDP_MPI}")
if(NOT fastdp_mpi_prefix)
  set(fastdp_mpi_prefix "$ENV{MPI_HOME}")
endif()
if(fastdp_mpi_prefix)
  # Named outright: find_package(MPI) would otherwise go on to PATH when the prefix holds no MPI.
  find_program(MPI_CXX_COMPILER NAMES mpicxx mpic++ CC mpiicpc PATHS "${fastdp_mpi_prefix}/bin" NO_DEFAULT_PATH)
  if(NOT MPI_CXX_COMPILER)
    message(FATAL_ERROR "FASTDP_MPI or MPI_HOME is ${fastdp_mpi_prefix}, but ${fastdp_mpi_prefix}/bin has no mpicxx")
  endif()
endif()
set(MPI_CXX_SKIP_MPICXX TRUE) # the C++ interface that MPI 3.0 removed
find_package(MPI REQUIRED COMPONENTS CXX)

get_filename_component(fastdp_mpi_bin "${MPI_CXX_COMPILER}" DIRECTORY)
get_filename_component(fastdp_mpi_root "${fastdp_mpi_bin}" DIRECTORY)
file(GLOB fastdp_mpi_wheel "${fastdp_mpi_root}/lib*/python*/*-packages/mpich-*.dist-info")
if(fastdp_mpi_wheel AND NOT fastdp_mpi_prefix)
  # The build saw the wheel in a directory that pip has deleted since; at run time it lies in the same environment
  # as this module: <env>/lib/pythonX.Y/site-packages/fastdp and <env>/lib.
  set(fastdp_mpi_rpath "$ORIGIN/../../..;$ORIGIN/../../../../lib")
else()
  set(fastdp_mpi_rpath)
  foreach(library IN LISTS MPI_CXX_LIBRARIES)
    get_filename_component(directory "${library}" DIRECTORY)
    list(APPEND fastdp_mpi_rpath "${directory}")
  endforeach()
  list(REMOVE_DUPLICATES fastdp_mpi_rpath)
endif()
message(STATUS "fastdp: MPI ${MPI_CXX_COMPILER}, run path ${fastdp_mpi_rpath}")

# The wrapper's own -rpath names the build's directory; ours replaces it.
get_target_property(fastdp_mpi_link_options MPI::MPI_CXX INTERFACE_LINK_OPTIONS)
if(fastdp_mpi_link_options)
  list(FILTER fastdp_mpi_link_options EXCLUDE REGEX "rpath")
  set_target_properties(MPI::MPI_CXX PROPERTIES INTERFACE_LINK_OPTIONS "${fastdp_mpi_link_options}")
endif()

pybind11_add_module(_mpi MODULE NO_EXTRAS csrc/comm/mpi_bindings.cpp csrc/comm/sum.cpp)
# GCC 12 vectorises at -O3 only with the unlimited cost model when trip counts are unknown.
set_source_files_properties(csrc/comm/sum.cpp PROPERTIES COMPILE_OPTIONS "-O3")
target_link_libraries(_mpi PRIVATE fastdp_flags MPI::MPI_CXX)
set_target_properties(_mpi PROPERTIES INSTALL_RPATH "${fastdp_mpi_rpath}")
install(TARGETS _mpi DESTINATION fastdp)
