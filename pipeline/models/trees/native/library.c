/* The library's functions for Python (pipeline/models/trees/library.py): choose the kernels and run them. */
#include <stddef.h>
#include <string.h>

#include "kernels.h"
#include "processor.h"

#define PUBLIC __attribute__((visibility("default")))

/* A kind of processor that kernels were compiled for. */
typedef struct {
    const char *name;
    const score_function *kernels;
} kind;

/* From the oldest to the newest kind of processor. */
static const kind kinds[] = {
#if defined(__x86_64__)
    {"x86-64-v2", kernels_v2},
    {"x86-64-v3", kernels_v3},
    {"x86-64-v4", kernels_v4},
#else
    {"baseline", kernels_baseline},
#endif
};

enum { KINDS = sizeof kinds / sizeof kinds[0] };

/* Return the name of a kind of processor, or NULL past the last one. */
PUBLIC const char *trees_kind(int number) { return number >= 0 && number < KINDS ? kinds[number].name : NULL; }

/* Return 1 if this processor, and its operating system, can run the kernels of a kind. */
PUBLIC int trees_can_run(int number)
{
#if defined(__x86_64__)
    return number + 2 <= processor_level();
#else
    return number == 0;
#endif
}

/* Return the bytes of working memory that one call of `trees_score` needs: rows of bits, leaf numbers, sums. */
PUBLIC int64_t trees_memory(const program *program, int sums_are_double)
{
    int64_t sum_bytes = sums_are_double ? 8 : 4;
    return program->rows_of_bits * ROW_BYTES + 2 * OCTET * ROWS + program->outputs_count * ROWS * sum_bytes;
}

/* Write the margins of `rows` rows to `out` [rows, outputs], with the kernels of a kind that this processor can run.
 *
 * types: 2 * (values are double) + (sums are double). The element (row, column) of `matrix` is at
 * row * row_step + column * column_step. `memory` starts at a cache line. */
PUBLIC void trees_score(int number, int types, const program *program, const void *matrix, int64_t row_step,
                        int64_t column_step, int64_t rows, void *out, void *memory)
{
    const int64_t strides[2] = {row_step, column_step};
    kinds[number].kernels[types](program, matrix, strides, rows, out, memory);
}

/* Return the SHA-256 of the sources that this library was built from. */
PUBLIC const char *trees_sources(void) { return SOURCES; }
