/* Weights to codes, and codes to the tiles of tiles.h. */
#include "simd.h"
#include "threads.h"
#include "tiles.h"
#include "variant.h"

enum { CANDIDATES = 8 };

typedef struct {
    const float *weights;  /* [rows][columns] */
    const int8_t *table;   /* 16 values, ascending */
    uint8_t *codes;        /* [rows][groups * 32], column 2k in the high and 2k + 1 in the low nibble of byte k */
    float *scales;         /* [rows][groups]; whole multiples, -127 .. 127, of the row's largest / 127 */
    int64_t rows, columns;
} Quantize;

/* The nearest values of the table to x * inverse. */
static ALWAYS_INLINE void nearest(const float *x, float inverse, const int8_t *table, float *values) {
    for (int i = 0; i < GROUP; i++) values[i] = table[0];
    for (int k = 0; k < 15; k++) {
        float border = 0.5f * (float)(table[k] + table[k + 1]), step = (float)(table[k + 1] - table[k]);
        for (int i = 0; i < GROUP; i++) values[i] += x[i] * inverse > border ? step : 0;
    }
}

/* The scale whose codes leave the least squared error, among some near the one that maps the largest value to the
   table's end. For given codes v the best scale is <x, v> / <v, v>, and it lessens the error by <x, v>^2 / <v, v>. */
static float best_scale(const float *weights, const int8_t *table) {
    float least = 0, most = 0, finite = 0, best = 0, best_gain = 0;
    for (int i = 0; i < GROUP; i++) {
        least = weights[i] < least ? weights[i] : least;
        most = weights[i] > most ? weights[i] : most;
        finite += weights[i] * 0;
    }
    if (finite != 0) return __builtin_nanf(""); /* a NaN or an infinity among them stays visible */
    float unit = (-least > most ? least : most) / (float)table[0], x[GROUP];
    if (most - least < 1e-30f) return 0;
    for (int i = 0; i < GROUP; i++) x[i] = weights[i] / unit; /* so that no square is too large or too small */
    for (int c = 0; c < CANDIDATES; c++) {
        float values[GROUP], xv = 0, vv = 0;
        nearest(x, 1 / (0.7f + 0.065f * (float)c), table, values);
        for (int i = 0; i < GROUP; i++) xv += x[i] * values[i];
        for (int i = 0; i < GROUP; i++) vv += values[i] * values[i];
        if (xv * xv > best_gain * vv) best = xv / vv, best_gain = xv * xv / vv;
    }
    return best * unit;
}

static void load_group(const Quantize *a, int64_t row, int64_t group, float x[GROUP]) {
    int64_t left = a->columns - group * GROUP, count = left < GROUP ? left : GROUP;
    memcpy(x, a->weights + row * a->columns + group * GROUP, (size_t)count * sizeof *x);
    for (int64_t i = count; i < GROUP; i++) x[i] = 0;
}

static void encode(const float *x, float scale, const int8_t *table, uint8_t *codes) {
    int32_t index[GROUP] = {0};
    float inverse = scale == 0 ? 0 : 1 / scale;
    for (int k = 0; k < 15; k++) {
        float border = 0.5f * (float)(table[k] + table[k + 1]);
        for (int i = 0; i < GROUP; i++) index[i] += x[i] * inverse > border;
    }
    for (int i = 0; i < GROUP / 2; i++) codes[i] = (uint8_t)(index[2 * i] << 4 | index[2 * i + 1]);
}

static void quantize_weights(const void *arguments, int64_t begin, int64_t end) {
    const Quantize *a = arguments;
    int64_t groups = (a->columns + GROUP - 1) / GROUP;
    for (int64_t row = begin; row < end; row++) {
        float x[GROUP], largest = 0, *scales = a->scales + row * groups; /* largest: NaN if one of them is */
        for (int64_t g = 0; g < groups; g++) {
            load_group(a, row, g, x);
            scales[g] = best_scale(x, a->table);
            float size = scales[g] < 0 ? -scales[g] : scales[g];
            if (!(size <= largest) && largest == largest) largest = size;
        }
        float unit = largest / 127;
        for (int64_t g = 0; g < groups; g++) {
            float times = unit > 0 ? scales[g] / unit : 0;
            scales[g] = (float)(int32_t)(times + (times < 0 ? -0.5f : 0.5f)) * unit;
            load_group(a, row, g, x);
            encode(x, scales[g], a->table, a->codes + (row * groups + g) * (GROUP / 2));
        }
    }
}

EXPORT void NAMED(quantize_int4)(const Quantize *a) { run_parallel(quantize_weights, a, a->rows, 4); }

typedef struct {
    const uint8_t *codes; /* int4 as above, or int8 [rows][groups * 64] */
    uint8_t *tiles;       /* see tiles.h */
    int64_t rows, groups, bits;
} Pack;

static int code_at(const Pack *a, int64_t row, int64_t group, int column) {
    if (row >= a->rows) return 0;
    const uint8_t *codes = a->codes + (row * a->groups + group) * (GROUP * a->bits / 8);
    if (a->bits == 8) return codes[column];
    return column % 2 ? codes[column / 2] & 15 : codes[column / 2] >> 4;
}

static void pack_tiles(const void *arguments, int64_t begin, int64_t end) {
    const Pack *a = arguments;
    for (int64_t tile = begin; tile < end; tile++)
        for (int64_t g = 0; g < a->groups; g++) {
            uint8_t *out = a->tiles + (tile * a->groups + g) * (GROUP * LANES * a->bits / 8);
            for (int lane = 0; lane < LANES; lane++)
                for (int column = 0; column < GROUP; column++) {
                    int code = code_at(a, tile * LANES + lane, g, column);
                    int quad = column / 4, within = 4 * lane + column % 4;
                    if (a->bits == 8) out[64 * quad + within] = (uint8_t)code;
                    else if (quad < 8) out[64 * quad + within] = (uint8_t)code;
                    else out[64 * (quad - 8) + within] |= (uint8_t)(code << 4);
                }
        }
}

/* Row by row to tile by tile. */
EXPORT void NAMED(pack)(const Pack *a) { run_parallel(pack_tiles, a, (a->rows + LANES - 1) / LANES, 4); }
