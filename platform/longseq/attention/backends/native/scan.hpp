// The causal scan of longseq.attention.scan, one row of N at a time: the same mathematics and the same names.
#pragma once

#include "state.hpp"

// Kept for the backward pass: the state before every GROUP-th chunk.
constexpr int GROUP = 2;

inline int64_t groups(const Shape& shape) { return (chunks(shape.length) + GROUP - 1) / GROUP; }

// One chunk of queries with the keys `delay` positions before them.
struct Chunk {
    float *qt, *kt, *fq, *fk;    // (d, CHUNK) twice, (m, CHUNK) twice
    float *values;               // (CHUNK, e padded); rows of absent keys are 0
    float *q_scale, *k_scale;    // (CHUNK,); -infinity: absent. A decay is in k_scale.
    float *row_scale;            // M (CHUNK,)
    float *carried, *entering;   // exp(c - M), exp(b - c'), (CHUNK,)
    float *weights;              // exp(b_j - M_i), 0 where i does not see j: (CHUNK, CHUNK)
    float left, after;           // exp(c - c'), c'
    int64_t keys;                // the first one's position
};

class Scan : Kernel {
  public:
    using Kernel::Kernel;

    void forward(const Row& in, int64_t n, const States* initial, float* out, float* lse, float* inverse_den,
                 float* kept, float* log_scale);
    void backward(const Row& in, int64_t n, const States* later, const States* d_initial, const float* out,
                  const float* inverse_den, const float* kept, const float* dout, const float* dlse, float* dq,
                  float* dk, float* dv, double* d_decay);

  private:
    float* scores = nullptr;  // A (CHUNK, CHUNK)

    Chunk new_chunk();
    void enter(const Row& in, int64_t start, Chunk& chunk, float before);
    void scale(Chunk& chunk, float before);
    void scale_runs(const Row& in, int64_t start, Chunk& chunk, float before);
    void attend(const Chunk& chunk);
    void absorb_keys(const Chunk& chunk, State from, State to);
    float next(const Row& in, const Chunk& chunk) const {
        return in.gate ? chunk.after + in.fade(chunk.keys, chunk.keys + CHUNK) : chunk.after - CHUNK * in.decay;
    }
};

inline Chunk Scan::new_chunk() {
    Chunk c{};
    c.qt = space.take(d * CHUNK);
    c.kt = space.take(d * CHUNK);
    c.fq = space.take(m * CHUNK);
    c.fk = space.take(m * CHUNK);
    c.values = space.take(CHUNK * row);
    for (float** p : {&c.q_scale, &c.k_scale, &c.row_scale, &c.carried, &c.entering}) *p = space.take(CHUNK);
    c.weights = space.take(CHUNK * CHUNK);
    return c;
}

// Loads chunk number start / CHUNK; `before` is the state's log-scale.
inline void Scan::enter(const Row& in, int64_t start, Chunk& chunk, float before) {
    take_queries(in, start, chunk.qt, chunk.fq, chunk.q_scale);
    take_keys(in, start - shape.delay, chunk.kt, chunk.fk, chunk.k_scale, chunk.values);
    chunk.keys = start - shape.delay;
    for (int j = 0; in.gate && j < CHUNK; ++j) chunk.k_scale[j] -= in.fade(chunk.keys, chunk.keys + j + 1);
    for (int j = 0; !in.gate && j < CHUNK; ++j) chunk.k_scale[j] += in.decay * j;
    in.runs ? scale_runs(in, start, chunk, before) : scale(chunk, before);
}

inline void Scan::scale(Chunk& chunk, float before) {
    float top = before;
    for (int j = 0; j < CHUNK; ++j) chunk.row_scale[j] = top = std::fmax(top, chunk.k_scale[j]);
    chunk.after = top;
    chunk.left = exp2v(splat(before - top))[0];
    for (int j = 0; j < CHUNK; j += VL) {
        store(chunk.carried + j, exp2v(before - load(chunk.row_scale + j)));
        store(chunk.entering + j, exp2v(load(chunk.k_scale + j) - top));
    }
    for (int i = 0; i < CHUNK; ++i) {
        float* weights = chunk.weights + i * CHUNK;
        for (int j = 0; j <= i; j += VL) store(weights + j, exp2v(load(chunk.k_scale + j) - chunk.row_scale[i]));
        for (int j = i + 1; j < i / VL * VL + VL; ++j) weights[j] = 0;
    }
}

