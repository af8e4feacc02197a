#define FASTDP_ISA avx512
#include "isa-inl.h"
