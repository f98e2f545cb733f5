/* The first steps of the search for the rank of each value, with the top of the heap of thresholds in registers.
 *
 * Each function starts at node 1, writes the node that each value reaches, and returns the number of steps. A step
 * from node n goes to 2n, or to 2n + 1 if heap[n] <= value. What is left is done value by value (tests.h). */
#ifndef TREES_DESCEND_H
#define TREES_DESCEND_H

#include "block.h"

INLINE int start_at_root(uint32_t *nodes)
{
    for (int p = 0; p < ROWS; p++)
        nodes[p] = 1;
    return 0;
}

#if defined(__AVX512BW__)

/* Return heap[node] for 16 nodes of one level: its 2 ** level thresholds are in registers of 16. */
INLINE __m512 pick(const __m512 *heap, __m512i node, int level)
{
    if (level < 4)
        return _mm512_permutexvar_ps(node, heap[0]);
    if (level == 4)
        return _mm512_permutexvar_ps(node, heap[1]);
    if (level == 5)
        return _mm512_permutex2var_ps(heap[2], node, heap[3]);
    __mmask16 upper = _mm512_test_epi32_mask(node, _mm512_set1_epi32(32));
    __m512 found = _mm512_mask_blend_ps(upper, _mm512_permutex2var_ps(heap[4], node, heap[5]),
                                        _mm512_permutex2var_ps(heap[6], node, heap[7]));
    if (level == 6)
        return found;
    __m512 first = _mm512_mask_blend_ps(upper, _mm512_permutex2var_ps(heap[8], node, heap[9]),
                                        _mm512_permutex2var_ps(heap[10], node, heap[11]));
    __m512 second = _mm512_mask_blend_ps(upper, _mm512_permutex2var_ps(heap[12], node, heap[13]),
                                         _mm512_permutex2var_ps(heap[14], node, heap[15]));
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(node, _mm512_set1_epi32(64)), first, second);
}

INLINE void descend_levels(uint32_t *nodes, const float *values, const float *heap, int levels)
{
    __m512 table[16];
    for (int i = 0; i < 1 << levels >> 4; i++)
        table[i] = _mm512_loadu_ps(heap + 16 * i);
    const __m512i one = _mm512_set1_epi32(1);
    for (int p = 0; p < ROWS; p += 16) {
        __m512 value = _mm512_loadu_ps(values + p);
        __m512i node = one;
#pragma GCC unroll 8
        for (int level = 0; level < levels; level++) {
            __mmask16 reached = _mm512_cmp_ps_mask(pick(table, node, level), value, _CMP_LE_OQ);
            node = _mm512_add_epi32(node, node);
            node = _mm512_mask_add_epi32(node, reached, node, one);
        }
        _mm512_storeu_si512(nodes + p, node);
    }
}

SHARED int descend_float(uint32_t *nodes, const float *values, const float *heap, int steps)
{
    if (steps < 4)
        return start_at_root(nodes);
    switch (steps) {
    case 4: descend_levels(nodes, values, heap, 4); return 4;
    case 5: descend_levels(nodes, values, heap, 5); return 5;
    case 6: descend_levels(nodes, values, heap, 6); return 6;
    case 7: descend_levels(nodes, values, heap, 7); return 7;
    default: descend_levels(nodes, values, heap, 8); return 8;
    }
}

#elif defined(__AVX2__)

/* Return heap[node] for 8 nodes of one level: its 2 ** level thresholds are in registers of 8. */
INLINE __m256 pick(const __m256 *heap, __m256i node, int level)
{
    if (level < 3)
        return _mm256_permutevar8x32_ps(heap[0], node);
    if (level == 3)
        return _mm256_permutevar8x32_ps(heap[1], node);
    /* A blend looks at the highest bit of each number. */
    __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(node, 28));
    if (level == 4)
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(heap[2], node), _mm256_permutevar8x32_ps(heap[3], node), upper);
    __m256 first = _mm256_blendv_ps(_mm256_permutevar8x32_ps(heap[4], node), _mm256_permutevar8x32_ps(heap[5], node), upper);
    __m256 second = _mm256_blendv_ps(_mm256_permutevar8x32_ps(heap[6], node), _mm256_permutevar8x32_ps(heap[7], node), upper);
    return _mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(node, 27)));
}

INLINE void descend_levels(uint32_t *nodes, const float *values, const float *heap, int levels)
{
    __m256 table[8];
    for (int i = 0; i < 1 << levels >> 3; i++)
        table[i] = _mm256_loadu_ps(heap + 8 * i);
    for (int p = 0; p < ROWS; p += 8) {
        __m256 value = _mm256_loadu_ps(values + p);
        __m256i node = _mm256_set1_epi32(1);
#pragma GCC unroll 8
        for (int level = 0; level < levels; level++) {
            __m256i reached = _mm256_castps_si256(_mm256_cmp_ps(pick(table, node, level), value, _CMP_LE_OQ));
            node = _mm256_sub_epi32(_mm256_add_epi32(node, node), reached);
        }
        _mm256_storeu_si256((__m256i *)(nodes + p), node);
    }
}

SHARED int descend_float(uint32_t *nodes, const float *values, const float *heap, int steps)
{
    if (steps < 5)
        return start_at_root(nodes);
    if (steps == 5) {
        descend_levels(nodes, values, heap, 5);
        return 5;
    }
    descend_levels(nodes, values, heap, 6);
    return 6;
}

#else

SHARED int descend_float(uint32_t *nodes, const float *values, const float *heap, int steps)
{
    (void)values, (void)heap, (void)steps;
    return start_at_root(nodes);
}

#endif

SHARED int descend_double(uint32_t *nodes, const double *values, const double *heap, int steps)
{
    (void)values, (void)heap, (void)steps;
    return start_at_root(nodes);
}

#endif