inline void Scan::scale_runs(const Row& in, int64_t start, Chunk& chunk, float before) {
    const int64_t keys = start - shape.delay, length = shape.length;
    // before the first key: an empty state, or one of the first position's document
    const auto run_of = [&](int64_t at) { return in.runs[at < 0 ? 0 : at < length ? at : length - 1]; };
    const int32_t held = run_of(keys - 1), last = run_of(keys + CHUNK - 1);  // the state's document before and after
    const bool goes_on = held == last;
    float top = goes_on ? before : NOTHING;
    for (int j = 0; j < CHUNK; ++j)
        if (run_of(keys + j) == last) top = std::fmax(top, chunk.k_scale[j]);
    chunk.after = top;
    chunk.left = goes_on ? exp2v(splat(before - top))[0] : 0.0f;
    for (int i = 0; i < CHUNK; ++i) {
        const int32_t mine = run_of(start + i);
        const bool reads = mine == held;
        float* visible = chunk.weights + i * CHUNK;
        float most = reads ? before : NOTHING;
        for (int j = 0; j < CHUNK; ++j) {
            visible[j] = j <= i && run_of(keys + j) == mine ? chunk.k_scale[j] : -INF;
            most = std::fmax(most, visible[j]);
        }
        chunk.row_scale[i] = most;
        for (int j = 0; j < CHUNK; j += VL) store(visible + j, exp2v(load(visible + j) - most));
        chunk.carried[i] = reads ? exp2v(splat(before - most))[0] : 0.0f;
        chunk.entering[i] = run_of(keys + i) == last ? exp2v(splat(chunk.k_scale[i] - top))[0] : 0.0f;
    }
}

// A (CHUNK, CHUNK) lower triangle: phi(q_i) . phi(k_j) * weights.
inline void Scan::attend(const Chunk& chunk) {
    for (int i = 0; i < CHUNK; i += VL) {  // the block on the diagonal in full, nothing right of it
        product(VL, i + VL, m, Matrix{chunk.fq, 1, CHUNK}.from(i, 0), chunk.fk, CHUNK, scores + i * CHUNK, CHUNK, false);
        for (int r = i; r < i + VL; ++r)
            for (int j = 0; j < i + VL; j += VL) {
                float* at = scores + r * CHUNK + j;
                store(at, load(at) * load(chunk.weights + r * CHUNK + j));
            }
    }
}

// to = the state `from` and this chunk's keys; the two may be one.
inline void Scan::absorb_keys(const Chunk& chunk, State from, State to) {
    scale_rows(chunk.values, chunk.entering, row, rows);
    absorb(chunk.left, chunk.fk, rows, chunk.entering, from, to);
}

