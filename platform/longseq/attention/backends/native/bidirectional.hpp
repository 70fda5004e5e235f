// Bidirectional attention of longseq.attention.bidirectional, one row of N at a time: the same names.
#pragma once

#include "state.hpp"

class TwoPasses : Kernel {
  public:
    using Kernel::Kernel;

    void sum_up(const Row& in, int64_t n, const float* last, const float* log_weight, const States& to);
    void read(const Row& in, int64_t n, const States& state, float* out, float* inverse_den);
    void queries_vjp(const Row& in, int64_t n, const States& state, const States& d_state, const float* out,
                     const float* inverse_den, const float* dout, float* dq);
    void keys_vjp(const Row& in, int64_t n, const States& d_state, float* dk, float* dv);

  private:
    float *xt = nullptr, *phi = nullptr, *values = nullptr;  // (d, CHUNK), (m, CHUNK), (CHUNK, row) of one chunk
    float scale[CHUNK], weights[CHUNK];

    void start_again() {
        Kernel::start_again();
        xt = space.take(d * CHUNK);
        phi = space.take(m * CHUNK);
        values = space.take(CHUNK * row);
    }

    // exp(b - c), (CHUNK,)
    void weigh(float c) {
        for (int j = 0; j < CHUNK; j += VL) store(weights + j, exp2v(load(scale + j) - c));
    }
};

// Writes the state of the keys: the sum of 2^(b_j + w_j) phi(k_j) [v_j, last_j]. `last` (L,): null for ones; `log_weight`
// w (L,) in natural units: null for zeros.
inline void TwoPasses::sum_up(const Row& in, int64_t n, const float* last, const float* log_weight, const States& to) {
    start_again();
    State state = empty_state();
    float of_last[CHUNK];
    for (int64_t start = 0; start < shape.length; start += CHUNK) {
        take_keys(in, start, xt, phi, scale, values);
        const int inside = static_cast<int>(shape.length - start < CHUNK ? shape.length - start : CHUNK);
        for (int j = 0; log_weight && j < inside; ++j)
            if (scale[j] != -INF) scale[j] += log_weight[start + j] * 1.44269504f;
        float top = *state.c;
        for (int j = 0; j < CHUNK; ++j) top = std::fmax(top, scale[j]);
        weigh(top);
        scale_rows(values, weights, row, values);
        for (int j = 0; j < CHUNK; ++j)  // what is left out may have anything as its last value
            of_last[j] = last ? (j < inside && weights[j] != 0 ? weights[j] * last[start + j] : 0.0f) : weights[j];
        absorb(exp2v(splat(*state.c - top))[0], phi, values, of_last, state, state);
        *state.c = top;
    }
    export_to(to, n, state);
}

// Writes out (queries, e) and inverse_den (queries,).
inline void TwoPasses::read(const Row& in, int64_t n, const States& states, float* out, float* inverse_den) {
    start_again();
    State state = new_state();
    import_from(states, n, state);
    float den[CHUNK];
    for (int64_t start = 0; start < shape.queries; start += CHUNK) {
        take_queries(in, start, xt, phi, scale);
        Kernel::read(phi, state, rows, den);
        for (int i = 0; i < CHUNK; ++i) {
            den[i] = inverse(den[i]);
            if (start + i < shape.queries) inverse_den[start + i] = den[i];
        }
        scale_rows(rows, den, row, rows);
        put(rows, shape.queries, start, e, out);
    }
}

// Writes dq and the sums R.
inline void TwoPasses::queries_vjp(const Row& in, int64_t n, const States& states, const States& d_states,
                                   const float* out, const float* inverse_den, const float* dout, float* dq) {
    start_again();
    State state = new_state(), d_state = empty_state();  // R
    import_from(states, n, state);
    const float* weight = padded_weight();
    float *g = space.take(CHUNK * row), *turned = space.take(row * CHUNK), *d_phi = space.take(m * CHUNK);
    float g_den[CHUNK];
    for (int64_t start = 0; start < shape.queries; start += CHUNK) {
        take_queries(in, start, xt, phi, scale);
        gradient(start, dout, nullptr, out, inverse_den, g, g_den);
        absorb(1.0f, phi, g, g_den, d_state, d_state);
        transpose(g, row, e, turned);
        spread(state, turned, g_den, d_phi);
        map.vjp(xt, phi, d_phi, weight, rows, x_row, nullptr);
        put(rows, shape.queries, start, d, dq);
    }
    export_to(d_states, n, d_state);
}

// Writes dk and dv, from R at the log-scale of the state.
inline void TwoPasses::keys_vjp(const Row& in, int64_t n, const States& d_states, float* dk, float* dv) {
    start_again();
    State d_state = new_state();
    import_from(d_states, n, d_state);
    const float* weight = padded_weight();
    float *turned = space.take(row * CHUNK), *d_phi = space.take(m * CHUNK);
    for (int64_t start = 0; start < shape.length; start += CHUNK) {
        take_keys(in, start, xt, phi, scale, values);
        weigh(*d_state.c);
        Kernel::read(phi, d_state, rows, nullptr);
        scale_rows(rows, weights, row, rows);
        put(rows, shape.length, start, e, dv);
        scale_rows(values, weights, row, values);
        transpose(values, row, e, turned);
        spread(d_state, turned, weights, d_phi);
        map.vjp(xt, phi, d_phi, weight, rows, x_row, nullptr);
        put(rows, shape.length, start, d, dk);
    }
}
