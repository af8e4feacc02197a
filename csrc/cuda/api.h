// The operations on a GPU as plain functions, for bindings.cpp: nothing of CUDA is needed to call them. Defined by
// api-inl.h for whichever Launcher; pointers are the device's, and nothing waits for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "../kernels.h"

namespace fastdp::cuda {

enum class Element : int { f32, bf16, f16 };

// stream: a cudaStream_t. memory(bytes): of the device, until what has been started on the stream has ended.
struct Place {
  std::uintptr_t stream;
  std::function<void*(std::size_t)> memory;
};

// Rows of length n, `stride` elements apart.
struct Table {
  const void* data;
  int64_t rows, n, stride;
};

// [records, positions, n], each packed but for how far records and positions are apart.
struct TableOfSequences {
  const void* data;
  int64_t records, positions, n, records_apart, apart;
};

// A parameter p[n], the optimizer's state of it, and where its gradient starts in the flat buffer; its noise's too.
struct StepTensor {
  float *p, *state[2];
  int64_t n;
  uint64_t offset;
};

void sq_norms(const Place& place, Element type, const Table& g, double* out);
void clip_sum(const Place& place, Element type, const Table& g, double max_norm, float* out);
// gamma: of automatic clipping; negative: none
void clip_factors(const Place& place, const double* sq_norms, int64_t batch, double scale, double max_norm,
                  double gamma, double* factors);
void sum_rows(const Place& place, Element type, const Table& g, const double* factors, float* out, bool add);
// out [records * positions, n] = factors * rows of float
void scale_rows(const Place& place, const TableOfSequences& x, const double* factors, float* out);
// out[B] += squared norms of a linear layer's per-sample gradients; bounds[B] gain as on the CPU, or null
void linear_sq_norms(const Place& place, Element type, const TableOfSequences& a, const TableOfSequences& b, bool bias,
                     double* out, SequenceBounds* bounds);
// out[B] += those of a table of embeddings, index [B, positions]; padding_index -1: none
void embedding_sq_norms(const Place& place, Element type, const int64_t* index, const TableOfSequences& b,
                        int64_t padding_index, double* out);
void gaussian_noise(const Place& place, Element type, void* x, int64_t n, const Stream& stream, uint64_t first,
                    double std);
void noise_step(const Place& place, const std::vector<StepTensor>& tensors, const float* flat, const Stream& stream,
                const SgdStep& h);
void noise_step(const Place& place, const std::vector<StepTensor>& tensors, const float* flat, const Stream& stream,
                const AdamStep& h);
void poisson_sample(const Place& place, int64_t n, double rate, const Stream& stream, int64_t* ids, int64_t room,
                    int64_t* total);

}  // namespace fastdp::cuda
