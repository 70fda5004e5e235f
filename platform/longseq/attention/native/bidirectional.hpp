// Bidirectional attention of longseq.attention.bidirectional, one row of N at a time: the same names.
#pragma once

#include "state.hpp"

class TwoPasses : Kernel {
  public:
    using Kernel::Kernel;

    void forward(const Row& in, float* out, float* inverse_den, float* kept);
    void backward(const Row& in, const float* out, const float* inverse_den, const float* kept, const float* dout,
                  float* dq, float* dk, float* dv);

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

// Writes out (queries, e), inverse_den (queries,), and the state to kept (State::size).
inline void TwoPasses::forward(const Row& in, float* out, float* inverse_den, float* kept) {
    start_again();
    State state = State::at(kept, m, e);
    std::memset(kept, 0, State::size(m, e) * sizeof(float));
    *state.c = NOTHING;
    for (int64_t start = 0; start < shape.length; start += CHUNK) {
        take_keys(in, start, xt, phi, scale, values);
        float top = *state.c;
        for (int j = 0; j < CHUNK; ++j) top = std::fmax(top, scale[j]);
        weigh(top);
        scale_rows(values, weights, row, values);
        absorb(exp2v(splat(*state.c - top))[0], phi, values, weights, state, state);
        *state.c = top;
    }
    float den[CHUNK];
    for (int64_t start = 0; start < shape.queries; start += CHUNK) {
        take_queries(in, start, xt, phi, scale);
        read(phi, state, rows, den);
        for (int i = 0; i < CHUNK; ++i) {
            den[i] = inverse(den[i]);
            if (start + i < shape.queries) inverse_den[start + i] = den[i];
        }
        scale_rows(rows, den, row, rows);
        put(rows, shape.queries, start, e, out);
    }
}

// Writes dq, dk, dv.
inline void TwoPasses::backward(const Row& in, const float* out, const float* inverse_den, const float* kept,
                                const float* dout, float* dq, float* dk, float* dv) {
    start_again();
    const State state = State::at(const_cast<float*>(kept), m, e);
    State d_state = empty_state();  // R
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
    for (int64_t start = 0; start < shape.length; start += CHUNK) {
        take_keys(in, start, xt, phi, scale, values);
        weigh(*state.c);
        read(phi, d_state, rows, nullptr);
        scale_rows(rows, weights, row, rows);
        put(rows, shape.length, start, e, dv);
        scale_rows(values, weights, row, values);
        transpose(values, row, e, turned);
        spread(d_state, turned, weights, d_phi);
        map.vjp(xt, phi, d_phi, weight, rows, x_row, nullptr);
        put(rows, shape.length, start, d, dk);
    }
}
