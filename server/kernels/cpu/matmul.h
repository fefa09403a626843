/* y = x W^T + b, see matmul.c. */
#pragma once

#include <stdint.h>

typedef struct {
    const uint8_t *codes;
    const void *scales;
    const float *row_scales;
    const int8_t *table; /* of 4-bit codes; NULL: 8 bits */
    int64_t K, N;        /* columns and rows of W */
} Matrix;

typedef struct {
    Matrix matrix;
    const float *bias; /* or NULL */
    const float *x;    /* [M][K]; GATED: [M][2 K] */
    float *y;          /* [M][N] */
    int64_t M;
    int8_t *quantized;  /* [M][groups][64]; space for the three */
    float *x_scales;    /* [M][groups] */
    int32_t *x_offsets; /* [M][groups][2 halves]: what the weights' offset adds to each sum, negated */
    int32_t source;     /* what is multiplied: x, or the RMSNorm or the SwiGLU of it */
    int32_t add;        /* whether the product is added to what y holds */
    const float *norm;  /* [K], for NORMED */
    float eps;
} Linear;

enum { PLAIN, NORMED, GATED };

static void linear(const Linear *m);
