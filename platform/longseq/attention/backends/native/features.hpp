// Feature maps of one chunk, transposed: (features, CHUNK), a position a lane.
#pragma once

#include "vectors.hpp"

constexpr float NOTHING = -1e30f;  // the log-scale of a state that has seen nothing
const float INF = INFINITY;

// phi(x) = features * 2^log_scale; see feature_maps.py. Log-scales are in units of log 2 throughout.
// Mirrored by backend.py.
struct FeatureMap {
    int32_t relu;         // 0: C * exp(u + shift - |x|^2 / 2); 1: C * (relu(u) + epsilon)
    int32_t features;     // m
    int32_t head_dim;     // d
    const float* weight;  // (m, d): u = weight @ q
    const float* shift;   // (m,) of the exponential kernels, or null
    float log_constant;   // log2 C
    float least;          // exponential: the smallest power of a row; relu: epsilon

    // x (d, CHUNK) transposed inputs -> features (m, CHUNK) and scale (CHUNK,).
    void map(const float* x, float* phi, float* scale) const {
        product(features, CHUNK, head_dim, {weight, head_dim, 1}, x, CHUNK, phi, CHUNK, false);
        for (int c = 0; c < CHUNK; c += VL) relu ? rectify(phi + c, scale + c) : exponentiate(x + c, phi + c, scale + c);
    }

    // d_phi (m, CHUNK) is overwritten; dx (CHUNK, row) is the gradient through phi and its scale. of_scale, if not null,
    // receives sum(d_phi * phi) of each position: the gradient of its log-scale, in natural units.
    void vjp(const float* x, const float* phi, float* d_phi, const float* padded_weight, float* dx, int row,
             float* of_scale) const {
        float norm[CHUNK];
        for (int c = 0; c < CHUNK; c += VL) {
            Vec total{};
            for (int r = 0; r < features; ++r) {
                const Vec f = load(phi + r * CHUNK + c), d = load(d_phi + r * CHUNK + c);
                const Vec both = d * f;
                total += both;
                store(d_phi + r * CHUNK + c, relu ? (f > splat(least) ? d : Vec{}) : both);
            }
            store(norm + c, total);
        }
        if (of_scale) std::memcpy(of_scale, norm, sizeof norm);
        product(CHUNK, row, features, {d_phi, 1, CHUNK}, padded_weight, row, dx, row, false);
        if (relu) return;
        const float quarter = -1.0f / std::sqrt(static_cast<float>(head_dim));
        for (int i = 0; i < CHUNK; ++i)
            for (int j = 0; j < head_dim; ++j) dx[i * row + j] += quarter * norm[i] * x[j * CHUNK + i];
    }

  private:
    void rectify(float* phi, float* scale) const {
        for (int r = 0; r < features; ++r)
            store(phi + r * CHUNK, maximum(Vec{}, load(phi + r * CHUNK)) + least);
        store(scale, splat(log_constant));
    }

    void exponentiate(const float* x, float* phi, float* scale) const {
        const float log2e = 1.44269504f;
        Vec norm{};
        for (int r = 0; r < head_dim; ++r) norm += load(x + r * CHUNK) * load(x + r * CHUNK);
        Vec top = splat(-INF);
        for (int r = 0; r < features; ++r) {
            Vec u = load(phi + r * CHUNK) * log2e;
            if (shift) u += shift[r] * log2e;
            store(phi + r * CHUNK, u);
            top = maximum(top, u);
        }
        top += norm * 0.0f;  // a maximum may lose a NaN or an infinity; nobody else must
        for (int r = 0; r < features; ++r)
            store(phi + r * CHUNK, exp2v(maximum(splat(least), load(phi + r * CHUNK) - top)));
        store(scale, top - norm * (0.5f * log2e / std::sqrt(static_cast<float>(head_dim))) + log_constant);
    }
};
