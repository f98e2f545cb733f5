/* Transformations of margins to outputs, in place: xgboost's formulas, then LightGBM's in double precision.
 *
 * expf, exp and log1p are arguments: Python passes those of the C library. Linked here, they could be a compiler's own,
 * whose last bits differ, or symbols that an older C library does not have. */
#include <stdint.h>

#define PUBLIC __attribute__((visibility("default")))

typedef float (*float_function)(float);
typedef double (*double_function)(double);

/* xgboost's float32 sigmoid (`common::Sigmoid`). */
PUBLIC void trees_sigmoid(float_function expf, float *values, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        float x = -values[i];
        if (x > 88.7f) /* False for a missing value. */
            x = 88.7f;
        values[i] = 1.0f / (expf(x) + 1.0f + 1e-16f);
    }
}

PUBLIC void trees_exp(float_function expf, float *values, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        values[i] = expf(values[i]);
}

/* The double-precision exp, rounded. */
PUBLIC void trees_exp64(double_function exp, float *values, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        values[i] = (float)exp((double)values[i]);
}

/* xgboost's softmax (`common::Softmax`) of each row of [rows, outputs]. */
PUBLIC void trees_softmax(float_function expf, float *values, int64_t rows, int64_t outputs)
{
    for (float *row = values; row < values + rows * outputs; row += outputs) {
        float top = row[0];
        for (int64_t k = 1; k < outputs; k++)
            top = row[k] > top ? row[k] : top;
        double total = 0.0;
        for (int64_t k = 0; k < outputs; k++) {
            row[k] = expf(row[k] - top);
            total += (double)row[k];
        }
        for (int64_t k = 0; k < outputs; k++)
            row[k] /= (float)total;
    }
}

/* LightGBM's double-precision sigmoid (`BinaryLogloss::ConvertOutput`). */
PUBLIC void trees_logistic(double_function exp, double *values, int64_t count, double slope)
{
    for (int64_t i = 0; i < count; i++)
        values[i] = 1.0 / (1.0 + exp(-slope * values[i]));
}

PUBLIC void trees_exp_double(double_function exp, double *values, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        values[i] = exp(values[i]);
}

/* LightGBM's `CrossEntropyLambda::ConvertOutput`. */
PUBLIC void trees_softplus(double_function exp, double_function log1p, double *values, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        values[i] = log1p(exp(values[i]));
}

/* LightGBM's softmax (`Common::Softmax`) of each row of [rows, outputs]. */
PUBLIC void trees_softmax_double(double_function exp, double *values, int64_t rows, int64_t outputs)
{
    for (double *row = values; row < values + rows * outputs; row += outputs) {
        double top = row[0], total = 0.0;
        for (int64_t k = 1; k < outputs; k++)
            top = row[k] > top ? row[k] : top;
        for (int64_t k = 0; k < outputs; k++) {
            row[k] = exp(row[k] - top);
            total += row[k];
        }
        for (int64_t k = 0; k < outputs; k++)
            row[k] /= total;
    }
}
