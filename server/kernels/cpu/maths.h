/* Functions that compilers turn into vector code where they stand in a loop. */
#pragma once

#include <stdint.h>
#include <string.h>

/* e^x: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes, expf.c), with a relative error below 3e-7 + 6e-8 |x|.
   Never less than the smallest normal number, infinity from 88.4 on, where 2^n is; NaN stays NaN. */
static inline float exponential(float x) {
    x = x < -87.3f ? -87.3f : x > 89.0f ? 89.0f : x;
    float turns = x * 1.44269504f;
    turns = turns > -126.0f ? turns : -126.0f; /* takes NaN out, which no integer stands for; x and so p keep it */
    int32_t n = (int32_t)(turns + (turns < 0 ? -0.5f : 0.5f));
    float r = x - (float)n * 0.693147181f; /* two parts of ln 2 would be added up by -fassociative-math */
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    int32_t power = (n + 127) << 23;
    float scale;
    memcpy(&scale, &power, sizeof scale);
    return p * scale;
}
