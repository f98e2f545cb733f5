/* Add leaves that are looked up in registers: faster than memory where trees have few leaves and registers are wide.
 *
 * Each function returns 0 if it cannot: the leaves are then read from memory (leaves.h). */
#ifndef TREES_PERMUTE_H
#define TREES_PERMUTE_H

#include "walk.h"

INLINE int add_permuted_double(double *sums, const double *const *leaves, const unsigned char *numbers, int bits)
{
    (void)sums, (void)leaves, (void)numbers, (void)bits;
    return 0;
}

#if defined(__AVX512BW__)

/* Return `high` where a bit of the number is set, else `low`. */
INLINE __m512 choose(__m512i number, int bit, __m512 low, __m512 high)
{
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(number, _mm512_set1_epi32(bit)), low, high);
}

/* Return the leaf of each of 16 rows, out of 32, 64 or 128 leaves. */
INLINE __m512 look_up_32(const __m512 *leaves, __m512i number)
{
    return _mm512_permutex2var_ps(leaves[0], number, leaves[1]);
}

INLINE __m512 look_up_64(const __m512 *leaves, __m512i number)
{
    return choose(number, 32, look_up_32(leaves, number), look_up_32(leaves + 2, number));
}

INLINE __m512 look_up_128(const __m512 *leaves, __m512i number)
{
    return choose(number, 64, look_up_64(leaves, number), look_up_64(leaves + 4, number));
}

/* The same, out of 16 * registers leaves. */
INLINE __m512 look_up(const __m512 *leaves, __m512i number, int registers)
{
    switch (registers) {
    case 1: return _mm512_permutexvar_ps(number, leaves[0]);
    case 2: return look_up_32(leaves, number);
    case 4: return look_up_64(leaves, number);
    case 8: return look_up_128(leaves, number);
    default: return choose(number, 128, look_up_128(leaves, number), look_up_128(leaves + 8, number));
    }
}

/* Add the leaves of some trees, whose leaves fit into the registers together. */
INLINE void add_some(float *sums, const float *const *leaves, const unsigned char *numbers, int trees, int registers)
{
    __m512 table[16];
#pragma GCC unroll 16
    for (int i = 0; i < trees * registers; i++)
        table[i] = _mm512_loadu_ps(leaves[i / registers] + 16 * (i % registers));
    for (int p = 0; p < ROWS; p += 16) {
        __m512 sum = _mm512_load_ps(sums + p);
#pragma GCC unroll 8
        for (int t = 0; t < trees; t++) {
            __m512i number = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *)(numbers + t * ROWS + p)));
            sum = _mm512_add_ps(sum, look_up(table + t * registers, number, registers));
        }
        _mm512_store_ps(sums + p, sum);
    }
}

INLINE void add_all(float *sums, const float *const *leaves, const unsigned char *numbers, int trees, int registers)
{
    for (int t = 0; t < OCTET; t += trees)
        add_some(sums, leaves + t, numbers + t * ROWS, trees, registers);
}

SHARED int add_permuted_float(float *sums, const float *const *leaves, const unsigned char *numbers, int bits)
{
    if (bits <= 4)
        add_all(sums, leaves, numbers, 8, 1);
    else if (bits == 5)
        add_all(sums, leaves, numbers, 8, 2);
    else if (bits == 6)
        add_all(sums, leaves, numbers, 4, 4);
    else if (bits == 7)
        add_all(sums, leaves, numbers, 2, 8);
    else if (bits == 8)
        add_all(sums, leaves, numbers, 1, 16);
    return bits <= 8;
}

#else

INLINE int add_permuted_float(float *sums, const float *const *leaves, const unsigned char *numbers, int bits)
{
    (void)sums, (void)leaves, (void)numbers, (void)bits;
    return 0;
}

#endif
#endif
