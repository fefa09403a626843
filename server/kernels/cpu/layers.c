/* The small operations between the matrices; see kernels/ops.py for what each one means. All values are float32. */
#include "maths.h"
#include "threads.h"
#include "variant.h"

typedef struct {
    const float *x, *weight; /* [rows][width], [width] */
    float *y;                /* [rows][width] */
    int64_t rows, width;
    float eps;
} RmsNorm;

static void rms_norm_rows(const void *arguments, int64_t begin, int64_t end) {
    const RmsNorm *a = arguments;
    for (int64_t row = begin; row < end; row++) {
        const float *x = a->x + row * a->width;
        float *y = a->y + row * a->width, sum = 0;
        for (int64_t i = 0; i < a->width; i++) sum += x[i] * x[i];
        float scale = 1 / __builtin_sqrtf(sum / (float)a->width + a->eps);
        for (int64_t i = 0; i < a->width; i++) y[i] = x[i] * scale * a->weight[i];
    }
}

EXPORT void NAMED(rms_norm)(const RmsNorm *a) { run_parallel(rms_norm_rows, a, a->rows, 8); }

typedef struct {
    const float *x; /* [rows][2 * width]: gate, up */
    float *y;       /* [rows][width] */
    int64_t rows, width;
} Swiglu;

static void swiglu_rows(const void *arguments, int64_t begin, int64_t end) {
    const Swiglu *a = arguments;
    for (int64_t row = begin; row < end; row++) {
        const float *gate = a->x + row * 2 * a->width, *up = gate + a->width;
        float *y = a->y + row * a->width;
        for (int64_t i = 0; i < a->width; i++) y[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
    }
}

EXPORT void NAMED(swiglu)(const Swiglu *a) { run_parallel(swiglu_rows, a, a->rows, 4); }

typedef struct {
    float *x;             /* [rows][heads][dim], rows `stride` values apart; turned in place */
    const float *cos_sin; /* [rows][pairs][2] */
    int64_t rows, heads, dim, pairs, stride;
} Rotary;

static void rotary_rows(const void *arguments, int64_t begin, int64_t end) {
    const Rotary *a = arguments;
    for (int64_t row = begin; row < end; row++) {
        const float *turn = a->cos_sin + row * a->pairs * 2;
        for (int64_t head = 0; head < a->heads; head++) {
            float *x = a->x + row * a->stride + head * a->dim;
            for (int64_t t = 0; t < a->pairs; t++) {
                float even = x[2 * t], odd = x[2 * t + 1], cosine = turn[2 * t], sine = turn[2 * t + 1];
                x[2 * t] = even * cosine - odd * sine;
                x[2 * t + 1] = odd * cosine + even * sine;
            }
        }
    }
}

EXPORT void NAMED(rotary)(const Rotary *a) { run_parallel(rotary_rows, a, a->rows, 8); }
