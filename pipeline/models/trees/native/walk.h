/* From tests to leaf numbers: evaluate trees from their leaves up. Does not depend on the types of values and sums. */
#ifndef TREES_WALK_H
#define TREES_WALK_H

#include "block.h"

/* Run the operations of one tree. The target may be one of the sources: each lane is read before it is written. */
INLINE void walk(row_bits bits, const operation *begin, const operation *end)
{
    for (const operation *at = begin; at < end; at++)
        for (int i = 0; i < LANES; i++) {
            lane off = load_lane(bits + at->off, i);
            store_lane(bits + at->target, i, off ^ (load_lane(bits + at->mask, i) & (off ^ load_lane(bits + at->on, i))));
        }
}

/* Leaf numbers of a block as bytes, one tree after another; bit k of a row's number is its bit in planes[k]. */
#if defined(__AVX512BW__)

/* Where row p's number is. */
INLINE int number_place(int p) { return p; }

/* Each mask of 64 rows adds its power of two to the bytes where it is set. */
INLINE void write_numbers(row_bits bits, const uint32_t *planes, int count, unsigned char *numbers)
{
    for (int group = 0; group < ROWS / 64; group++) {
        __m512i number = _mm512_setzero_si512();
        for (int k = 0; k < count; k++) {
            uint64_t mask;
            memcpy(&mask, bit_row(bits, planes[k]) + 8 * group, 8);
            number = _mm512_mask_add_epi8(number, mask, number, _mm512_set1_epi8((char)(1 << k)));
        }
        _mm512_store_si512(numbers + 64 * group, number);
    }
}

#else

/* Where the number of row p is, for p % 8 == 0; the next seven follow. */
INLINE int number_place(int p) { return 64 * (p >> 3 & 7) + 8 * (p >> 6); }

/* Swap the bits that are `shift` and one plane's distance apart. */
INLINE void exchange(lane *low, lane *high, int shift, uint64_t kept)
{
    lane differ = ((*low >> shift) ^ *high) & fill_lane(kept);
    *low ^= differ << shift;
    *high ^= differ;
}

/* Swap the bits of one word that are `shift` apart. */
INLINE lane turn(lane plane, int shift, uint64_t kept)
{
    lane differ = (plane ^ (plane >> shift)) & fill_lane(kept);
    return plane ^ differ ^ (differ << shift);
}

/* Transpose 8 planes with one bit of each number into 8 with whole bytes (Hacker's Delight, 2nd ed., section 7-3). */
INLINE void write_numbers(row_bits bits, const uint32_t *planes, int count, unsigned char *numbers)
{
    (void)count; /* Planes past the count are zeros. */
    for (int i = 0; i < LANES; i++) {
        lane plane[8];
        for (int k = 0; k < 8; k++)
            plane[k] = load_lane(bit_row(bits, planes[k]), i);
        for (int k = 0; k < 4; k++)
            exchange(&plane[k], &plane[k + 4], 32, UINT64_C(0x00000000FFFFFFFF));
        for (int k = 0; k < 8; k += k % 2 ? 3 : 1)
            exchange(&plane[k], &plane[k + 2], 16, UINT64_C(0x0000FFFF0000FFFF));
        for (int k = 0; k < 8; k += 2)
            exchange(&plane[k], &plane[k + 1], 8, UINT64_C(0x00FF00FF00FF00FF));
        for (int k = 0; k < 8; k++) {
            plane[k] = turn(plane[k], 7, UINT64_C(0x00AA00AA00AA00AA));
            plane[k] = turn(plane[k], 14, UINT64_C(0x0000CCCC0000CCCC));
            plane[k] = turn(plane[k], 28, UINT64_C(0x00000000F0F0F0F0));
            store_lane(numbers + 64 * k, i, plane[k]);
        }
    }
}

#endif

/* Evaluate the trees of an octet. Low bytes of leaf numbers come first, then, for wide trees, the high bytes. */
SHARED void walk_octet(row_bits bits, const program *program, int64_t octet, unsigned char *numbers)
{
    int count = program->bits[octet];
    for (int t = 0; t < OCTET; t++) {
        int64_t tree = octet * OCTET + t;
        const uint32_t *planes = program->planes + tree * MAX_BITS;
        walk(bits, program->operations + program->operation_start[tree],
             program->operations + program->operation_start[tree + 1]);
        write_numbers(bits, planes, count < 8 ? count : 8, numbers + t * ROWS);
        if (count > 8)
            write_numbers(bits, planes + 8, count - 8, numbers + (OCTET + t) * ROWS);
    }
}

#endif
