/* The small operations between the matrices; see kernels/ops.py for what each one means. All values are float32. */
#include "layers.h"

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
        normed(x, a->weight, norm_scale(x, a->width, a->eps), a->y + row * a->width, a->width);
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
        const float *gate = a->x + row * 2 * a->width;
        gated(gate, gate + a->width, a->y + row * a->width, a->width);
    }
}

EXPORT void NAMED(swiglu)(const Swiglu *a) { run_parallel(swiglu_rows, a, a->rows, 4); }

static void rotary_rows(const void *arguments, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) turn(arguments, row);
}

EXPORT void NAMED(rotary)(const Rotary *a) { run_parallel(rotary_rows, a, a->rows, 8); }
