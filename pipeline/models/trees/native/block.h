/* Rows of bits, and vectors as wide as the processor that this file is compiled for.
 *
 * A block is ROWS rows of the matrix. A row of bits holds one bit for each of them: bit p % 64 of word p / 64 stands
 * for row p. Every operation on a row of bits works on it lane by lane. Explicit vectors are used, because compilers
 * leave these loops as scalar code where the output may overlap the input. */
#ifndef TREES_BLOCK_H
#define TREES_BLOCK_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "program.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#define LANE_BYTES 64
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANE_BYTES 32
#else
#define LANE_BYTES 16
#endif
#define LANES (ROW_BYTES / LANE_BYTES)

#define INLINE static inline __attribute__((always_inline, unused))
#define SHARED static __attribute__((noinline, unused))

typedef uint64_t lane __attribute__((vector_size(LANE_BYTES), may_alias));

/* The rows of bits of one block. Each row starts at a cache line. */
typedef unsigned char *row_bits;

INLINE unsigned char *bit_row(row_bits bits, int64_t row) { return bits + row * ROW_BYTES; }

INLINE lane load_lane(const unsigned char *row, int number) { return *(const lane *)(row + number * LANE_BYTES); }

INLINE void store_lane(unsigned char *row, int number, lane value) { *(lane *)(row + number * LANE_BYTES) = value; }

INLINE lane fill_lane(uint64_t word) { return word - (lane){0}; }

#endif
