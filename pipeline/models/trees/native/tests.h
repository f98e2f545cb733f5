/* Template: the tests of one block, for values of the type VALUE. Include once per type; names get its suffix.
 *
 * A test is a row of bits: set where a row of the matrix goes right. A feature with few thresholds is compared with
 * each of them. For other features each value is ranked among the sorted thresholds, each row sets its bit in the row
 * of bits of its rank, and a running "and not" over the ranks gives all tests. */

#define V(name) CONCAT(name, VALUE)

/* Copy one column of a block. Values past `rows` are left as they were: nothing reads their results. */
INLINE void V(read_column_)(VALUE *values, const VALUE *column, int64_t step, int rows)
{
    if (step == 1)
        memcpy(values, column, (size_t)rows * sizeof(VALUE));
    else
        for (int p = 0; p < rows; p++)
            values[p] = column[p * step];
}

/* Change the values of a column to what its tests read. */
SHARED void V(change_values_)(VALUE *values, int reading)
{
    for (int p = 0; p < ROWS; p++)
        if (reading == ZERO_IS_MISSING)
            values[p] = values[p] >= (VALUE)-1e-35f && values[p] <= (VALUE)1e-35f ? (VALUE)NAN : values[p];
        else
            values[p] = sizeof(VALUE) == 4 ? (VALUE)truncf((float)values[p]) : (VALUE)trunc((double)values[p]);
}

/* Write the test "not value < threshold", or "value >= threshold", which differ for missing values. */
INLINE void V(compare_)(unsigned char *row, const VALUE *values, VALUE threshold, int missing_right)
{
    for (int p = 0; p < ROWS; p += 64) {
        uint64_t word = missing_right ? ~V(mask_less_)(values + p, threshold) : V(mask_reached_)(values + p, threshold);
        memcpy(row + p / 8, &word, 8);
    }
}

/* Write the tests of a feature with few thresholds. */
SHARED void V(compare_numbers_)(row_bits bits, const program *program, int64_t pair, const VALUE *values)
{
    const VALUE *thresholds = (const VALUE *)program->thresholds + program->look_up[pair];
    const uint32_t *slots = program->slots + 2 * program->slot[pair];
    for (int64_t j = 0; j < program->size[pair]; j++) {
        if (slots[2 * j] != TRASH)
            V(compare_)(bit_row(bits, slots[2 * j]), values, thresholds[j], 1);
        if (slots[2 * j + 1] != TRASH)
            V(compare_)(bit_row(bits, slots[2 * j + 1]), values, thresholds[j], 0);
    }
}

/* Take the last steps of the search, as many as `steps`, for each value; a missing value gets the rank size + 1. */
INLINE void V(finish_ranks_)(uint32_t *ranks, const VALUE *values, const VALUE *heap, int steps, uint32_t leaf,
                             uint32_t size)
{
    for (int p = 0; p < ROWS; p++) {
        uint32_t node = ranks[p];
        for (int step = 0; step < steps; step++)
            node = 2 * node + (heap[node] <= values[p]);
        /* Without a branch, which a processor could not predict. */
        uint32_t missing = -(uint32_t)(values[p] != values[p]);
        ranks[p] = ((node - leaf) & ~missing) | ((size + 1) & missing);
    }
}

/* Count the thresholds that are <= each value; a missing value gets size + 1.
 *
 * The thresholds are a binary heap: node n has the children 2n and 2n + 1. NaNs, which compare false, fill the tree up.
 * The node after the last step less the first leaf is the rank. */
SHARED void V(rank_numbers_)(uint32_t *ranks, const VALUE *values, const VALUE *heap, int steps, uint32_t size)
{
    uint32_t leaf = UINT32_C(1) << steps;
    int left = steps - V(descend_)(ranks, values, heap, steps);
    /* With a constant number of steps, compilers leave no loop. */
    switch (left) {
    case 0: V(finish_ranks_)(ranks, values, heap, 0, leaf, size); break;
    case 1: V(finish_ranks_)(ranks, values, heap, 1, leaf, size); break;
    case 2: V(finish_ranks_)(ranks, values, heap, 2, leaf, size); break;
    case 3: V(finish_ranks_)(ranks, values, heap, 3, leaf, size); break;
    case 7: V(finish_ranks_)(ranks, values, heap, 7, leaf, size); break;
    case 8: V(finish_ranks_)(ranks, values, heap, 8, leaf, size); break;
    default: V(finish_ranks_)(ranks, values, heap, left, leaf, size);
    }
}

/* Look up the number of each category code; a code in no set gets size, a missing value size + 1. */
SHARED void V(rank_categories_)(uint32_t *ranks, const VALUE *values, int rows, const uint32_t *codes, int64_t limit,
                                uint32_t size)
{
    for (int p = 0; p < rows; p++) {
        VALUE value = values[p];
        if (value != value)
            ranks[p] = size + 1;
        else if (value < 0 || value >= (VALUE)limit)
            ranks[p] = size;
        else
            ranks[p] = codes[(int32_t)value];
    }
}

/* Fill the tests of a block of `rows` rows that starts at `matrix`. Rows of bits of ranks are zeros before and after. */
SHARED void V(test_block_)(row_bits bits, const program *program, const VALUE *matrix, const int64_t strides[2],
                           int rows)
{
    VALUE values[ROWS] __attribute__((aligned(64)));
    uint32_t ranks[ROWS] __attribute__((aligned(64)));
    memset(values, 0, sizeof values);
    for (int64_t pair = 0; pair < program->pairs; pair++) {
        V(read_column_)(values, matrix + program->column[pair] * strides[1], strides[0], rows);
        if (program->reading[pair] != AS_IT_IS)
            V(change_values_)(values, program->reading[pair]);
        int64_t first = program->first[pair], size = program->size[pair], look_up = program->look_up[pair];
        if (program->is_category[pair]) {
            V(rank_categories_)(ranks, values, rows, program->codes + look_up, program->steps[pair], (uint32_t)size);
            mark(bit_row(bits, first), ranks, rows);
            test_sets(bits, program, pair);
        } else if (size <= FEW) {
            V(compare_numbers_)(bits, program, pair, values);
            continue;
        } else {
            V(rank_numbers_)(ranks, values, (const VALUE *)program->heap + look_up, (int)program->steps[pair],
                             (uint32_t)size);
            mark(bit_row(bits, first), ranks, rows);
            test_ranks(bits, program, pair);
        }
        memset(bit_row(bits, first), 0, (size_t)(size + 2) * ROW_BYTES);
    }
}

#undef V
