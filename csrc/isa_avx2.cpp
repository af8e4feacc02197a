#define FASTDP_ISA avx2
#include "isa-inl.h"
