// What Python calls (see backend.py): plain C, so that any compiler's library loads into any Python and PyTorch.
#include "bidirectional.hpp"
#include "scan.hpp"
#include "window.hpp"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Mirrored by backend.py.
struct Inputs {
    const float *q, *k, *v;
    const uint8_t* hidden;
    const int32_t* runs;
    const float* decay;              // (N,) gamma, natural units
    const double* gate;              // (N, L + 1) in its place, natural units
    int64_t count;                   // N
    int64_t q_step, k_step, v_step;  // floats from a row of N to the next: they may be slices

    Row row(int64_t n, const Shape& shape, const FeatureMap& map) const {
        const int64_t at = n * shape.length;
        return {q + n * q_step,
                k + n * k_step,
                v + n * v_step,
                hidden ? hidden + at : nullptr,
                runs ? runs + at : nullptr,
                decay ? decay[n] * 1.44269504f : 0.0f,
                gate ? gate + n * (shape.length + 1) : nullptr,
                shape.length};
    }

    // Where the gradient of row n's decay or gate begins; null where there is none.
    double* fading(double* all, int64_t n, const Shape& shape) const {
        return all ? all + n * (gate ? shape.length + 1 : 1) : nullptr;
    }
};

namespace {

// work(kernel, n) for every row n, each by one thread with a kernel of its own: the result is that of one thread.
template <class K, class Work, class... More>
void each_row(const FeatureMap* map, const Shape* shape, const Inputs* in, int threads, Work work, const More&... more) {
#pragma omp parallel num_threads(threads)
    {
        K kernel(*map, *shape, more...);
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < in->count; ++n) work(kernel, n);
    }
}

}  // namespace

// Floats that a scan keeps for each row of N.
EXPORTED int64_t longseq_scan_kept(const FeatureMap* map, const Shape* shape) {
    return groups(*shape) * State::size(map->features, shape->value_dim);
}

// `initial` and `log_scale` (N,) may be null.
EXPORTED void longseq_scan_forward(const FeatureMap* map, const Shape* shape, const Inputs* in, const States* initial,
                                   float* out, float* lse, float* inverse_den, float* kept, float* log_scale,
                                   int threads) {
    const int64_t size = longseq_scan_kept(map, shape);
    each_row<Scan>(map, shape, in, threads, [&](Scan& scan, int64_t n) {
        const int64_t at = n * shape->length;
        scan.forward(in->row(n, *shape, *map), n, initial, out + at * shape->value_dim, lse + at, inverse_den + at,
                     kept ? kept + n * size : nullptr, log_scale ? log_scale + n : nullptr);
    });
}

// `later` and `d_initial` may be null.
EXPORTED void longseq_scan_backward(const FeatureMap* map, const Shape* shape, const Inputs* in, const States* later,
                                    const States* d_initial, const float* out, const float* inverse_den,
                                    const float* kept, const float* dout, const float* dlse, float* dq, float* dk,
                                    float* dv, double* d_decay, int threads) {
    const int64_t size = longseq_scan_kept(map, shape);
    each_row<Scan>(map, shape, in, threads, [&](Scan& scan, int64_t n) {
        const int64_t at = n * shape->length, x = at * map->head_dim, v = at * shape->value_dim;
        scan.backward(in->row(n, *shape, *map), n, later, d_initial, out + v, inverse_den + at, kept + n * size,
                      dout + v, dlse ? dlse + at : nullptr, dq + x, dk + x, dv + v, in->fading(d_decay, n, *shape));
    });
}

EXPORTED void longseq_sum_up(const FeatureMap* map, const Shape* shape, const Inputs* in, const States* to,
                             const float* last, const float* log_weight, int threads) {
    each_row<TwoPasses>(map, shape, in, threads, [&](TwoPasses& passes, int64_t n) {
        const int64_t at = n * shape->length;
        passes.sum_up(in->row(n, *shape, *map), n, last ? last + at : nullptr, log_weight ? log_weight + at : nullptr,
                      *to);
    });
}

EXPORTED void longseq_bidirectional_read(const FeatureMap* map, const Shape* shape, const Inputs* in,
                                         const States* state, float* out, float* inverse_den, int threads) {
    each_row<TwoPasses>(map, shape, in, threads, [&](TwoPasses& passes, int64_t n) {
        const int64_t at = n * shape->queries;
        passes.read(in->row(n, *shape, *map), n, *state, out + at * shape->value_dim, inverse_den + at);
    });
}

EXPORTED void longseq_bidirectional_queries_vjp(const FeatureMap* map, const Shape* shape, const Inputs* in,
                                                const States* state, const States* d_state, const float* out,
                                                const float* inverse_den, const float* dout, float* dq, int threads) {
    each_row<TwoPasses>(map, shape, in, threads, [&](TwoPasses& passes, int64_t n) {
        const int64_t q = n * shape->queries, v = q * shape->value_dim;
        passes.queries_vjp(in->row(n, *shape, *map), n, *state, *d_state, out + v, inverse_den + q, dout + v,
                           dq + q * map->head_dim);
    });
}

EXPORTED void longseq_bidirectional_keys_vjp(const FeatureMap* map, const Shape* shape, const Inputs* in,
                                             const States* d_state, float* dk, float* dv, int threads) {
    each_row<TwoPasses>(map, shape, in, threads, [&](TwoPasses& passes, int64_t n) {
        const int64_t k = n * shape->length;
        passes.keys_vjp(in->row(n, *shape, *map), n, *d_state, dk + k * map->head_dim, dv + k * shape->value_dim);
    });
}

EXPORTED void longseq_window_forward(const FeatureMap* map, const Shape* shape, const Inputs* in, const Band* band,
                                     float* out, float* lse, int threads) {
    const auto work = [&](Window& window, int64_t n) {
        const int64_t at = n * shape->length;
        window.forward(in->row(n, *shape, *map), out + at * shape->value_dim, lse + at);
    };
    each_row<Window>(map, shape, in, threads, work, *band);
}

// dk and dv start as zeros.
EXPORTED void longseq_window_backward(const FeatureMap* map, const Shape* shape, const Inputs* in, const Band* band,
                                      const float* out, const float* lse, const float* dout, const float* dlse,
                                      float* dq, float* dk, float* dv, double* d_decay, int threads) {
    const auto work = [&](Window& window, int64_t n) {
        const int64_t at = n * shape->length, x = at * map->head_dim, v = at * shape->value_dim;
        window.backward(in->row(n, *shape, *map), out + v, lse + at, dout + v, dlse ? dlse + at : nullptr, dq + x,
                        dk + x, dv + v, in->fading(d_decay, n, *shape));
    };
    each_row<Window>(map, shape, in, threads, work, *band);
}
