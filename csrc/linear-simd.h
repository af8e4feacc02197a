// Squared norm of a linear layer's per-sample gradient G = sum_t b_t a_t^T without forming it ("ghost norm",
// Goodfellow 2015 for one position; Li et al. 2022, arXiv:2110.05679, for sequences):
// |G|^2 = sum_{t,u} <a_t, a_u> <b_t, b_u>. Products are summed in double, since the terms may cancel.

template <class T>
double gram_sq_norm(Rows<T> a, Rows<T> b, bool bias, double* scratch) {
  double total = 0.0;
  for (int64_t t = 0; t < a.rows; ++t) {
    total += sum_squares(a.row(t), a.n) * sum_squares(b.row(t), b.n);
    for (int64_t u = 0; u < t; ++u) total += 2.0 * dot(a.row(t), a.row(u), a.n) * dot(b.row(t), b.row(u), b.n);
  }
  if (bias) {
    for (int64_t j = 0; j < b.n; ++j) scratch[j] = 0.0;
    for (int64_t t = 0; t < b.rows; ++t) {
      const T* row = b.row(t);
      for (int64_t j = 0; j < b.n; ++j) scratch[j] += load(row[j]);
    }
    for (int64_t j = 0; j < b.n; ++j) total += scratch[j] * scratch[j];
  }
  return total < 0.0 ? 0.0 : total;  // below zero only by rounding; a NaN stays a NaN
}
