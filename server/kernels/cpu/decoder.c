/* All layers of ChatGLM2 in one call. A token's work between two matrices takes microseconds, and so does every call from
   Python, which holds up all of its threads besides. */
#include "attention.h"
#include "layers.h"
#include "matmul.h"
#include "simd.h"
#include "threads.h"
#include "variant.h"

typedef struct {
    const float *input_norm, *post_attention_norm; /* [hidden] */
    const float *bias;                             /* of query_key_value, or NULL */
    Matrix query_key_value, dense, h_to_4h, to_h;
} Layer;

/* Consecutive tokens of one sequence, rows first_row .. first_row + length - 1. */
typedef struct {
    int64_t first_row, length;
    int64_t start; /* tokens in front of them, a P-tuning prefix counted */
    int64_t slot;
} Segment;

typedef struct {
    const Layer *layers;
    const Segment *segments;
    int64_t layer_count, segment_count, rows;
    int64_t heads, groups, dim, pairs; /* pairs: of values of a head that are turned */
    float *x;             /* [rows][hidden], in and out */
    const float *cos_sin; /* [rows][pairs][2] */
    uint16_t *keys, *values;                        /* [layers][slots][groups][positions][dim] */
    int64_t layer_stride, slot_stride, group_stride; /* of these, in values */
    float *fused;    /* [rows][heads + 2 groups][dim]; space for what follows too */
    float *attended; /* [rows][heads][dim] */
    float *inner;    /* [rows][2 * ffn] */
    int8_t *quantized;  /* as in matmul.h, for the widest matrix */
    float *x_scales;
    int32_t *x_offsets;
    float eps;
} Decoder;

/* A layer at work. */
typedef struct {
    const Decoder *d;
    uint16_t *keys, *values; /* of this layer */
} Step;

static void multiply_by(const Decoder *d, const Matrix *matrix, Linear m) {
    m.matrix = *matrix;
    m.M = d->rows;
    m.quantized = d->quantized, m.x_scales = d->x_scales, m.x_offsets = d->x_offsets;
    m.eps = d->eps;
    linear(&m);
}

/* Turn queries and keys, and put keys and values into the cache. */
static void place_rows(const void *arguments, int64_t begin, int64_t end) {
    const Step *s = arguments;
    const Decoder *d = s->d;
    int64_t width = (d->heads + 2 * d->groups) * d->dim;
    Rotary rotary = {d->fused, d->cos_sin, d->rows, d->heads + d->groups, d->dim, d->pairs, width};
    const Segment *segment = d->segments;
    for (int64_t row = begin; row < end; row++) {
        turn(&rotary, row);
        while (row >= segment->first_row + segment->length) segment++;
        int64_t position = segment->start + row - segment->first_row;
        const float *key = d->fused + row * width + d->heads * d->dim, *value = key + d->groups * d->dim;
        for (int64_t g = 0; g < d->groups; g++) {
            int64_t at = segment->slot * d->slot_stride + g * d->group_stride + position * d->dim;
            narrow(key + g * d->dim, s->keys + at, d->dim);
            narrow(value + g * d->dim, s->values + at, d->dim);
        }
    }
}

static Attention attention_of(const Step *s, const Segment *segment) {
    const Decoder *d = s->d;
    int64_t width = (d->heads + 2 * d->groups) * d->dim, at = segment->slot * d->slot_stride;
    return (Attention){
        .query = d->fused + segment->first_row * width,
        .key = s->keys + at,
        .value = s->values + at,
        .y = d->attended + segment->first_row * d->heads * d->dim,
        .n = segment->length,
        .heads = d->heads,
        .groups = d->groups,
        .length = segment->start + segment->length,
        .dim = d->dim,
        .stride = d->group_stride,
        .query_stride = width,
    };
}

/* The blocks of all segments, one after the other. */
static void attend_segments(const void *arguments, int64_t begin, int64_t end) {
    const Step *s = arguments;
    const Segment *segment = s->d->segments;
    Attention a = attention_of(s, segment);
    int64_t first = 0;
    for (int64_t block = begin; block < end; block++) {
        while (block - first >= attention_blocks(&a)) {
            first += attention_blocks(&a);
            a = attention_of(s, ++segment);
        }
        attend_block(&a, block - first);
    }
}

static void attend_layer(const Step *s) {
    const Decoder *d = s->d;
    run_parallel(place_rows, s, d->rows, 8);
    int64_t blocks = 0;
    for (int64_t i = 0; i < d->segment_count; i++) {
        Attention a = attention_of(s, d->segments + i);
        blocks += attention_blocks(&a);
    }
    run_parallel(attend_segments, s, blocks, 1);
}

EXPORT void NAMED(decoder)(const Decoder *d) {
    for (int64_t i = 0; i < d->layer_count; i++) {
        const Layer *layer = d->layers + i;
        Step step = {d, d->keys + i * d->layer_stride, d->values + i * d->layer_stride};
        multiply_by(d, &layer->query_key_value, (Linear){
            .x = d->x, .y = d->fused, .source = NORMED, .norm = layer->input_norm, .bias = layer->bias});
        attend_layer(&step);
        multiply_by(d, &layer->dense, (Linear){.x = d->attended, .y = d->x, .add = 1});
        multiply_by(d, &layer->h_to_4h, (Linear){
            .x = d->x, .y = d->inner, .source = NORMED, .norm = layer->post_attention_norm});
        multiply_by(d, &layer->to_h, (Linear){.x = d->inner, .y = d->x, .source = GATED, .add = 1});
    }
}
