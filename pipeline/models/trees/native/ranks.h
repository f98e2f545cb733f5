/* From the ranks of a block's rows to tests: the part that does not depend on the type of values. */
#ifndef TREES_RANKS_H
#define TREES_RANKS_H

#include "block.h"

/* Set each row's bit in the row of bits of its rank; rank 0 is at `first`. */
SHARED void mark(unsigned char *first, const uint32_t *ranks, int rows)
{
    for (int p = 0; p < rows; p++)
        first[(uint64_t)ranks[p] * ROW_BYTES + (p >> 3)] |= (unsigned char)(1u << (p & 7));
}

/* Turn the ranks of a feature into tests "the rank is above": for each threshold, with and without missing values. */
SHARED void test_ranks(row_bits bits, const program *program, int64_t pair)
{
    int64_t size = program->size[pair];
    const unsigned char *rank = bit_row(bits, program->first[pair]);
    const uint32_t *slots = program->slots + 2 * program->slot[pair];
    lane present[LANES], above[LANES];
    for (int i = 0; i < LANES; i++) {
        present[i] = ~load_lane(rank + (size + 1) * ROW_BYTES, i);
        above[i] = fill_lane(~UINT64_C(0));
    }
    for (int64_t j = 0; j < size; j++, rank += ROW_BYTES) {
        unsigned char *right = bit_row(bits, slots[2 * j]), *left = bit_row(bits, slots[2 * j + 1]);
        for (int i = 0; i < LANES; i++) {
            above[i] &= ~load_lane(rank, i);
            store_lane(right, i, above[i]);
            store_lane(left, i, above[i] & present[i]);
        }
    }
}

/* Turn one feature's categories into tests "is in the set": one test per set and direction of missing values. */
SHARED void test_sets(row_bits bits, const program *program, int64_t pair)
{
    const unsigned char *first = bit_row(bits, program->first[pair]);
    const unsigned char *missing = first + (program->size[pair] + 1) * ROW_BYTES;
    for (int64_t set = program->slot[pair]; set < program->slot[pair + 1]; set++) {
        unsigned char *right = bit_row(bits, program->set_slots[2 * set]);
        unsigned char *left = bit_row(bits, program->set_slots[2 * set + 1]);
        for (int i = 0; i < LANES; i++) {
            lane found = fill_lane(0);
            for (int64_t m = program->sets[set]; m < program->sets[set + 1]; m++)
                found |= load_lane(first + (int64_t)program->members[m] * ROW_BYTES, i);
            store_lane(left, i, found);
            store_lane(right, i, found | load_lane(missing, i));
        }
    }
}

#endif
