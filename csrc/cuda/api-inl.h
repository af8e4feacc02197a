// api.h for the Launcher that has been included: a GPU's (kernels.cu), or the emulator's (tests/cuda/emulated.cpp).
#pragma once

#include <stdexcept>
#include <string>

#include "api.h"
#include "clip_sum.h"
#include "embedding.h"
#include "half.h"
#include "linear.h"
#include "noise.h"
#include "sample.h"
#include "scale.h"
#include "step.h"

namespace fastdp::cuda {

namespace {

Launcher launcher(const Place& place);  // defined by whoever includes this

template <class Call>
void with_element(Element type, Call call) {
  switch (type) {
    case Element::f32: return call(float{});
    case Element::bf16: return call(bf16{});
    case Element::f16: return call(f16{});
  }
  throw std::invalid_argument("type=" + std::to_string(static_cast<int>(type)));
}

template <class T>
Rows<T> rows(const Table& g) {
  return {static_cast<const T*>(g.data), g.rows, g.n, g.stride};
}

template <class T>
Sequences<T> sequences(const TableOfSequences& x) {
  return {static_cast<const T*>(x.data), x.records, x.positions, x.n, x.records_apart, x.apart};
}

}  // namespace

void sq_norms(const Place& place, Element type, const Table& g, double* out) {
  Launcher on = launcher(place);
  with_element(type, [&](auto t) { sq_norms(on, rows<decltype(t)>(g), out); });
}

void clip_sum(const Place& place, Element type, const Table& g, double max_norm, float* out) {
  Launcher on = launcher(place);
  with_element(type, [&](auto t) { clip_sum(on, rows<decltype(t)>(g), max_norm, out); });
}

void clip_factors(const Place& place, const double* sq_norms, int64_t batch, double scale, double max_norm,
                  double gamma, double* factors) {
  Launcher on = launcher(place);
  clip_factors<float>(on, sq_norms, batch, scale, max_norm, gamma, factors);
}

void sum_rows(const Place& place, Element type, const Table& g, const double* factors, float* out, bool add) {
  Launcher on = launcher(place);
  with_element(type, [&](auto t) { sum_rows(on, rows<decltype(t)>(g), factors, out, add); });
}

void scale_rows(const Place& place, const TableOfSequences& x, const double* factors, float* out) {
  Launcher on = launcher(place);
  scale_rows(on, sequences<float>(x), factors, out);
}

void linear_sq_norms(const Place& place, Element type, const TableOfSequences& a, const TableOfSequences& b, bool bias,
                     double* out, SequenceBounds* bounds) {
  Launcher on = launcher(place);
  with_element(type, [&](auto t) {
    linear_sq_norms(on, sequences<decltype(t)>(a), sequences<decltype(t)>(b), bias, out, bounds);
  });
}

void embedding_sq_norms(const Place& place, Element type, const int64_t* index, const TableOfSequences& b,
                        int64_t padding_index, double* out) {
  Launcher on = launcher(place);
  with_element(type, [&](auto t) { embedding_sq_norms(on, index, sequences<decltype(t)>(b), padding_index, out); });
}

void gaussian_noise(const Place& place, Element type, void* x, int64_t n, const Stream& stream, uint64_t first,
                    double std) {
  Launcher on = launcher(place);
  with_element(type, [&](auto t) { gaussian_noise(on, static_cast<decltype(t)*>(x), n, stream, first, std); });
}

void noise_step(const Place& place, const std::vector<StepTensor>& tensors, const float* flat, const Stream& stream,
                const SgdStep& h) {
  Launcher on = launcher(place);
  noise_step(on, tensors, flat, stream, h);
}

void noise_step(const Place& place, const std::vector<StepTensor>& tensors, const float* flat, const Stream& stream,
                const AdamStep& h) {
  Launcher on = launcher(place);
  noise_step(on, tensors, flat, stream, h);
}

void poisson_sample(const Place& place, int64_t n, double rate, const Stream& stream, int64_t* ids, int64_t room,
                    int64_t* total) {
  Launcher on = launcher(place);
  poisson_sample(on, n, rate, stream, ids, room, total);
}

}  // namespace fastdp::cuda
