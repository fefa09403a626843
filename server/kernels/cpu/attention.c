/* Attention of the newest tokens of one sequence to all of it, with softmax in one pass (Milakov and Gimelshein,
   https://arxiv.org/abs/1805.02867). Keys and values are float16, everything else float32. */
#include "attention.h"

#include "maths.h"
#include "simd.h"
#include "threads.h"
#include "variant.h"

enum { ROWS = 8, KEYS = 32, MOST_DIM = 256 };

/* Query rows of one group: the heads that share it, token by token. */
typedef struct {
    const float *query[ROWS];
    float *y[ROWS];
    int64_t visible[ROWS]; /* keys that a row sees */
    float largest[ROWS], total[ROWS], sums[ROWS][MOST_DIM];
    int64_t count;
} Block;

static ALWAYS_INLINE float product(const float *a, const float *b, int64_t dim) {
    float sum = 0;
    for (int64_t i = 0; i < dim; i++) sum += a[i] * b[i];
    return sum;
}

/* One row and the keys and values of one stretch of the sequence. */
static ALWAYS_INLINE void attend(Block *b, int64_t r, const float *keys, const float *values, int64_t count,
                                 int64_t dim, float scale) {
    float scores[KEYS], largest = b->largest[r], total = 0;
    for (int64_t k = 0; k < count; k++) {
        scores[k] = product(b->query[r], keys + k * dim, dim) * scale;
        largest = scores[k] > largest ? scores[k] : largest;
    }
    float earlier = exponential(b->largest[r] - largest), *sums = b->sums[r];
    for (int64_t k = 0; k < count; k++) scores[k] = exponential(scores[k] - largest);
    for (int64_t k = 0; k < count; k++) total += scores[k];
    for (int64_t i = 0; i < dim; i++) sums[i] *= earlier;
    for (int64_t k = 0; k < count; k++)
        for (int64_t i = 0; i < dim; i++) sums[i] += scores[k] * values[k * dim + i];
    b->largest[r] = largest;
    b->total[r] = b->total[r] * earlier + total;
}

static ALWAYS_INLINE void attend_all(Block *b, const uint16_t *key, const uint16_t *value, int64_t length, int64_t dim,
                                     float scale) {
    float keys[KEYS * MOST_DIM], values[KEYS * MOST_DIM];
    for (int64_t start = 0; start < length; start += KEYS) {
        int64_t count = length - start < KEYS ? length - start : KEYS;
        widen(key + start * dim, keys, count * dim);
        widen(value + start * dim, values, count * dim);
        for (int64_t r = 0; r < b->count; r++) {
            int64_t seen = b->visible[r] - start < count ? b->visible[r] - start : count;
            if (seen > 0) attend(b, r, keys, values, seen, dim, scale);
        }
    }
    for (int64_t r = 0; r < b->count; r++)
        for (int64_t i = 0; i < dim; i++) b->y[r][i] = b->sums[r][i] / b->total[r];
}

static int64_t attention_blocks(const Attention *a) {
    return a->groups * ((a->n * (a->heads / a->groups) + ROWS - 1) / ROWS);
}

static void attend_block(const Attention *a, int64_t block) {
    int64_t shared = a->heads / a->groups, rows = a->n * shared, blocks = (rows + ROWS - 1) / ROWS;
    int64_t group = block / blocks, first = block % blocks * ROWS, length = 0;
    float scale = 1 / __builtin_sqrtf((float)a->dim);
    Block b = {.count = rows - first < ROWS ? rows - first : ROWS};
    for (int64_t r = 0; r < b.count; r++) {
        int64_t token = (first + r) / shared, head = group * shared + (first + r) % shared;
        int64_t causal = a->length - a->n + token + 1;
        b.query[r] = a->query + token * a->query_stride + head * a->dim;
        b.y[r] = a->y + (token * a->heads + head) * a->dim;
        b.visible[r] = a->context > causal ? a->context : causal;
        b.largest[r] = -__builtin_inff();
        length = b.visible[r] > length ? b.visible[r] : length;
    }
    const uint16_t *key = a->key + group * a->stride, *value = a->value + group * a->stride;
    if (a->dim == 128) attend_all(&b, key, value, length, 128, scale);
    else attend_all(&b, key, value, length, a->dim, scale);
}

static void attend_blocks(const void *arguments, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) attend_block(arguments, block);
}

EXPORT void NAMED(attention)(const Attention *a) { run_parallel(attend_blocks, a, attention_blocks(a), 1); }
