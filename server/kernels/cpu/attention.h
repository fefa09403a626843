/* Attention of the newest tokens of one sequence to all of it, see attention.c. */
#pragma once

#include <stdint.h>

typedef struct {
    const float *query;          /* [n][heads][dim], tokens `query_stride` values apart */
    const uint16_t *key, *value; /* [groups][length][dim], groups `stride` values apart */
    float *y;                    /* [n][heads][dim] */
    int64_t n, heads, groups, length, dim, stride, query_stride;
    int64_t context; /* the first keys, which every query sees */
} Attention;

/* How many blocks of rows there are, over all groups; they may be computed in any order. */
static int64_t attention_blocks(const Attention *a);
static void attend_block(const Attention *a, int64_t block);
