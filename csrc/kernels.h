// The kernels that exist once per instruction set, as plain functions on one thread. ops.cpp splits the work over
// threads and calls them through this table; dispatch.cpp alone chooses which table.
#pragma once

#include "common.h"

namespace fastdp {

// Uniform words used by one normal chunk, and the order they come in, are part of the contract: noise element
// `index` is output (index % 256) / 16 of ChaCha block 16 * (index / 256) + index % 16, whatever the vector width.
// Outputs 2p and 2p + 1 of a block are the pair made from its words 2p (radius) and 2p + 1 (angle). Where the radius
// takes 64 bits (normal.h), the low ones are word p of the block of the same number in Domain::noise_tail.
constexpr int64_t kChunk = 256;

// Secure noise S(i) is the sum of four normals of Domain::secure_noise (and its tail's domain), numbers i + j 2^50,
// over 2: variance 1. The four are of different blocks, and no word is used by the usual noise.
constexpr int kSecureNormals = 4;
constexpr uint64_t kSecureApart = uint64_t{1} << 50;

// Records of one sampling block: they are drawn from a stream of their own, so a block can be drawn alone.
constexpr int64_t kSampleBlock = 4096;
// Blocks of ChaCha20 that each has: 8192 draws, of which it can take 4097.
constexpr uint64_t kBlocksPerSample = 1024;

// Doubles that the Gram matrices of `positions` inputs and output gradients, of n elements together, are made from:
// positions in multiples of the widest vectors'.
constexpr int64_t gram_scratch(int64_t positions, int64_t n) { return (positions + 15) / 16 * 16 * n; }

// Of one record's sequence of inputs a_t and output gradients b_t: sum of |a_t| |b_t|, greatest |b_t|, sum of |a_t|.
struct SequenceBounds {
  double products, largest_b, inputs;
};

// What a step takes for the gradient: (sum + std N) * scale + weight_decay * parameter.
struct NoisedGradient {
  double std;    // of the noise, in units of the sum
  double scale;  // 1 / expected batch size; negative to maximize
  double weight_decay;
};

// SGD as torch.optim.SGD does it.
struct SgdStep {
  NoisedGradient gradient;
  double lr, momentum, dampening;
  bool nesterov, first;  // first: the momentum buffer holds nothing yet
};

// Adam as torch.optim.Adam does its step number t; the caller corrects the bias, and decays the weights for AdamW.
struct AdamStep {
  NoisedGradient gradient;
  double beta1, beta2, eps;
  double keep;       // of the parameter: 1 - lr * weight decay where that is decoupled, else 1
  double step_size;  // lr / (1 - beta1^t)
  double root;       // sqrt(1 - beta2^t)
};

// Elements of one parameter and what belongs to them; the noise of p[i] is N(first + i).
template <class T>
struct StepRange {
  T* p;
  const T* sum;
  T* state[2];  // momentum_buffer or null, null; or exp_avg, exp_avg_sq
  int64_t n;
  uint64_t first;
  // Where several ranks share memory: how many sums are added up, in this order, each `sums_apart` elements after the
  // one before; and how many copies of the parameter there are, from `copy` on. p is one of them, the others become as
  // it.
  int64_t sums = 1, sums_apart = 0;
  T* copy = nullptr;
  int64_t copies = 0, copies_apart = 0;
};

template <class T>
struct TypedKernels {
  using Sum = typename SumOf<T>::type;
  double (*sum_squares)(const T* x, int64_t n);
  // out[i] = sum_squares of row i
  void (*square_rows)(Rows<T> rows, double* out);
  // out[0:n] += sum_i factors[i] * rows[i, 0:n], i in order; rows of factor 0 are not read
  void (*accumulate_rows)(Rows<T> rows, const double* factors, Sum* out);
  // out[i, :] = factors[i] * rows[i, :], and column sums of that into `sums` unless null; rows of factor 0 give 0
  // unread
  void (*scale_rows)(Rows<T> rows, const double* factors, T* out, Sum* sums);
  // one record: sum_{t,u} <a_t, a_u> <b_t, b_u>; `scratch` holds gram_scratch(a.rows, a.n + b.n) doubles
  double (*gram_sq_norm)(Rows<T> a, Rows<T> b, double* scratch, SequenceBounds& bounds);
  // one record: see normalise-simd.h
  void (*layer_norm_gradients)(Rows<T> a, Rows<T> b, double eps, bool centre, Sum* weight, Sum* bias);
  void (*group_norm_gradients)(Rows<T> a, Rows<T> b, int64_t group, double eps, Sum* weight, Sum* bias);
  // x[i] += std * N(first + i)
  void (*add_noise)(T* x, int64_t n, const Stream& stream, uint64_t first, double std);
  // x[i] = x[i] + std * S(first + i) in double, rounded to a multiple of `grid`, a power of two
  void (*add_secure_noise)(T* x, int64_t n, const Stream& stream, uint64_t first, double std, double grid);
};

template <class T>
struct StepKernels {
  void (*noise_sgd)(const StepRange<T>& r, const Stream& stream, const SgdStep& h);
  void (*noise_adam)(const StepRange<T>& r, const Stream& stream, const AdamStep& h);

