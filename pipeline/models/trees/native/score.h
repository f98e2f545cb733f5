/* Template: score a matrix of VALUE with sums of SUM, block by block. Include once per pair of types. */

#define SCORE CONCAT(CONCAT(CONCAT(score_, VALUE), _), SUM)

/* Write the margins of `rows` rows to `out` [rows, outputs].
 *
 * The element (row, column) of the matrix is at row * strides[0] + column * strides[1]. `memory` has
 * `trees_memory` bytes and starts at a cache line. */
static void SCORE(const program *program, const void *matrix, const int64_t *strides, int64_t rows, void *out,
                  unsigned char *memory)
{
    row_bits bits = memory;
    unsigned char *numbers = bits + program->rows_of_bits * ROW_BYTES;
    SUM *sums = (SUM *)(numbers + 2 * OCTET * ROWS);
    const SUM *base = program->base;
    memset(bit_row(bits, ZEROS), 0, ROW_BYTES);
    memset(bit_row(bits, ONES), 0xFF, ROW_BYTES);
    memset(bit_row(bits, program->first_rank), 0, (size_t)(program->rows_of_bits - program->first_rank) * ROW_BYTES);
    for (int64_t begin = 0; begin < rows; begin += ROWS) {
        int size = rows - begin < ROWS ? (int)(rows - begin) : ROWS;
        CONCAT(test_block_, VALUE)(bits, program, (const VALUE *)matrix + begin * strides[0], strides, size);
        for (int64_t k = 0; k < program->outputs_count; k++)
            for (int p = 0; p < ROWS; p++)
                sums[k * ROWS + p] = base[k];
        for (int64_t octet = 0; octet < program->octets; octet++) {
            walk_octet(bits, program, octet, numbers);
            CONCAT(add_octet_, SUM)(sums, program, octet, numbers);
        }
        SUM *target = (SUM *)out + begin * program->outputs_count;
        for (int p = 0; p < size; p++)
            for (int64_t k = 0; k < program->outputs_count; k++)
                *target++ = sums[k * ROWS + p];
    }
}

#undef SCORE
