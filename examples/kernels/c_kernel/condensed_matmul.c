/* A condensed matmul and its gradients, in plain loops.
 *
 * Compiled once for each pair of types: -DREAL=float|double, -DINDEX=uint16_t|uint32_t. All arrays
 * are in C order. Sums are in REAL, so that float32 accumulates in float32, as SPEC 2 has it; the
 * bound there allows any order of the terms, and a multiplication fused with its addition.
 */
#include <stddef.h>
#include <stdint.h>

/* z[b, active[i]] = bias[active[i]] + sum over j of values[i, j] * x[b, indices[i, j]]
 *
 * x (batch, n_in), values and indices (n_active, k), active (n_active), bias (n_out) or NULL,
 * z (batch, n_out): every element is written, ablated neurons get their bias, or 0.
 */
void product(const REAL *x, const REAL *values, const INDEX *indices, const int64_t *active,
             const REAL *bias, REAL *z, int64_t batch, int64_t n_in, int64_t n_out,
             int64_t n_active, int64_t k)
{
    for (int64_t b = 0; b < batch; b++) {
        const REAL *row = x + b * n_in;
        for (int64_t n = 0; n < n_out; n++)
            z[b * n_out + n] = bias ? bias[n] : 0;
        for (int64_t i = 0; i < n_active; i++) {
            const REAL *v = values + i * k;
            const INDEX *c = indices + i * k;
            REAL sums[4] = {0, 0, 0, 0}; /* four at a time: none waits for the one before */
            int64_t j = 0;
            for (; j + 4 <= k; j += 4) {
                sums[0] += v[j] * row[c[j]];
                sums[1] += v[j + 1] * row[c[j + 1]];
                sums[2] += v[j + 2] * row[c[j + 2]];
                sums[3] += v[j + 3] * row[c[j + 3]];
            }
#ifdef WITH_A_BUG
            for (; j + 1 < k; j++) /* one too early: the last term is lost unless 4 divides k */
#else
            for (; j < k; j++)
#endif
                sums[0] += v[j] * row[c[j]];
            z[b * n_out + active[i]] += (sums[0] + sums[1]) + (sums[2] + sums[3]);
        }
    }
}

/* dx[b, c] = sum of g[b, active[i]] * values[i, j], over the (i, j) with indices[i, j] = c */
void gradient_of_x(const REAL *g, const REAL *values, const INDEX *indices, const int64_t *active,
                   REAL *dx, int64_t batch, int64_t n_in, int64_t n_out, int64_t n_active,
                   int64_t k)
{
    for (int64_t b = 0; b < batch; b++) {
        REAL *row = dx + b * n_in;
        for (int64_t c = 0; c < n_in; c++)
            row[c] = 0;
        for (int64_t i = 0; i < n_active; i++)
            for (int64_t j = 0; j < k; j++)
                row[indices[i * k + j]] += g[b * n_out + active[i]] * values[i * k + j];
    }
}

/* dvalues[i, j] = sum over b of g[b, active[i]] * x[b, indices[i, j]] */
void gradient_of_values(const REAL *g, const REAL *x, const INDEX *indices, const int64_t *active,
                        REAL *dvalues, int64_t batch, int64_t n_in, int64_t n_out,
                        int64_t n_active, int64_t k)
{
    for (int64_t i = 0; i < n_active; i++)
        for (int64_t j = 0; j < k; j++) {
            REAL sum = 0;
            for (int64_t b = 0; b < batch; b++)
                sum += g[b * n_out + active[i]] * x[b * n_in + indices[i * k + j]];
            dvalues[i * k + j] = sum;
        }
}