  auto of(const SgdStep&) const { return noise_sgd; }
  auto of(const AdamStep&) const { return noise_adam; }
};

// See cell-simd.h.
template <class T>
struct CellKernels {
  void (*lstm_forward)(T* gates, const T* before, T* c, T* h, int64_t n);
  void (*lstm_backward)(T* gates, const T* before, const T* c, const T* dh, T* dc, int64_t n);
};

// A convolution of up to three dimensions, as the kernel sees it: the offsets of its windows in a channel with zeros
// round it, a plane.
struct Convolution {
  int64_t groups, channels, outputs;  // channels and outputs of one group
  int64_t size[3], padding[3];        // of the input, and what comes before and after it
  int64_t plane;                      // elements
  int64_t taps, positions;
  const int64_t* window;  // [taps]: of the kernel's elements, from where it begins
  const int64_t* begin;   // [positions]: where it begins, for each element of the output
  bool by_group;          // lanes are groups, not outputs
};

// Positions and weights (of one output) that the kernel does at once, and outputs side by side at most: 64 KiB and 32
// KiB of float32, in the second-level cache. Groups come in as many, where lanes are groups.
constexpr int64_t kConvolutionBlock = 512, kConvolutionWeights = 256, kConvolutionPanel = 32;

// One record: see convolution-simd.h; `scratch` is as large as layers.cpp makes it.
template <class F>
using ConvolutionGradients = void (*)(const Convolution& of, const F* a, const F* b, int64_t group, int64_t from,
                                      int64_t end, F* scratch, F* out);

struct Kernels {
  const char* name;
  TypedKernels<float> float32;
  TypedKernels<bf16> bfloat16;
  TypedKernels<double> float64;
  StepKernels<float> step_float32;
  StepKernels<double> step_float64;
  CellKernels<float> cell_float32;
  CellKernels<double> cell_float64;
  // words[16 * blocks] in RFC 8439's order, from block `first` of the stream
  void (*keystream)(const Stream& stream, uint64_t first, int64_t blocks, uint32_t* words);
  // z[2][n] from words[3][n] (radius, its low bits, angle), n a multiple of 16: what noise is made of, for tests
  void (*normals_from_words)(const uint32_t* words, int64_t n, float* z);
  // the records of block `block` (n <= 4096 of them) that are in the batch, ascending; returns how many
  int64_t (*sample_block)(const Stream& stream, int64_t block, int64_t n, double rate, int64_t* ids);

  ConvolutionGradients<float> convolution_float32;
  ConvolutionGradients<double> convolution_float64;

  auto convolution(float) const { return convolution_float32; }
  auto convolution(double) const { return convolution_float64; }
  const TypedKernels<float>& typed(float) const { return float32; }
  const TypedKernels<bf16>& typed(bf16) const { return bfloat16; }
  const TypedKernels<double>& typed(double) const { return float64; }
  const StepKernels<float>& step(float) const { return step_float32; }
  const StepKernels<double>& step(double) const { return step_float64; }
  const CellKernels<float>& cell(float) const { return cell_float32; }
  const CellKernels<double>& cell(double) const { return cell_float64; }
};

// The table for this machine, or for FASTDP_ISA = scalar | avx2 | avx512. Throws std::runtime_error where that cannot
// run.
const Kernels& kernels();

}  // namespace fastdp
