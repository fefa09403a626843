/* Parts of a row in the small operations between the matrices. */
#pragma once

#include "maths.h"
#include "variant.h"

/* What RMSNorm multiplies a row with, beside its weight. */
static ALWAYS_INLINE float norm_scale(const float *x, int64_t width, float eps) {
    float sum = 0;
    for (int64_t i = 0; i < width; i++) sum += x[i] * x[i];
    return 1 / __builtin_sqrtf(sum / (float)width + eps);
}

static ALWAYS_INLINE void normed(const float *x, const float *weight, float scale, float *y, int64_t count) {
    for (int64_t i = 0; i < count; i++) y[i] = x[i] * scale * weight[i];
}

static ALWAYS_INLINE void gated(const float *gate, const float *up, float *y, int64_t count) {
    for (int64_t i = 0; i < count; i++) y[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

typedef struct {
    float *x;             /* [rows][heads][dim], rows `stride` values apart; turned in place */
    const float *cos_sin; /* [rows][pairs][2] */
    int64_t rows, heads, dim, pairs, stride;
} Rotary;

static ALWAYS_INLINE void turn(const Rotary *a, int64_t row) {
    const float *angles = a->cos_sin + row * a->pairs * 2;
    for (int64_t head = 0; head < a->heads; head++) {
        float *x = a->x + row * a->stride + head * a->dim;
        for (int64_t t = 0; t < a->pairs; t++) {
            float even = x[2 * t], odd = x[2 * t + 1], cosine = angles[2 * t], sine = angles[2 * t + 1];
            x[2 * t] = even * cosine - odd * sine;
            x[2 * t + 1] = odd * cosine + even * sine;
        }
    }
}
