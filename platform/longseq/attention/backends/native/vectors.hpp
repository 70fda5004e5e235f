// SIMD vectors, their exponential, and the one matrix product that the kernels are made of.
//
// Everything is written with the vector extensions of GCC and Clang, so one source serves AVX-512, AVX2, NEON and
// plain C++; VL, floats a vector, follows the instructions that -march=native found.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float Vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(VL * 4), aligned(4), may_alias));  // wraps around where int may not

constexpr int CHUNK = 64;                 // positions handled at a time; a multiple of every VL
constexpr int CHUNK_VECS = CHUNK / VL;
constexpr int ROWS = 4;                   // rows of a register tile
#if defined(__AVX512F__) || defined(__ARM_NEON)  // 32 registers
constexpr int COLUMNS = 4;  // and vectors of a tile, which takes ROWS * COLUMNS + COLUMNS + 1 of them
#else  // 16
constexpr int COLUMNS = 2;
#endif
constexpr int DEPTH = 64;                 // of a pass: a (DEPTH, CHUNK) block of B stays in the L1 cache

inline int padded(int n) { return (n + VL - 1) / VL * VL; }

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
inline Vec splat(float x) { return x - Vec{}; }
// b where it is not a number.
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec x) {
    float total = 0;
    for (int i = 0; i < VL; ++i) total += x[i];
    return total;
}

// 2^x for x <= 127; exactly 0 below -126 (and at -infinity); NaN of NaN. Relative error below 2e-7.
inline Vec exp2v(Vec x) {
    const Vec least = splat(-126.0f);
    const IntVec tiny = x < least;
    x = maximum(least, x);
    const Vec nan = x - x;  // 0 else: the bits below would turn a NaN into a number
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec shifted = x + magic;
    const Vec fraction = x - (shifted - magic);  // [-0.5, 0.5]
    // ln(2)^n / n!; the first term left out is below 1.2e-7
    Vec p = splat(1.5403530e-4f);
    p = p * fraction + 1.33335581e-3f;
    p = p * fraction + 9.61812911e-3f;
    p = p * fraction + 5.55041087e-2f;
    p = p * fraction + 2.40226507e-1f;
    p = p * fraction + 6.93147181e-1f;
    p = p * fraction + 1.0f;
    const Bits exponent = (reinterpret_cast<const Bits&>(shifted) - reinterpret_cast<const Bits&>(magic)) << 23;
    const Bits bits = reinterpret_cast<const Bits&>(p) + exponent;
    return (tiny ? Vec{} : reinterpret_cast<const Vec&>(bits)) + nan;
}

// A matrix by pointer and strides, in floats: element (i, k) is at p[i * row + k * column].
struct Matrix {
    const float* p;
    ptrdiff_t row, column;
    Matrix from(int i, int k) const { return {p + i * row + k * column, row, column}; }
};

template <int R, int C>
inline void tile(Matrix a, const float* b, ptrdiff_t b_row, float* c, ptrdiff_t c_row, int depth, bool add) {
    Vec total[R][C];
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) total[i][j] = add ? load(c + i * c_row + j * VL) : Vec{};
    for (int k = 0; k < depth; ++k) {
        Vec row[C];
        for (int j = 0; j < C; ++j) row[j] = load(b + k * b_row + j * VL);
        for (int i = 0; i < R; ++i) {
            const Vec x = splat(a.p[i * a.row + k * a.column]);
            for (int j = 0; j < C; ++j) total[i][j] += x * row[j];
        }
    }
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) store(c + i * c_row + j * VL, total[i][j]);
}

template <int C>
void panel(int rows, Matrix a, const float* b, ptrdiff_t b_row, float* c, ptrdiff_t c_row, int depth, bool add) {
    int i = 0;
    for (; i + ROWS <= rows; i += ROWS) tile<ROWS, C>(a.from(i, 0), b, b_row, c + i * c_row, c_row, depth, add);
    for (; i < rows; ++i) tile<1, C>(a.from(i, 0), b, b_row, c + i * c_row, c_row, depth, add);
}

// c (rows, columns) = or += a (rows, depth) @ b (depth, columns). Rows of b and c are contiguous, columns a multiple of
// VL; a has any strides.
inline void product(int rows, int columns, int depth, Matrix a, const float* b, ptrdiff_t b_row, float* c,
                    ptrdiff_t c_row, bool add) {
    for (int k = 0; k < depth; k += DEPTH) {
        const int some = depth - k < DEPTH ? depth - k : DEPTH;
        for (int j = 0; j < columns; j += COLUMNS * VL) {
            const Matrix left = a.from(0, k);
            const float* right = b + k * b_row + j;
            switch ((columns - j) / VL) {
                case 1: panel<1>(rows, left, right, b_row, c + j, c_row, some, add || k); break;
                case 2: panel<2>(rows, left, right, b_row, c + j, c_row, some, add || k); break;
                case 3:
                    if constexpr (COLUMNS > 3) {
                        panel<3>(rows, left, right, b_row, c + j, c_row, some, add || k);
                        break;
                    }
                    [[fallthrough]];
                default: panel<COLUMNS>(rows, left, right, b_row, c + j, c_row, some, add || k);
            }
        }
    }
}

// to (columns, CHUNK) = from (CHUNK rows, columns) transposed.
inline void transpose(const float* from, ptrdiff_t from_row, int columns, float* to) {
    constexpr int B = 8;
    for (int j0 = 0; j0 < columns; j0 += B)
        for (int i0 = 0; i0 < CHUNK; i0 += B)
            for (int j = j0; j < (j0 + B < columns ? j0 + B : columns); ++j)
                for (int i = i0; i < i0 + B; ++i) to[j * CHUNK + i] = from[i * from_row + j];
}
