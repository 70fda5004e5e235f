// Exact attention in a sliding window, longseq.attention.window, one row of N at a time: the same names.
#pragma once

#include "state.hpp"

// Mirrored by backend.py.
struct Band {
    int64_t window;
    int32_t causal;
};

class Window : Kernel {
  public:
    Window(const FeatureMap& map, const Shape& shape, const Band& band)
        : Kernel(map, shape), band_(band), scale_(1.0f / std::sqrt(static_cast<float>(map.head_dim))) {}

    void forward(const Row& in, float* out, float* lse);
    void backward(const Row& in, const float* out, const float* lse, const float* dout, const float* dlse, float* dq,
                  float* dk, float* dv, double* d_decay);

  private:
    const Band band_;
    const float scale_;
    float *kt = nullptr, *values = nullptr, *queries = nullptr;  // (d, CHUNK), (CHUNK, row), (CHUNK, x_row)
    float *keys_ = nullptr, *scores = nullptr;                   // (CHUNK, x_row), (CHUNK, CHUNK)

    void start_again();
    int64_t first_keys(int64_t start) const;
    int64_t keys_end(int64_t start) const;
    void enter(const Row& in, int64_t keys);
    void score(const Row& in, int64_t start, int64_t keys);
    void forgotten(const float* d_scores, int64_t start, int64_t keys, double* d_gate) const;
};

inline void Window::start_again() {
    Kernel::start_again();
    kt = space.take(d * CHUNK);
    values = space.take(CHUNK * row);
    queries = space.take(CHUNK * x_row);
    keys_ = space.take(CHUNK * x_row);
    scores = space.take(CHUNK * CHUNK);
}

// The chunks of keys in reach of the queries start...: from one multiple of CHUNK to another.
inline int64_t Window::first_keys(int64_t start) const {
    const int64_t first = start - band_.window + 1;
    return first < 0 ? 0 : first / CHUNK * CHUNK;
}

inline int64_t Window::keys_end(int64_t start) const {
    const int64_t stop = start + CHUNK + (band_.causal ? 0 : band_.window - 1);
    return stop < shape.length ? stop : shape.length;
}

inline void Window::enter(const Row& in, int64_t keys) {
    cut(in.k, shape.length, keys, d, keys_);
    cut(in.v, shape.length, keys, e, values);
    for (int j = 0; in.hidden && j < CHUNK && keys + j < shape.length; ++j) {
        if (!in.hidden[keys + j]) continue;
        std::memset(keys_ + j * x_row, 0, x_row * sizeof(float));
        std::memset(values + j * row, 0, row * sizeof(float));
    }
    transpose(keys_, x_row, d, kt);
}

// scores (CHUNK, CHUNK) = log2(e) (q . k / sqrt(d)) - decay |i - j|, or what a gate takes between the two; -infinity
// where i does not see j.
inline void Window::score(const Row& in, int64_t start, int64_t keys) {
    product(CHUNK, CHUNK, d, {queries, x_row, 1}, kt, CHUNK, scores, CHUNK, false);
    const int64_t length = shape.length;
    Vec bias[CHUNK_VECS];   // -infinity: no such key
    Vec gates[CHUNK_VECS];  // what a gate takes from the chunk's start
    IntVec runs[CHUNK_VECS];
    for (int j = 0; j < CHUNK; ++j) {
        const int64_t at = keys + j;
        const bool absent = at >= length || (in.hidden && in.hidden[at]);
        bias[j / VL][j % VL] = absent ? -INF : 0.0f;
        gates[j / VL][j % VL] = in.gate ? in.fade(keys, at + 1) : 0.0f;
        runs[j / VL][j % VL] = in.runs && at < length ? in.runs[at] : 0;
    }
    IntVec lane;
    for (int j = 0; j < VL; ++j) lane[j] = j;
    const Vec unit = splat(scale_ * 1.44269504f);
    for (int i = 0; i < CHUNK; ++i) {
        // i - j, small here whatever the length
        const int32_t ahead = static_cast<int32_t>(start + i - keys);
        const int32_t reach = band_.window < INT32_MAX ? static_cast<int32_t>(band_.window) : INT32_MAX;
        const int32_t run = in.runs ? in.runs[start + i < length ? start + i : length - 1] : 0;
        const float gate = in.gate ? in.fade(keys, start + i + 1) : 0.0f;
        for (int j = 0; j < CHUNK_VECS; ++j) {
            const IntVec distance = ahead - (lane + j * VL), apart = distance < 0 ? -distance : distance;
            IntVec sees = (apart < reach) & (runs[j] == run);
            if (band_.causal) sees &= distance >= 0;
            float* at = scores + i * CHUNK + j * VL;
            const Vec score = load(at) * unit + bias[j];
            const Vec s = in.gate ? score - maximum(gate - gates[j], gates[j] - gate)
                                  : score - __builtin_convertvector(apart, Vec) * in.decay;
            store(at, sees ? s : splat(-INF));
        }
    }
}

