#define FASTDP_ISA scalar
#include "isa-inl.h"
