// What both attentions are built from: inputs, chunks cut from them, and the state with its sums over keys.
#pragma once

#include <limits>
#include <vector>

#include "features.hpp"

// Mirrored by backend.py.
struct Shape {
    int64_t length;   // of keys and values
    int64_t queries;  // of queries; a scan has as many
    int64_t delay;    // of a scan
    int32_t value_dim;
};

// Inputs of one row of N; null where there is none. Row-major, contiguous.
struct Row {
    const float *q, *k, *v;  // (queries, d), (L, d), (L, e)
    const uint8_t* hidden;   // (L,) 1: padding
    const int32_t* runs;     // (L,) numbers of documents
    float decay;             // gamma a position in units of log 2; 0: none
    const double* gate;      // (L + 1,) in the place of a decay: log-gates summed up to before each position
    int64_t length;          // L

    // What the gate adds to the log of a weight from before position `from` to before `to`, in units of log 2.
    float fade(int64_t from, int64_t to) const {
        const auto sum = [&](int64_t at) { return gate[at < 0 ? 0 : at < length ? at : length]; };
        return static_cast<float>((sum(to) - sum(from)) * 1.4426950408889634);
    }
};

// Sums over keys: s (m, e padded), z (m,), log-scale c.
struct State {
    float *s, *z, *c;
    static int64_t size(int m, int e) { return static_cast<int64_t>(m) * (padded(e) + 1) + 1; }
    static State at(float* p, int m, int e) {
        const int64_t sums = static_cast<int64_t>(m) * padded(e);
        return {p, p + sums, p + sums + m};
    }
};

// A state as Python holds it, for each row of N: sums (N, m, e + 1), their last column z, and log-scales (N,) in natural
// units; null where there is none. Mirrored by backend.py.
struct States {
    float *sums, *log_scale;
};

inline int64_t chunks(int64_t length) { return (length + CHUNK - 1) / CHUNK; }

// Scratch memory of one thread, taken again for every row.
class Workspace {
  public:
    void start_again() { taken_ = 0; }

    // `floats` of it, at an address that suits every vector; whatever the last row left is in it.
    float* take(int64_t floats) {
        if (taken_ == buffers_.size()) buffers_.emplace_back(floats + 16);
        auto address = reinterpret_cast<uintptr_t>(buffers_[taken_++].data());
        return reinterpret_cast<float*>((address + 63) / 64 * 64);
    }

  private:
    std::vector<std::vector<float>> buffers_;
    size_t taken_ = 0;
};

// Positions start... of (length, n) as (CHUNK, n padded); what lies outside becomes 0.
inline void cut(const float* x, int64_t length, int64_t start, int n, float* to) {
    const int row = padded(n);
    for (int i = 0; i < CHUNK; ++i) {
        const int64_t at = start + i;
        if (at < 0 || at >= length) {
            std::memset(to + i * row, 0, row * sizeof(float));
            continue;
        }
        std::memcpy(to + i * row, x + at * n, n * sizeof(float));
        for (int j = n; j < row; ++j) to[i * row + j] = 0;
    }
}

// The inverse: (CHUNK, n padded) to those positions start... that lie inside.
inline void put(const float* from, int64_t length, int64_t start, int n, float* x) {
    for (int i = 0; i < CHUNK; ++i) {
        const int64_t at = start + i;
        if (at >= 0 && at < length) std::memcpy(x + at * n, from + i * padded(n), n * sizeof(float));
    }
}

// The same, adding `factor` times the rows.
inline void add_to(const float* from, float factor, int64_t length, int64_t start, int n, float* x) {
    for (int i = 0; i < CHUNK && start + i < length; ++i)
        for (int c = 0; c < n; ++c) x[(start + i) * n + c] += factor * from[i * padded(n) + c];
}

// Row i of x (CHUNK, row) times by[i].
inline void scale_rows(const float* x, const float* by, int row, float* to) {
    for (int i = 0; i < CHUNK; ++i)
        for (int c = 0; c < row; c += VL) store(to + i * row + c, load(x + i * row + c) * by[i]);
}

// What a thread holds of one kernel call. Names of sizes: m features, d head_dim, e value_dim.
class Kernel {
  public:
    Kernel(const FeatureMap& map, const Shape& shape)
        : map(map), shape(shape), m(map.features), d(map.head_dim), e(shape.value_dim), row(padded(e)),
          x_row(padded(d)) {}

  protected:
    const FeatureMap& map;
    const Shape& shape;
    const int m, d, e, row, x_row;
    Workspace space;
    float* rows = nullptr;  // (CHUNK, row or x_row) scratch

    void start_again() {
        space.start_again();
        rows = space.take(CHUNK * (row > x_row ? row : x_row));
    }

    // `state` becomes that of row n; without a log-scale its own stays.
    void import_from(const States& from, int64_t n, State state) const {
        const float* sums = from.sums + n * m * (e + 1);
        for (int r = 0; r < m; ++r) {
            for (int c = 0; c < row; ++c) state.s[r * row + c] = c < e ? sums[r * (e + 1) + c] : 0.0f;
            state.z[r] = sums[r * (e + 1) + e];
        }
        if (from.log_scale) *state.c = from.log_scale[n] * 1.44269504f;
    }

    // The inverse.
    void export_to(const States& to, int64_t n, State state) const {
        float* sums = to.sums + n * m * (e + 1);
        for (int r = 0; r < m; ++r) {
            for (int c = 0; c < e; ++c) sums[r * (e + 1) + c] = state.s[r * row + c];
            sums[r * (e + 1) + e] = state.z[r];
        }
        if (to.log_scale) to.log_scale[n] = *state.c * 0.69314718f;
    }

