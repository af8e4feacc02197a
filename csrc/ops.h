// The operations, on pointers: checked by fastdp/native.py, split over threads here, computed by the kernels.
// Results do not depend on `threads`: work is cut at fixed places and partial sums are added in a fixed order.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "kernels.h"

namespace fastdp {

// out[B] = squared row norms of g [B, D]
template <class T>
void sq_norms(Rows<T> g, double* out, int threads);

// Of a linear layer, what its per-sample gradients sum_t b_t a_t^T, and sum_t b_t if there is a bias, are made of.
template <class T>
struct LinearRows {
  Sequences<T> a, b;
  bool bias;
};

// out[B] += squared norms of these, of all layers; of several positions, what bounds their rounding is added to
// bounds[B], unless null, `inputs` times sqrt(O)
template <class T>
void linear_sq_norms(const std::vector<LinearRows<T>>& layers, double* out, SequenceBounds* bounds, int threads);

// Per-sample gradients of a normalisation's weight and bias, [B, n] each or null, from its input and the gradient of
// its output. Layer norm (centre) and RMS norm: a, b [B * positions, n].
template <class T>
void layer_norm_gradients(Rows<T> a, Rows<T> b, int64_t batch, double eps, bool centre, typename SumOf<T>::type* weight,
                          typename SumOf<T>::type* bias, int threads);

// Group norm: a, b [B * channels, positions], packed.
template <class T>
void group_norm_gradients(Rows<T> a, Rows<T> b, int64_t batch, int64_t groups, double eps,
                          typename SumOf<T>::type* weight, typename SumOf<T>::type* bias, int threads);

// Rows to be written to.
template <class T>
struct MutableRows {
  T* data;
  int64_t rows, n, stride;
  T* row(int64_t i) const { return data + i * stride; }
};

// One time of an LSTM, all [B, n] but gates [B, 4 n]: see cell-simd.h.
template <class T>
void lstm_forward(MutableRows<T> gates, MutableRows<T> before, MutableRows<T> c, MutableRows<T> h, int threads);
template <class T>
void lstm_backward(MutableRows<T> gates, MutableRows<T> before, MutableRows<T> c, MutableRows<T> dh, MutableRows<T> dc,
                   int threads);

// Of three dimensions, of which those that there are not have size 1; padding with zeros, before and after.
struct ConvolutionShape {
  int64_t batch, groups, channels, outputs;  // channels and outputs of one group
  std::array<int64_t, 3> input, kernel, output, stride, padding, dilation;
};

// out [B, groups * outputs, channels, *kernel] = per-sample gradients of a convolution's weight, from its input
// a [B, groups * channels, *input] and the gradient b [B, groups * outputs, *output] of its output
template <class F>
void convolution_gradients(const ConvolutionShape& s, const F* a, const F* b, F* out, int threads);

// factors[B] = scale * min(1, max_norm / norm), norm = scale * sqrt(sq_norms), or scale * max_norm / (norm + gamma) if
// there is a gamma > 0; rounded so that the record's contribution, its products and factor rounded to T, has a norm <=
// max_norm; 0 where the norm is not finite. Returns how many are 0.
template <class T>
int64_t clip_factors(const double* sq_norms, int64_t batch, double scale, double max_norm, double* factors,
                     std::optional<double> gamma = {});

// out[D] = sum_i factor_i g_i
template <class T>
void clip_sum(Rows<T> g, double max_norm, typename SumOf<T>::type* out, int threads);

// out[D] = sum_i factors[i] g[i], or that added to out; rows of factor 0 are not read
template <class T>
void sum_rows(Rows<T> g, const double* factors, typename SumOf<T>::type* out, bool add, int threads);

// out[rows, n] = factors[rows] * x, of as many rows in all; sums[n] = column sums of out, unless null: of one position
template <class T>
void scale_rows(Sequences<T> x, const double* factors, T* out, typename SumOf<T>::type* sums, int threads);

// x[n] += std * N(first + i)
template <class T>
void gaussian_noise(T* x, int64_t n, const Stream& stream, uint64_t first, double std, int threads);

// x[n] += std * S(first + i), rounded to a multiple of the largest power of two <= std / 1024. S: see kernels.h
template <class T>
void secure_noise(T* x, int64_t n, const Stream& stream, uint64_t first, double std, int threads);

// A parameter p[n], the optimizer's state of it (see StepRange), and where its gradient starts in the flat buffer; the
// noise's too.
struct StepParameter {
  uintptr_t p, state[2];
  int64_t n;
  uint64_t offset;
};

// Which part of the flat buffer this process steps, [begin, end), and what the ranks that it shares memory with have:
// see StepRange; apart in bytes. first_copy: how far the first rank's copy of a parameter lies from this rank's own.
struct StepShare {
  uint64_t begin = 0, end = UINT64_MAX;
  int64_t sums = 1, sums_apart = 0, copies = 0, copies_apart = 0, first_copy = 0;
};

// one step, SgdStep or AdamStep, of each parameter on flat[offset + i], the first rank's, and N(offset + i)
template <class T, class Step>
void noise_step(std::vector<StepParameter> parameters, const T* flat, const Stream& stream, const Step& h,
                const StepShare& share, int threads);

// A table whose rows lie in several parts, one after the other.
struct Stack {
  std::vector<uintptr_t> parts;
  std::vector<int64_t> starts;  // ids of the parts' first rows, and the number of all rows
  int64_t row_bytes;
};

// out[n rows] = rows ids[n]. False if one of them is no row of the stack; then nothing is written.
bool gather(const Stack& stack, const int64_t* ids, int64_t n, char* out, int threads);

// For benchmarks: the words' bitwise or, as fast as they can be read; of whole MiB.
uint64_t read_memory(const uint64_t* words, int64_t n, int threads);

// ascending ids of a Poisson sample of n records
std::vector<int64_t> poisson_sample(int64_t n, double rate, const Stream& stream);

}  // namespace fastdp
