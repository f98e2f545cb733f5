/* Compile trees to operations on rows of bits (the comment at the top of pipeline/models/trees/program.py).
 *
 * Python calls `trees_measure`, allocates the arrays, and calls `trees_assemble`, which does the same and writes. */
#include <stddef.h>
#include <stdlib.h>

#include "program.h"

#define PUBLIC __attribute__((visibility("default")))

/* The trees: T trees, N nodes in all. Children are numbered from the first node of their tree; -1 at leaves. */
typedef struct {
    const int64_t *start; /* [T + 1] */
    const int32_t *left, *right;
    const int64_t *test; /* [N] row of bits of each split's test */
    int64_t trees;
    int64_t scratch; /* first row of bits for interior nodes */
} forest;

/* The size of a compiled tree. */
typedef struct {
    int64_t operations, bits, scratch_rows;
} tree_size;

/* One tree, and memory for the work on it: each array has an entry for each node of the largest tree. */
typedef struct {
    const int32_t *left, *right;
    const int64_t *test;
    int64_t scratch;
    int32_t *stack, *order, *height, *base, *numbers;
    uint32_t *state; /* [nodes][MAX_BITS] row of bits of bit k of the leaf number below each node */
    uint32_t *free;  /* scratch rows that are free, at most nodes * MAX_BITS */
} work;

static int is_leaf(const work *tree, int32_t node) { return tree->left[node] < 0; }

/* Write the reachable nodes, parents first, and each one's height above its lowest leaf; return how many there are. */
static int32_t order_nodes(work *tree)
{
    int32_t pending = 0, count = 0;
    tree->stack[pending++] = 0;
    while (pending > 0) {
        int32_t node = tree->stack[--pending];
        tree->order[count++] = node;
        if (!is_leaf(tree, node)) {
            tree->stack[pending++] = tree->right[node];
            tree->stack[pending++] = tree->left[node];
        }
    }
    for (int32_t i = count - 1; i >= 0; i--) {
        int32_t node = tree->order[i];
        tree->height[node] = 0;
        if (!is_leaf(tree, node)) {
            int32_t left = tree->height[tree->left[node]], right = tree->height[tree->right[node]];
            tree->height[node] = 1 + (left > right ? left : right);
        }
    }
    return count;
}

/* Write the number of each reachable leaf; return the bits of a leaf number.
 *
 * In an even tree bit h of the number is the direction at height h. Uneven trees, which would need more bits than they
 * have leaves for, are numbered in order. */
static int number_leaves(work *tree, int32_t count)
{
    int64_t leaves = 0;
    for (int32_t i = 0; i < count; i++)
        leaves += is_leaf(tree, tree->order[i]);
    int32_t top = tree->height[0];
    int even = top <= 8 || (top <= MAX_BITS && (INT64_C(1) << top) <= 4 * leaves);
    int32_t following = 0;
    tree->base[0] = 0;
    for (int32_t i = 0; i < count; i++) {
        int32_t node = tree->order[i];
        if (is_leaf(tree, node)) {
            tree->numbers[node] = even ? tree->base[node] : following;
            following++;
        } else {
            tree->base[tree->left[node]] = tree->base[node];
            tree->base[tree->right[node]] = tree->base[node] + (even ? INT32_C(1) << (tree->height[node] - 1) : 0);
        }
    }
    int bits = 0;
    while ((INT64_C(1) << bits) < leaves)
        bits++;
    return even ? top : bits;
}

/* Scratch rows: those in `free` first, then new ones. */
typedef struct {
    int64_t spare, used;
} scratch_rows;

static uint32_t take_scratch(work *tree, scratch_rows *rows)
{
    if (rows->spare == 0)
        return (uint32_t)(tree->scratch + rows->used++);
    return tree->free[--rows->spare];
}

static void release_scratch(work *tree, scratch_rows *rows, uint32_t row)
{
    if (row >= tree->scratch)
        tree->free[rows->spare++] = row;
}