    State new_state() { return State::at(space.take(State::size(m, e)), m, e); }

    State empty_state() {
        State empty = new_state();
        std::memset(empty.s, 0, State::size(m, e) * sizeof(float));
        *empty.c = NOTHING;
        return empty;
    }

    // The map's weight with rows of x_row, for the gradient.
    float* padded_weight() {
        float* weight = space.take(static_cast<int64_t>(m) * x_row);
        for (int r = 0; r < m; ++r)
            for (int j = 0; j < x_row; ++j) weight[r * x_row + j] = j < d ? map.weight[r * d + j] : 0.0f;
        return weight;
    }

    // Queries from position `start` on: transposed (d, CHUNK), features (m, CHUNK), log-scales (CHUNK,).
    void take_queries(const Row& in, int64_t start, float* qt, float* fq, float* q_scale) {
        cut(in.q, shape.queries, start, d, rows);
        transpose(rows, x_row, d, qt);
        map.map(qt, fq, q_scale);
    }

    // The same of keys, and their values (CHUNK, row). Absent keys, hidden or outside, are 0 and have -infinity.
    void take_keys(const Row& in, int64_t start, float* kt, float* fk, float* k_scale, float* values) {
        cut(in.k, shape.length, start, d, rows);
        cut(in.v, shape.length, start, e, values);
        bool absent[CHUNK];
        for (int j = 0; j < CHUNK; ++j) {
            const int64_t at = start + j;
            absent[j] = at < 0 || at >= shape.length || (in.hidden && in.hidden[at]);
            if (!absent[j]) continue;
            // whatever stands in padding, NaN even, must not get past this line
            std::memset(rows + j * x_row, 0, x_row * sizeof(float));
            std::memset(values + j * row, 0, row * sizeof(float));
        }
        transpose(rows, x_row, d, kt);
        map.map(kt, fk, k_scale);
        for (int j = 0; j < CHUNK; ++j)
            if (absent[j]) k_scale[j] = -INF;
    }

    // to = left * from + sums over CHUNK positions of phi [x, weight]; from and to may be one.
    void absorb(float left, const float* phi, const float* x, const float* weight, State from, State to) {
        for (int64_t i = 0; i < static_cast<int64_t>(m) * row; i += VL) store(to.s + i, load(from.s + i) * left);
        product(m, row, CHUNK, {phi, CHUNK, 1}, x, row, to.s, row, true);
        for (int r = 0; r < m; ++r) {
            Vec total{};
            for (int j = 0; j < CHUNK; j += VL) total += load(phi + r * CHUNK + j) * load(weight + j);
            to.z[r] = from.z[r] * left + sum(total);
        }
    }

    // to (CHUNK, row) = phi^T s, and den (CHUNK,) = phi^T z where it is wanted.
    void read(const float* phi, State state, float* to, float* den) {
        product(CHUNK, row, m, {phi, 1, CHUNK}, state.s, row, to, row, false);
        if (!den) return;
        for (int i = 0; i < CHUNK; i += VL) {
            Vec total{};
            for (int r = 0; r < m; ++r) total += load(phi + r * CHUNK + i) * state.z[r];
            store(den + i, total);
        }
    }

    // to (m, CHUNK) = s x^T + z weight^T, with xt (e, CHUNK): what reading or absorbing [x, weight] does to phi.
    void spread(State state, const float* xt, const float* weight, float* to) {
        for (int r = 0; r < m; ++r)
            for (int j = 0; j < CHUNK; j += VL) store(to + r * CHUNK + j, load(weight + j) * state.z[r]);
        product(m, CHUNK, e, {state.s, row, 1}, xt, CHUNK, to, CHUNK, true);
    }

    // The sum of s * later over the whole state, z included.
    double flow(State state, State later) const {
        double total = 0;
        for (int r = 0; r < m; ++r) {
            Vec part{};
            for (int c = 0; c < row; c += VL) part += load(state.s + r * row + c) * load(later.s + r * row + c);
            total += static_cast<double>(sum(part)) + static_cast<double>(state.z[r]) * later.z[r];
        }
        return total;
    }

    // 1 / den, 0 where a query sees no key at all.
    static float inverse(float den) {
        static const float least = std::pow(std::numeric_limits<float>::min(), 0.75f);
        return den < least ? 0.0f : 1.0f / den;
    }

    // g (CHUNK, row) = dout / den and g_den (CHUNK,) = (dlse - dout . out) / den, of queries from position `start` on.
    void gradient(int64_t start, const float* dout, const float* dlse, const float* out, const float* inverse_den,
                  float* g, float* g_den) {
        cut(dout, shape.queries, start, e, g);
        cut(out, shape.queries, start, e, rows);
        for (int i = 0; i < CHUNK; ++i) {
            const int64_t at = start + i;
            const bool inside = at < shape.queries;
            const float inverse = inside ? inverse_den[at] : 0.0f;
            Vec dot{};
            for (int c = 0; c < row; c += VL) {
                const Vec grad = load(g + i * row + c);
                dot += grad * load(rows + i * row + c);
                store(g + i * row + c, grad * inverse);
            }
            g_den[i] = ((dlse && inside ? dlse[at] : 0.0f) - sum(dot)) * inverse;
        }
    }
};
