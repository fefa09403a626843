/* Quantized matrices times activations: y = x W^T + b, the activations quantized to int8 on the way in.

   tiles.h says how a matrix lies in memory. One register holds a weight for each of 16 rows and meets four values of x
   that all of them share, so that the sums of the rows never have to be added across lanes. */
#include "matmul.h"

#include "layers.h"
#include "simd.h"
#include "threads.h"
#include "tiles.h"
#include "variant.h"

enum { HALF = GROUP / 2, QUADS = GROUP / 4, TILES_AT_ONCE = 4, ROWS_AT_ONCE = 8, BLOCK_ROWS = 64, AHEAD = 8192 };

typedef int32_t __attribute__((may_alias)) Quad; /* four values of x */

static inline int64_t groups_of(const Linear *m) { return (m->matrix.K + GROUP - 1) / GROUP; }

/* ------------------------------------------------------------------------------------------------------ activations */

/* Codes and their sum. */
static ALWAYS_INLINE int32_t encode_activations(const float *x, int64_t count, float inverse, int8_t *q) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) {
        float scaled = x[i] * inverse;
        int8_t value = (int8_t)(int32_t)(scaled + (scaled < 0 ? -0.5f : 0.5f));
        q[i] = value;
        sum += value;
    }
    return sum;
}

/* One group of x. A NaN or an infinity in it makes the scale NaN, so that it reaches y; values too small to divide 127
   by count as 0. */
static void quantize_activations(const float *x, int64_t count, int8_t *q, float *scale, int32_t *offsets) {
    int32_t most = 0; /* magnitudes of floats are ordered like their bits, with infinity and NaN at the top */
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float largest;
    memcpy(&largest, &most, sizeof largest);
    if (count < GROUP || most >= 0x7f800000) memset(q, 0, GROUP);
    if (most >= 0x7f800000) {
        *scale = __builtin_nanf("");
        offsets[0] = offsets[1] = 0;
        return;
    }
    float inverse = largest > 1e-36f ? 127 / largest : 0;
    int64_t first = count < HALF ? count : HALF;
    offsets[0] = -OFFSET * encode_activations(x, first, inverse, q);
    offsets[1] = -OFFSET * encode_activations(x + first, count - first, inverse, q + first);
    *scale = largest / 127;
}

/* `count` values of row `row` of what the matrix is multiplied with, from `column` on; in `space` where they are made. */
static const float *activations(const Linear *m, int64_t row, float scale, int64_t column, int64_t count, float *space) {
    int64_t K = m->matrix.K;
    if (m->source == GATED) {
        const float *gate = m->x + row * 2 * K + column;
        gated(gate, gate + K, space, count);
        return space;
    }
    const float *x = m->x + row * K + column;
    if (m->source == PLAIN) return x;
    normed(x, m->norm + column, scale, space, count);
    return space;
}

