// All kernels, compiled into the namespace FASTDP_ISA. The file that includes this one sets that name and is compiled
// with that instruction set's flags; nothing of it may leak out, so it includes no header with inline functions of
// its own beyond the C ones in common.h.
#include "kernels.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastdp::FASTDP_ISA {

#include "lanes.h"
//
#include "chacha.h"
#include "normal.h"
#include "step.h"
//
#include "cell-simd.h"
#include "clip-simd.h"
#include "convolution-simd.h"
#include "linear-simd.h"
#include "noise-simd.h"
#include "normalise-simd.h"
#include "sample-simd.h"

template <class T>
constexpr TypedKernels<T> typed_kernels = {sum_squares<T>,          square_rows<T>,  accumulate_rows<T>,
                                           scale_rows<T>,           gram_sq_norm<T>, layer_norm_gradients<T>,
                                           group_norm_gradients<T>, add_noise<T>,    add_secure_noise<T>};

#define FASTDP_STRING_(x) #x
#define FASTDP_STRING(x) FASTDP_STRING_(x)
extern const Kernels table = {FASTDP_STRING(FASTDP_ISA),
                              typed_kernels<float>,
                              typed_kernels<bf16>,
                              typed_kernels<double>,
                              {noise_sgd<float>, noise_adam<float>},
                              {noise_sgd<double>, noise_adam<double>},
                              {lstm_forward<float>, lstm_backward<float>},
                              {lstm_forward<double>, lstm_backward<double>},
                              keystream,
                              normals_from_words,
                              sample_block,
                              convolution_gradients<float>,
                              convolution_gradients<double>};

}  // namespace fastdp::FASTDP_ISA
