/* Template: add the leaves of an octet to sums of the type SUM. Include once per type; names get its suffix.
 *
 * Each row's leaves are added one by one, in the order of the trees: every sum is rounded as in the library. */

#define S(name) CONCAT(name, SUM)

/* Add the leaves of 8 trees, whose numbers are bytes. */
INLINE void S(add_narrow_)(SUM *sums, const SUM *const *leaves, const unsigned char *numbers)
{
    for (int first = 0; first < ROWS; first += 8) {
        const unsigned char *number = numbers + number_place(first);
        for (int p = 0; p < 8; p++) {
            SUM sum = sums[first + p];
            for (int t = 0; t < OCTET; t++)
                sum += leaves[t][number[t * ROWS + p]];
            sums[first + p] = sum;
        }
    }
}

/* Add the leaves of 8 trees, whose numbers are two bytes. */
INLINE void S(add_wide_)(SUM *sums, const SUM *const *leaves, const unsigned char *numbers)
{
    for (int t = 0; t < OCTET; t++, numbers += ROWS)
        for (int first = 0; first < ROWS; first += 8) {
            const unsigned char *low = numbers + number_place(first), *high = low + OCTET * ROWS;
            for (int p = 0; p < 8; p++)
                sums[first + p] += leaves[t][low[p] | (unsigned)high[p] << 8];
        }
}

/* Add the leaves of an octet to the outputs that its trees share; `sums` is [outputs][ROWS]. */
SHARED void S(add_octet_)(SUM *sums, const program *program, int64_t octet, const unsigned char *numbers)
{
    const SUM *leaves[OCTET];
    for (int64_t output = program->outputs[2 * octet]; output < program->outputs[2 * octet + 1]; output++) {
        int64_t part = output - program->outputs[2 * octet];
        for (int t = 0; t < OCTET; t++) {
            int64_t tree = octet * OCTET + t;
            leaves[t] = (const SUM *)program->leaves + program->leaf[tree] + part * program->stride[tree];
        }
        if (program->bits[octet] > 8)
            S(add_wide_)(sums + output * ROWS, leaves, numbers);
        else if (!S(add_permuted_)(sums + output * ROWS, leaves, numbers, program->bits[octet]))
            S(add_narrow_)(sums + output * ROWS, leaves, numbers);
    }
}

#undef S
