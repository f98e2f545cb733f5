/* The program that a tree ensemble is compiled to. pipeline/models/trees/program.py fills it; see docs/design/008.
 *
 * E pairs (feature, kind of test), T trees padded to whole octets, O octets, K outputs. Rows of bits are numbered. */
#ifndef TREES_PROGRAM_H
#define TREES_PROGRAM_H

#include <stdint.h>

enum { ZEROS, ONES, TRASH }; /* Rows of bits that every program has; the tests follow. */

enum { AS_IT_IS, ZERO_IS_MISSING, TRUNCATED }; /* How a test reads its value (tables.py). */

enum {
    OCTET = 8,     /* Trees whose leaves are added in one pass over the block. */
    MAX_BITS = 16, /* Bits of a leaf number. */
    ROWS = 512,    /* Rows of a block: they are scored together, and each has one bit in a row of bits. */
    ROW_BYTES = ROWS / 8
};

/* target = on where mask is set, else off. Each field is the offset in bytes of a row of bits. */
typedef struct {
    uint32_t target, mask, off, on;
} operation;

/* The field names are those of `Program` in program.py, which describes them, in the same order. */
typedef struct {
    const int64_t *column;
    const uint8_t *is_category, *reading;
    const int64_t *look_up, *steps, *size, *first, *slot;
    const void *thresholds, *heap; /* values: float or double */
    const uint32_t *codes, *slots, *set_slots;
    const int64_t *sets;
    const uint32_t *members;
    const operation *operations;
    const int64_t *operation_start;
    const uint32_t *planes;
    const void *leaves; /* sums: float or double */
    const int64_t *leaf, *stride;
    const uint8_t *bits;
    const int64_t *outputs;
    const void *base; /* sums */
    int64_t rows_of_bits, first_rank, pairs, octets, outputs_count;
} program;

#endif