/* Compute bit k below a split. Return the number of operations: 0 or 1, written to `out` unless that is NULL. */
static int select_bit(work *tree, scratch_rows *rows, int32_t node, int k, operation *out)
{
    uint32_t off = tree->state[tree->left[node] * (int64_t)MAX_BITS + k];
    uint32_t on = tree->state[tree->right[node] * (int64_t)MAX_BITS + k];
    uint32_t test = (uint32_t)tree->test[node], *result = &tree->state[node * (int64_t)MAX_BITS + k];
    if (off == on) {
        *result = off;
        return 0;
    }
    if (off == ZEROS && on == ONES) {
        *result = test;
        return 0;
    }
    /* The children's scratch rows are free from here on: the target may be one of them. */
    release_scratch(tree, rows, off);
    release_scratch(tree, rows, on);
    *result = take_scratch(tree, rows);
    if (out != NULL)
        *out = (operation){*result * ROW_BYTES, test * ROW_BYTES, off * ROW_BYTES, on * ROW_BYTES};
    return 1;
}

/* Write the operations, from the leaves up, unless `out` is NULL; return the size of the tree. */
static tree_size emit(work *tree, int32_t count, int bits, operation *out)
{
    scratch_rows rows = {0, 0};
    tree_size size = {0, bits, 0};
    for (int32_t i = count - 1; i >= 0; i--) {
        int32_t node = tree->order[i];
        for (int k = 0; k < bits; k++)
            if (is_leaf(tree, node))
                tree->state[node * (int64_t)MAX_BITS + k] = tree->numbers[node] >> k & 1 ? ONES : ZEROS;
            else
                size.operations += select_bit(tree, &rows, node, k, out == NULL ? NULL : out + size.operations);
    }
    size.scratch_rows = rows.used;
    return size;
}

static void release_work(work *tree)
{
    free(tree->stack);
    free(tree->state);
    free(tree->free);
}

/* Allocate memory for the largest tree; return 0 if there is none. */
static int make_work(const forest *trees, work *tree)
{
    size_t nodes = 1;
    for (int64_t i = 0; i < trees->trees; i++)
        if (trees->start[i + 1] - trees->start[i] > (int64_t)nodes)
            nodes = (size_t)(trees->start[i + 1] - trees->start[i]);
    tree->scratch = trees->scratch;
    tree->stack = malloc(4 * (nodes + 1) * sizeof *tree->stack);
    tree->state = malloc(nodes * MAX_BITS * sizeof *tree->state);
    tree->free = malloc(nodes * MAX_BITS * sizeof *tree->free);
    if (tree->stack == NULL || tree->state == NULL || tree->free == NULL) {
        release_work(tree);
        return 0;
    }
    tree->order = tree->stack + nodes + 1;
    tree->height = tree->order + nodes;
    tree->base = tree->height + nodes;
    return 1;
}

/* Point `tree` at a tree of the forest; its leaf numbers go to `numbers`. */
static void choose(const forest *trees, int64_t number, int32_t *numbers, work *tree)
{
    int64_t first = trees->start[number];
    tree->left = trees->left + first;
    tree->right = trees->right + first;
    tree->test = trees->test + first;
    tree->numbers = numbers + first;
}

/* Write the size of each tree and the number of each leaf ([N]; other nodes are left as they are).
 * Return 0 where there is not enough memory. */
PUBLIC int trees_measure(const forest *trees, tree_size *sizes, int32_t *numbers)
{
    work tree;
    if (!make_work(trees, &tree))
        return 0;
    for (int64_t i = 0; i < trees->trees; i++) {
        choose(trees, i, numbers, &tree);
        int32_t count = order_nodes(&tree);
        int bits = number_leaves(&tree, count);
        sizes[i] = emit(&tree, count, bits, NULL);
    }
    release_work(&tree);
    return 1;
}

/* Write the operations of `count` trees, one after another, and the planes of their leaf numbers ([count][MAX_BITS]).
 * order: numbers of trees; padding has trees->trees and gets neither. Return 0 where there is not enough memory. */
PUBLIC int trees_assemble(const forest *trees, const int64_t *order, int64_t count, int32_t *numbers,
                          operation *operations, uint32_t *planes)
{
    work tree;
    if (!make_work(trees, &tree))
        return 0;
    for (int64_t i = 0; i < count; i++, planes += MAX_BITS) {
        if (order[i] == trees->trees)
            continue;
        choose(trees, order[i], numbers, &tree);
        int32_t nodes = order_nodes(&tree);
        int bits = number_leaves(&tree, nodes);
        operations += emit(&tree, nodes, bits, operations).operations;
        for (int k = 0; k < bits; k++)
            planes[k] = tree.state[k];
    }
    release_work(&tree);
    return 1;
}
