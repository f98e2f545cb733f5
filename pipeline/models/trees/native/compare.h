/* Compare 64 values with a threshold: bit p of the result is the comparison of value p. False for missing values. */
#ifndef TREES_COMPARE_H
#define TREES_COMPARE_H

#include "block.h"

/* Compare `per_step` values at a time with `step`, which returns one bit for each. */
#define COMPARE_64(per_step, step)                   \
    uint64_t word = 0;                               \
    for (int p = 0; p < 64; p += (per_step))         \
        word |= (uint64_t)(step) << p;               \
    return word

#if defined(__AVX512BW__)

INLINE uint64_t mask_less_float(const float *values, float threshold)
{
    COMPARE_64(16, _mm512_cmp_ps_mask(_mm512_loadu_ps(values + p), _mm512_set1_ps(threshold), _CMP_LT_OQ));
}

INLINE uint64_t mask_reached_float(const float *values, float threshold)
{
    COMPARE_64(16, _mm512_cmp_ps_mask(_mm512_loadu_ps(values + p), _mm512_set1_ps(threshold), _CMP_GE_OQ));
}

INLINE uint64_t mask_less_double(const double *values, double threshold)
{
    COMPARE_64(8, _mm512_cmp_pd_mask(_mm512_loadu_pd(values + p), _mm512_set1_pd(threshold), _CMP_LT_OQ));
}

INLINE uint64_t mask_reached_double(const double *values, double threshold)
{
    COMPARE_64(8, _mm512_cmp_pd_mask(_mm512_loadu_pd(values + p), _mm512_set1_pd(threshold), _CMP_GE_OQ));
}

#elif defined(__AVX2__)

INLINE uint64_t mask_less_float(const float *values, float threshold)
{
    COMPARE_64(8, (unsigned)_mm256_movemask_ps(
                      _mm256_cmp_ps(_mm256_loadu_ps(values + p), _mm256_set1_ps(threshold), _CMP_LT_OQ)));
}

INLINE uint64_t mask_reached_float(const float *values, float threshold)
{
    COMPARE_64(8, (unsigned)_mm256_movemask_ps(
                      _mm256_cmp_ps(_mm256_loadu_ps(values + p), _mm256_set1_ps(threshold), _CMP_GE_OQ)));
}

INLINE uint64_t mask_less_double(const double *values, double threshold)
{
    COMPARE_64(4, (unsigned)_mm256_movemask_pd(
                      _mm256_cmp_pd(_mm256_loadu_pd(values + p), _mm256_set1_pd(threshold), _CMP_LT_OQ)));
}

INLINE uint64_t mask_reached_double(const double *values, double threshold)
{
    COMPARE_64(4, (unsigned)_mm256_movemask_pd(
                      _mm256_cmp_pd(_mm256_loadu_pd(values + p), _mm256_set1_pd(threshold), _CMP_GE_OQ)));
}

#elif defined(__SSE2__)
#include <emmintrin.h>

INLINE uint64_t mask_less_float(const float *values, float threshold)
{
    COMPARE_64(4, (unsigned)_mm_movemask_ps(_mm_cmplt_ps(_mm_loadu_ps(values + p), _mm_set1_ps(threshold))));
}

INLINE uint64_t mask_reached_float(const float *values, float threshold)
{
    COMPARE_64(4, (unsigned)_mm_movemask_ps(_mm_cmpge_ps(_mm_loadu_ps(values + p), _mm_set1_ps(threshold))));
}

INLINE uint64_t mask_less_double(const double *values, double threshold)
{
    COMPARE_64(2, (unsigned)_mm_movemask_pd(_mm_cmplt_pd(_mm_loadu_pd(values + p), _mm_set1_pd(threshold))));
}

INLINE uint64_t mask_reached_double(const double *values, double threshold)
{
    COMPARE_64(2, (unsigned)_mm_movemask_pd(_mm_cmpge_pd(_mm_loadu_pd(values + p), _mm_set1_pd(threshold))));
}

#else

INLINE uint64_t mask_less_float(const float *values, float threshold) { COMPARE_64(1, values[p] < threshold); }

INLINE uint64_t mask_reached_float(const float *values, float threshold) { COMPARE_64(1, values[p] >= threshold); }

INLINE uint64_t mask_less_double(const double *values, double threshold) { COMPARE_64(1, values[p] < threshold); }

INLINE uint64_t mask_reached_double(const double *values, double threshold) { COMPARE_64(1, values[p] >= threshold); }

#endif
#endif