// Adds the gradients of scores (CHUNK, CHUNK) to that of the gate's sums: of a later query more, of its key less.
inline void Window::forgotten(const float* d_scores, int64_t start, int64_t keys, double* d_gate) const {
    IntVec lane;
    for (int j = 0; j < VL; ++j) lane[j] = j;
    Vec of_keys[CHUNK_VECS]{};
    for (int i = 0; i < CHUNK && start + i < shape.length; ++i) {
        const int32_t ahead = static_cast<int32_t>(start + i - keys);
        Vec total{};
        for (int j = 0; j < CHUNK_VECS; ++j) {
            const Vec grad = load(d_scores + i * CHUNK + j * VL);
            const Vec later = ahead - (lane + j * VL) < 0 ? -grad : grad;
            total += later;
            of_keys[j] += later;
        }
        d_gate[start + i + 1] += sum(total);
    }
    for (int j = 0; j < CHUNK && keys + j < shape.length; ++j) d_gate[keys + j + 1] -= of_keys[j / VL][j % VL];
}

// Writes out (L, e) and lse (L,).
inline void Window::forward(const Row& in, float* out, float* lse) {
    start_again();
    float *total = space.take(CHUNK * row), top[CHUNK], den[CHUNK], shrink[CHUNK];
    for (int64_t start = 0; start < shape.length; start += CHUNK) {
        cut(in.q, shape.length, start, d, queries);
        std::memset(total, 0, CHUNK * row * sizeof(float));
        for (int i = 0; i < CHUNK; ++i) top[i] = NOTHING, den[i] = 0;
        for (int64_t keys = first_keys(start); keys < keys_end(start); keys += CHUNK) {
            enter(in, keys);
            score(in, start, keys);
            for (int i = 0; i < CHUNK; ++i) {
                Vec most = splat(top[i]), added{};
                for (int j = 0; j < CHUNK; j += VL) most = maximum(load(scores + i * CHUNK + j), most);
                float now = top[i];
                for (int j = 0; j < VL; ++j) now = std::fmax(now, most[j]);
                for (int j = 0; j < CHUNK; j += VL) {
                    const Vec weight = exp2v(load(scores + i * CHUNK + j) - now);
                    store(scores + i * CHUNK + j, weight);
                    added += weight;
                }
                shrink[i] = exp2v(splat(top[i] - now))[0];
                den[i] = den[i] * shrink[i] + sum(added);
                top[i] = now;
            }
            scale_rows(total, shrink, row, total);
            product(CHUNK, row, CHUNK, {scores, CHUNK, 1}, values, row, total, row, true);
        }
        for (int i = 0; i < CHUNK; ++i) {
            if (start + i < shape.length)
                lse[start + i] = den[i] == 0 ? NOTHING : 0.69314718f * (std::log2(den[i]) + top[i]);
            den[i] = den[i] == 0 ? 0.0f : 1.0f / den[i];
        }
        scale_rows(total, den, row, total);
        put(total, shape.length, start, e, out);
    }
}

// Writes dq; adds to dk and dv, and to d_decay unless it is null: with a gate its gradient, (L + 1,). dlse may be null.
inline void Window::backward(const Row& in, const float* out, const float* lse, const float* dout, const float* dlse,
                             float* dq, float* dk, float* dv, double* d_decay) {
    start_again();
    float *total = space.take(CHUNK * x_row), *grad = space.take(CHUNK * row), *turned = space.take(row * CHUNK),
          *d_scores = space.take(CHUNK * CHUNK);
    float shift[CHUNK], log_den[CHUNK];
    for (int64_t start = 0; start < shape.length; start += CHUNK) {
        cut(in.q, shape.length, start, d, queries);
        cut(out, shape.length, start, e, rows);
        cut(dout, shape.length, start, e, grad);
        std::memset(total, 0, CHUNK * x_row * sizeof(float));
        for (int i = 0; i < CHUNK; ++i) {
            const bool inside = start + i < shape.length;
            Vec dot{};
            for (int c = 0; c < row; c += VL) dot += load(grad + i * row + c) * load(rows + i * row + c);
            shift[i] = (dlse && inside ? dlse[start + i] : 0.0f) - sum(dot);
            log_den[i] = inside ? lse[start + i] * 1.44269504f : 0.0f;
        }
        for (int64_t keys = first_keys(start); keys < keys_end(start); keys += CHUNK) {
            enter(in, keys);
            score(in, start, keys);
            transpose(values, row, e, turned);
            product(CHUNK, CHUNK, e, {grad, row, 1}, turned, CHUNK, d_scores, CHUNK, false);
            for (int i = 0; i < CHUNK; ++i)
                for (int j = 0; j < CHUNK; j += VL) {
                    const Vec weight = exp2v(load(scores + i * CHUNK + j) - log_den[i]);
                    store(scores + i * CHUNK + j, weight);
                    float* at = d_scores + i * CHUNK + j;
                    store(at, (load(at) + shift[i]) * weight);
                }
            product(CHUNK, row, CHUNK, {scores, 1, CHUNK}, grad, row, rows, row, false);
            add_to(rows, 1.0f, shape.length, keys, e, dv);
            product(CHUNK, x_row, CHUNK, {d_scores, 1, CHUNK}, queries, x_row, rows, x_row, false);
            add_to(rows, scale_, shape.length, keys, d, dk);
            product(CHUNK, x_row, CHUNK, {d_scores, CHUNK, 1}, keys_, x_row, total, x_row, true);
            if (in.gate) forgotten(d_scores, start, keys, d_decay);
            for (int i = 0; d_decay && !in.gate && i < CHUNK; ++i)
                for (int j = 0; j < CHUNK; ++j)
                    *d_decay -= d_scores[i * CHUNK + j] * std::fabs(static_cast<double>(start + i - keys - j));
        }
        for (int i = 0; i < CHUNK * x_row; i += VL) store(total + i, load(total + i) * scale_);
        put(total, shape.length, start, d, dq);
    }
}