// Writes out (L, e), lse (L,), inverse_den (L,), and kept (groups, State::size) and the last log-scale unless they are
// null. `initial` may be null.
inline void Scan::forward(const Row& in, int64_t n, const States* initial, float* out, float* lse, float* inverse_den,
                          float* kept, float* log_scale) {
    start_again();
    scores = space.take(CHUNK * CHUNK);
    Chunk chunk = new_chunk();
    State state = empty_state();
    if (initial) import_from(*initial, n, state);
    const int64_t size = State::size(m, e);
    float den[CHUNK], inverses[CHUNK];
    for (int64_t number = 0; number < chunks(shape.length); ++number) {
        const int64_t start = number * CHUNK;
        if (kept && number % GROUP == 0) std::memcpy(kept + number / GROUP * size, state.s, size * sizeof(float));
        enter(in, start, chunk, *state.c);
        attend(chunk);
        read(chunk.fq, state, rows, den);
        scale_rows(rows, chunk.carried, row, rows);
        for (int i = 0; i < CHUNK; i += VL)
            product(VL, row, i + VL, {scores + i * CHUNK, CHUNK, 1}, chunk.values, row, rows + i * row, row, true);
        for (int i = 0; i < CHUNK; ++i) {
            Vec total{};
            for (int j = 0; j <= i; j += VL) total += load(scores + i * CHUNK + j);
            den[i] = den[i] * chunk.carried[i] + sum(total);
            inverses[i] = inverse(den[i]);
            const int64_t at = start + i;
            if (at >= shape.length) continue;
            inverse_den[at] = inverses[i];
            const float log_den = std::log2(den[i]) + chunk.row_scale[i] + chunk.q_scale[i];
            const float seen = in.gate ? log_den + in.fade(chunk.keys, at + 1) : log_den - in.decay * (i + shape.delay);
            lse[at] = inverses[i] == 0 ? NOTHING : 0.69314718f * seen;
        }
        scale_rows(rows, inverses, row, rows);
        put(rows, shape.length, start, e, out);
        absorb_keys(chunk, state, state);
        *state.c = next(in, chunk);
    }
    // the last chunk was counted as a whole one
    const int64_t counted = chunks(shape.length) * CHUNK;
    if (log_scale)
        *log_scale = 0.69314718f * (in.gate ? *state.c + in.fade(counted - shape.delay, shape.length - shape.delay)
                                            : *state.c + in.decay * static_cast<float>(counted - shape.length));
}