static void quantize_x(const void *arguments, int64_t begin, int64_t end) {
    const Linear *m = arguments;
    int64_t groups = groups_of(m), K = m->matrix.K;
    float space[GROUP];
    for (int64_t row = begin; row < end; row++) {
        float scale = m->source == NORMED ? norm_scale(m->x + row * K, K, m->eps) : 1;
        for (int64_t g = 0; g < groups; g++) {
            int64_t at = row * groups + g, left = K - g * GROUP, count = left < GROUP ? left : GROUP;
            const float *x = activations(m, row, scale, g * GROUP, count, space);
            quantize_activations(x, count, m->quantized + at * GROUP, m->x_scales + at, m->x_offsets + 2 * at);
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------- sums */

/* A group's weights of one tile; w[q] are columns 4q .. 4q + 3. */
static ALWAYS_INLINE void unpack(const uint8_t *codes, bytes table, int bits, bytes w[QUADS]) {
    for (int q = 0; q < 8; q++) {
        bytes packed = load_bytes(codes + 64 * q);
        if (bits == 4) {
            prefetch(codes + 64 * q + AHEAD);
            w[q] = low_nibbles(packed, table);
            w[q + 8] = high_nibbles(packed, table);
        } else {
            prefetch(codes + 128 * q + AHEAD);
            prefetch(codes + 128 * q + AHEAD + 64);
            w[q] = shifted(packed);
            w[q + 8] = shifted(load_bytes(codes + 64 * (q + 8)));
        }
    }
}

/* One row of y in the columns of one tile. */
static ALWAYS_INLINE void store_sums(const Linear *m, int64_t tile, int64_t row, floats sums, int bits) {
    int64_t N = m->matrix.N, column = tile * LANES, count = N - column < LANES ? N - column : LANES;
    float y[LANES], *out = m->y + row * N + column;
    store_floats(y, bits == 4 ? mul(sums, load_floats(m->matrix.row_scales + column)) : sums);
    for (int64_t i = 0; i < count; i++) out[i] = y[i] + (m->bias ? m->bias[column + i] : 0) + (m->add ? out[i] : 0);
}

/* `rows` rows of x, from `row` on, times one tile; rows and bits are constants of the caller's. */
static ALWAYS_INLINE void multiply(const Linear *m, int64_t tile, int64_t row, int rows, int bits) {
    int64_t groups = groups_of(m), size = GROUP * LANES * bits / 8;
    const uint8_t *codes = m->matrix.codes + tile * groups * size;
    bytes table = bits == 4 ? table_of(m->matrix.table) : load_bytes(codes);
    floats sums[ROWS_AT_ONCE];
    for (int r = 0; r < rows; r++) sums[r] = floats_of(0);
    for (int64_t g = 0; g < groups; g++, codes += size) {
        bytes w[QUADS];
        unpack(codes, table, bits, w);
        int64_t at = (tile * groups + g) * LANES;
        const uint16_t *halves = (const uint16_t *)m->matrix.scales + 2 * at;
        prefetch((const char *)m->matrix.scales + (bits == 4 ? at : 4 * at) + 512);
        floats scale = bits == 4 ? load_int8((const int8_t *)m->matrix.scales + at) : load_half(halves);
        floats second_scale = bits == 4 ? scale : load_half(halves + LANES);
        for (int r = 0; r < rows; r++) {
            int64_t of_x = (row + r) * groups + g;
            const Quad *x = (const Quad *)(m->quantized + of_x * GROUP);
            ints first = ints_of(m->x_offsets[2 * of_x]), second = ints_of(m->x_offsets[2 * of_x + 1]);
            for (int q = 0; q < QUADS / 2; q++) { /* two chains: a dot takes a few cycles */
                first = dot(first, w[q], x[q]);
                second = dot(second, w[q + QUADS / 2], x[q + QUADS / 2]);
            }
            floats x_scale = floats_of(m->x_scales[of_x]);
            if (bits == 4) first = ints_add(first, second);
            else sums[r] = mul_add(to_floats(second), mul(second_scale, x_scale), sums[r]);
            sums[r] = mul_add(to_floats(first), mul(scale, x_scale), sums[r]);
        }
    }
    for (int r = 0; r < rows; r++) store_sums(m, tile, row + r, sums[r], bits);
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
        if (m->matrix.table) multiply_rows(m, tile, 4);
        else multiply_rows(m, tile, 8);
}

static void linear(const Linear *m) {
    run_parallel(quantize_x, m, m->M, 4);
    int64_t tiles = (m->matrix.N + LANES - 1) / LANES, groups = groups_of(m);
    /* a block of rows of x stays in the cache while all tiles pass by */
    for (int64_t row = 0; row < m->M; row += BLOCK_ROWS) {
        Linear block = *m;
        block.M = m->M - row < BLOCK_ROWS ? m->M - row : BLOCK_ROWS;
        block.y += row * m->matrix.N;
        block.quantized += row * groups * GROUP;
        block.x_scales += row * groups;
        block.x_offsets += 2 * row * groups;
        run_parallel(multiply_tiles, &block, tiles, TILES_AT_ONCE);
    }
}

EXPORT void NAMED(linear)(const Linear *m) { linear(m); }
