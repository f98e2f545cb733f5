/* The kernels for one kind of processor, for every pair of types. Compiled once per kind, with its name in KERNELS. */
#include "kernels.h"

#include "compare.h"
#include "descend.h"
#include "permute.h"
#include "ranks.h"
#include "walk.h"

/* Number of thresholds up to which comparing with each threshold is faster than ranking (measured). */
#if defined(__AVX512BW__)
#define FEW 64
#elif defined(__AVX2__)
#define FEW 24
#else
#define FEW 100
#endif

#define JOIN(first, second) first##second
#define CONCAT(first, second) JOIN(first, second)

#define VALUE float
#include "tests.h"
#undef VALUE
#define VALUE double
#include "tests.h"
#undef VALUE

#define SUM float
#include "leaves.h"
#undef SUM
#define SUM double
#include "leaves.h"
#undef SUM

#define VALUE float
#define SUM float
#include "score.h"
#undef SUM
#define SUM double
#include "score.h"
#undef VALUE
#define VALUE double
#include "score.h"
#undef SUM
#define SUM float
#include "score.h"

const score_function KERNELS[4] = {score_float_float, score_float_double, score_double_float, score_double_double};