// Writes dq, dk, dv, and d_initial unless it is null, and adds to d_decay unless it is null; dlse and later may be null.
// The decay's gradient is counted from every chunk's start, see scan.py. With a gate it is that one's, (L + 1,).
inline void Scan::backward(const Row& in, int64_t row_number, const States* later_, const States* d_initial,
                           const float* out, const float* inverse_den, const float* kept, const float* dout,
                           const float* dlse, float* dq, float* dk, float* dv, double* d_decay) {
    start_again();
    scores = space.take(CHUNK * CHUNK);
    const int64_t size = State::size(m, e);
    const int64_t keys_end = shape.length > shape.delay ? shape.length - shape.delay : 0;
    Chunk chunks_[GROUP];
    State states[GROUP];  // before each chunk of the group
    for (int n = 0; n < GROUP; ++n) chunks_[n] = new_chunk(), states[n] = new_state();
    State later = empty_state();  // R
    if (later_) import_from(*later_, row_number, later);
    const float* weight = padded_weight();
    float *g = space.take(CHUNK * row), *reading = space.take(CHUNK * row), *turned = space.take(row * CHUNK),
          *d_scores = space.take(CHUNK * CHUNK), *d_scores_t = space.take(CHUNK * CHUNK), *d_phi = space.take(m * CHUNK);
    float g_den[CHUNK], reading_den[CHUNK], of_scale[CHUNK];

    // keys too late for any query
    std::memset(dk + keys_end * d, 0, (shape.length - keys_end) * d * sizeof(float));
    std::memset(dv + keys_end * e, 0, (shape.length - keys_end) * e * sizeof(float));
    for (int64_t group = groups(shape) - 1; group >= 0; --group) {
        const int64_t first = group * GROUP, left = chunks(shape.length) - first;
        const int count = static_cast<int>(left < GROUP ? left : GROUP);
        std::memcpy(states[0].s, kept + group * size, size * sizeof(float));
        for (int n = 0; n < count; ++n) {
            enter(in, (first + n) * CHUNK, chunks_[n], *states[n].c);
            if (n + 1 == count) break;
            absorb_keys(chunks_[n], states[n], states[n + 1]);
            *states[n + 1].c = next(in, chunks_[n]);
        }
        for (int n = count - 1; n >= 0; --n) {
            const Chunk& chunk = chunks_[n];
            const int64_t start = (first + n) * CHUNK, keys = start - shape.delay;
            gradient(start, dout, dlse, out, inverse_den, g, g_den);
            scale_rows(g, chunk.carried, row, reading);
            for (int i = 0; i < CHUNK; ++i) reading_den[i] = g_den[i] * chunk.carried[i];

            // dA = (g v^T + g_den) * weights, lower triangle
            attend(chunk);
            transpose(chunk.values, row, e, turned);
            for (int i = 0; i < CHUNK; i += VL) {
                product(VL, i + VL, e, {g + i * row, row, 1}, turned, CHUNK, d_scores + i * CHUNK, CHUNK, false);
                for (int r = i; r < i + VL; ++r)
                    for (int j = 0; j < i + VL; j += VL) {
                        float* at = d_scores + r * CHUNK + j;
                        store(at, (load(at) + g_den[r]) * load(chunk.weights + r * CHUNK + j));
                    }
            }
            transpose(d_scores, CHUNK, CHUNK, d_scores_t);

            // dv = entering * R^T phi(k) + A^T g
            read(chunk.fk, later, rows, nullptr);
            scale_rows(rows, chunk.entering, row, rows);
            for (int j = 0; j < CHUNK; j += VL)
                product(VL, row, CHUNK - j, Matrix{scores, 1, CHUNK}.from(j, j), g + j * row, row, rows + j * row, row,
                        true);
            put(rows, keys_end, keys, e, dv);

            // dphi(k) = R (entering [v, 1])^T + dA^T phi(q)
            for (int c = 0; c < e; ++c)
                for (int j = 0; j < CHUNK; j += VL)
                    store(turned + c * CHUNK + j, load(turned + c * CHUNK + j) * load(chunk.entering + j));
            spread(later, turned, chunk.entering, d_phi);
            for (int i = 0; i < CHUNK; i += VL)
                product(m, i + VL, VL, {chunk.fq + i, CHUNK, 1}, d_scores + i * CHUNK, CHUNK, d_phi, CHUNK, true);
            map.vjp(chunk.kt, chunk.fk, d_phi, weight, rows, x_row, of_scale);
            put(rows, keys_end, keys, d, dk);
            for (int j = 0; in.gate && j < CHUNK; ++j) {
                if (keys + j >= 0 && keys + j < keys_end) d_decay[keys + j + 1] -= of_scale[j];
                if (dlse && start + j < shape.length) d_decay[start + j + 1] += dlse[start + j];
            }
            for (int j = 0; d_decay && !in.gate && j < CHUNK; ++j) {
                if (keys + j >= 0 && keys + j < keys_end) *d_decay += of_scale[j] * static_cast<double>(j - shape.delay);
                if (dlse && start + j < shape.length) *d_decay -= dlse[start + j] * static_cast<double>(j);
            }

            // dphi(q) = S (carried [g, g_den])^T + dA phi(k)
            transpose(reading, row, e, turned);
            spread(states[n], turned, reading_den, d_phi);
            for (int j = 0; j < CHUNK; j += VL)
                product(m, CHUNK - j, VL, {chunk.fk + j, CHUNK, 1}, d_scores_t + j * CHUNK + j, CHUNK, d_phi + j, CHUNK,
                        true);
            map.vjp(chunk.qt, chunk.fq, d_phi, weight, rows, x_row, nullptr);
            put(rows, shape.length, start, d, dq);

            if (d_decay && later_ && start + CHUNK >= shape.length) {  // R of the queries behind the last one
                State end = new_state();
                for (int j = 0; j < CHUNK; ++j)
                    if (keys + j >= keys_end) chunk.entering[j] = 0;
                absorb_keys(chunk, states[n], end);
                const double through = flow(end, later);
                if (!in.gate) *d_decay += through * static_cast<double>(start - (shape.length - shape.delay));
                else if (keys_end) d_decay[keys_end] += through;  // the state behind is seen from its last key
            }
            absorb(chunk.left, chunk.fq, reading, reading_den, later, later);
            if (d_decay && !in.gate && start) *d_decay -= flow(states[n], later) * CHUNK;
        }
    }
    if (d_initial) export_to(*d_initial, row_number, later);
}
