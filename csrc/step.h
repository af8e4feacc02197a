// What an optimizer does with one element, once its gradient is known. Included once per instruction set, as chacha.h,
// and for one GPU thread: only operations that are rounded once, so that all give the same bits.

// SGD as torch.optim.SGD does it; without a velocity where there is no momentum.
template <class T>
struct SgdUpdate {
  T lr, keep, take, look_ahead;
  bool nesterov;

  FASTDP_BOTH explicit SgdUpdate(const SgdStep& h)
      : lr(static_cast<T>(h.lr)),
        keep(static_cast<T>(h.first ? 0.0 : h.momentum)),
        take(static_cast<T>(h.first ? 1.0 : 1.0 - h.dampening)),
        look_ahead(static_cast<T>(h.momentum)),
        nesterov(h.nesterov) {}
  FASTDP_LANES void operator()(T g, T& p) const { p -= lr * g; }
  FASTDP_LANES void operator()(T g, T& p, T& velocity) const {
    velocity = keep * velocity + take * g;
    p -= lr * (nesterov ? g + look_ahead * velocity : velocity);
  }
};

template <class T>
struct AdamUpdate {
  T take1, keep2, take2, keep, step_size, root, eps;

  FASTDP_BOTH explicit AdamUpdate(const AdamStep& h)
      : take1(static_cast<T>(1.0 - h.beta1)),
        keep2(static_cast<T>(h.beta2)),
        take2(static_cast<T>(1.0 - h.beta2)),
        keep(static_cast<T>(h.keep)),
        step_size(static_cast<T>(h.step_size)),
        root(static_cast<T>(h.root)),
        eps(static_cast<T>(h.eps)) {}
  FASTDP_LANES void operator()(T g, T& p, T& exp_avg, T& exp_avg_sq) const {
    exp_avg += take1 * (g - exp_avg);
    exp_avg_sq = keep2 * exp_avg_sq + take2 * g * g;
    p = keep * p - step_size * exp_avg / (square_root(exp_avg_sq) / root + eps);
  }
};
