/* The kernels of each kind of processor, as linked into the library. */
#ifndef TREES_KERNELS_H
#define TREES_KERNELS_H

#include "program.h"

/* See `SCORE` in score.h. */
typedef void (*score_function)(const program *program, const void *matrix, const int64_t *strides, int64_t rows,
                               void *out, unsigned char *memory);

/* Indexed by 2 * (values are double) + (sums are double). */
#if defined(__x86_64__)
extern const score_function kernels_v2[4], kernels_v3[4], kernels_v4[4];
#else
extern const score_function kernels_baseline[4];
#endif

#endif
