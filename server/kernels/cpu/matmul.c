/* Quantized matrices times activations: y = x W^T + b, the activations quantized to int8 on the way in.

   tiles.h says how a matrix lies in memory. One register holds a weight for each of 16 rows and meets four values of x that
   all of them share, so that the sums of the rows never have to be added across lanes. */
#include "simd.h"
#include "threads.h"
#include "tiles.h"
#include "variant.h"

enum { QUADS = GROUP / 4, TILES_AT_ONCE = 4, ROWS_AT_ONCE = 8, BLOCK_ROWS = 64 };

typedef int32_t __attribute__((may_alias)) Quad; /* four values of x */

typedef struct {
    const uint8_t *codes;
    const void *scales;
    const float *row_scales;
    const int8_t *table; /* of 4-bit codes; NULL: 8 bits */
    const float *bias;   /* or NULL */
    const float *x;      /* [M][K] */
    float *y;            /* [M][N] */
    int64_t M, K, N;
    int8_t *quantized;   /* [M][groups][64]; space for the three */
    float *x_scales;     /* [M][groups] */
    int32_t *x_offsets;  /* [M][groups]: what the weights' offset adds to each sum, negated */
} Linear;

static inline int64_t groups_of(const Linear *m) { return (m->K + GROUP - 1) / GROUP; }

/* -------------------------------------------------------------------------------------------------------- activations */

static void quantize_activations(const float *x, int64_t count, int8_t *q, float *scale, int32_t *offset) {
    float largest = 0;
    for (int64_t i = 0; i < count; i++) {
        float size = x[i] < 0 ? -x[i] : x[i];
        largest = size > largest ? size : largest;
    }
    float inverse = largest > 0 ? 127 / largest : 0;
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) {
        float scaled = x[i] * inverse;
        int8_t value = (int8_t)(int32_t)(scaled + (scaled < 0 ? -0.5f : 0.5f));
        q[i] = value;
        sum += value;
    }
    if (count < GROUP) memset(q + count, 0, (size_t)(GROUP - count));
    *scale = largest / 127;
    *offset = -OFFSET * sum;
}

static void quantize_x(const void *arguments, int64_t begin, int64_t end) {
    const Linear *m = arguments;
    int64_t groups = groups_of(m);
    for (int64_t row = begin; row < end; row++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t at = row * groups + g, left = m->K - g * GROUP;
            quantize_activations(m->x + row * m->K + g * GROUP, left < GROUP ? left : GROUP, m->quantized + at * GROUP,
                                 m->x_scales + at, m->x_offsets + at);
        }
}

/* ------------------------------------------------------------------------------------------------------------- sums */

/* A group's weights of one tile; w[q] are columns 4q .. 4q + 3. */
static ALWAYS_INLINE void unpack(const uint8_t *codes, bytes table, int bits, bytes w[QUADS]) {
    for (int q = 0; q < 8; q++) {
        bytes packed = load_bytes(codes + 64 * q);
        if (bits == 4) {
            prefetch(codes + 64 * q + 4096);
            w[q] = low_nibbles(packed, table);
            w[q + 8] = high_nibbles(packed, table);
        } else {
            prefetch(codes + 128 * q + 8192);
            prefetch(codes + 128 * q + 8192 + 64);
            w[q] = shifted(packed);
            w[q + 8] = shifted(load_bytes(codes + 64 * (q + 8)));
        }
    }
}

/* `rows` rows of x, from `row` on, times one tile; rows and bits are constants of the caller's. */
static ALWAYS_INLINE void multiply(const Linear *m, int64_t tile, int64_t row, int rows, int bits) {
    int64_t groups = groups_of(m), size = GROUP * LANES * bits / 8;
    const uint8_t *codes = m->codes + tile * groups * size;
    bytes table = bits == 4 ? table_of(m->table) : load_bytes(codes);
    floats sums[ROWS_AT_ONCE];
    for (int r = 0; r < rows; r++) sums[r] = floats_of(0);
    for (int64_t g = 0; g < groups; g++, codes += size) {
        bytes w[QUADS];
        unpack(codes, table, bits, w);
        int64_t at = (tile * groups + g) * LANES;
        floats scale = bits == 4 ? load_int8((const int8_t *)m->scales + at) : load_half((const uint16_t *)m->scales + at);
        for (int r = 0; r < rows; r++) {
            int64_t of_x = (row + r) * groups + g;
            const Quad *x = (const Quad *)(m->quantized + of_x * GROUP);
            ints even = ints_of(m->x_offsets[of_x]), odd = ints_of(0); /* two chains: a dot takes a few cycles */
            for (int q = 0; q < QUADS; q += 2) {
                even = dot(even, w[q], x[q]);
                odd = dot(odd, w[q + 1], x[q + 1]);
            }
            sums[r] = mul_add(to_floats(ints_add(even, odd)), mul(scale, floats_of(m->x_scales[of_x])), sums[r]);
        }
    }
    int64_t column = tile * LANES, count = m->N - column < LANES ? m->N - column : LANES;
    for (int r = 0; r < rows; r++) {
        float y[LANES];
        floats sum = bits == 4 ? mul(sums[r], load_floats(m->row_scales + column)) : sums[r];
        store_floats(y, sum);
        for (int64_t i = 0; i < count; i++) m->y[(row + r) * m->N + column + i] = y[i] + (m->bias ? m->bias[column + i] : 0);
    }
}

static ALWAYS_INLINE void multiply_rows(const Linear *m, int64_t tile, int bits) {
    int64_t row = 0;
    for (; row + 8 <= m->M; row += 8) multiply(m, tile, row, 8, bits);
    for (; row + 4 <= m->M; row += 4) multiply(m, tile, row, 4, bits);
    for (; row + 2 <= m->M; row += 2) multiply(m, tile, row, 2, bits);
    if (row < m->M) multiply(m, tile, row, 1, bits);
}

static void multiply_tiles(const void *arguments, int64_t begin, int64_t end) {
    const Linear *m = arguments;
    for (int64_t tile = begin; tile < end; tile++)
        if (m->table) multiply_rows(m, tile, 4);
        else multiply_rows(m, tile, 8);
}

/* y = x W^T + b. */
EXPORT void NAMED(linear)(const Linear *m) {
    run_parallel(quantize_x, m, m->M, 4);
    int64_t tiles = (m->N + LANES - 1) / LANES, groups = groups_of(m);
    /* a block of rows of x stays in the cache while all tiles pass by */
    for (int64_t row = 0; row < m->M; row += BLOCK_ROWS) {
        Linear block = *m;
        block.M = m->M - row < BLOCK_ROWS ? m->M - row : BLOCK_ROWS;
        block.y += row * m->N;
        block.quantized += row * groups * GROUP;
        block.x_scales += row * groups;
        block.x_offsets += row * groups;
        run_parallel(multiply_tiles, &block, tiles, TILES_AT_ONCE);
    }
}
