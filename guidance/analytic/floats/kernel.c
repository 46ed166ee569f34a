/* Posterior mean of uint8 images under one mask per coordinate, in float32.
 *
 * The distances of an output are those of another one, its parent, plus the squares that its mask
 * has more and minus those that it has less: see shared.py. Distances are in units of log 2.
 *
 * Candidates come packed, (blocks, n, SIDE): those of a block side by side. Weights below
 * 2^-limit of the largest so far count as zero.
 *
 * Compiled by shared.py, with the vector extensions of GCC and Clang.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define SIDE 32 /* candidates of a block: two vectors */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float half __attribute__((vector_size(2 * LANES)));
typedef int32_t ihalf __attribute__((vector_size(2 * LANES)));
typedef float quarter __attribute__((vector_size(LANES)));
typedef int32_t iquarter __attribute__((vector_size(LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

static inline vec load(const uint8_t *from) {
    bytes raw;
    memcpy(&raw, from, LANES);
    return __builtin_convertvector(raw, vec);
}

static inline vec least(vec a, vec b) {
    ivec first = a < b;
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

static inline float smallest(vec a) {
    union { vec whole; half parts[2]; } x = {a};
    union { half whole; quarter parts[2]; } y;
    ihalf first = x.parts[0] < x.parts[1];
    y.whole = (half)(((ihalf)x.parts[0] & first) | ((ihalf)x.parts[1] & ~first));
    iquarter second = y.parts[0] < y.parts[1];
    quarter z = (quarter)(((iquarter)y.parts[0] & second) | ((iquarter)y.parts[1] & ~second));
    float low = z[0] < z[1] ? z[0] : z[1], high = z[2] < z[3] ? z[2] : z[3];
    return low < high ? low : high;
}

/* 2^x for x <= 0, to the last bit or two; 2^-126 below. */
static inline vec power(vec x) {
    const vec zero = {}, shift = zero + 12582912.0f, low = zero - 126.0f; /* 1.5 * 2^23 rounds */
    ivec above = x > low;
    x = (vec)(((ivec)x & above) | ((ivec)low & ~above));
    vec moved = x + shift, rest = x - (moved - shift), sum = zero + 1.5403530e-4f;
    sum = sum * rest + 1.3333558e-3f;
    sum = sum * rest + 9.6181291e-3f;
    sum = sum * rest + 5.5504109e-2f;
    sum = sum * rest + 2.4022651e-1f;
    sum = sum * rest + 6.9314718e-1f;
    sum = sum * rest + 1.0f;
    return (vec)((ivec)sum + (((ivec)moved - (ivec)shift) << 23));
}

/* Share `worker` of `workers` of the candidates; 0, or 1 without memory.
 *
 * packed:  candidates; of them [first, last) count.
 * y:       noisy images in units of the bytes, (queries, n).
 * alpha:   what squares are multiplied with.
 * order:   the outputs, parents first. parents: an output, -1 (nothing) or -2 (all squares).
 * starts:  (2 n + 1): where the coordinates that the k-th output adds begin in `list`, then where
 *          those begin that it takes away.
 * states:  (queries, n, 3): smallest distance, mass and weighted sum of bytes.
 */
int posterior(const uint8_t *packed, long first, long last, const float *y, float alpha, long n,
              long queries, const int32_t *order, const int32_t *parents, const int32_t *starts,
              const int32_t *list, float limit, float *states, long worker, long workers) {
    size_t row = SIDE * sizeof(float), side = (size_t)queries * n;
    vec *squares = aligned_alloc(64, n * row), *distances = aligned_alloc(64, n * row);
    vec *mass = aligned_alloc(64, side * sizeof(vec)), *total = aligned_alloc(64, side * sizeof(vec));
    float *best = malloc(side * sizeof(float));
    int failed = !squares || !distances || !mass || !total || !best;
    for (size_t s = 0; !failed && s < side; s++) {
        mass[s] = total[s] = (vec){};
        best[s] = INFINITY;
    }
    for (long t = first / SIDE + worker; !failed && t * SIDE < last; t += workers) {
        const uint8_t *here = packed + t * SIDE * n;
        vec bias[2] = {{}, {}};
        for (int i = 0; i < SIDE; i++)
            if (t * SIDE + i < first || t * SIDE + i >= last) bias[i / LANES][i % LANES] = INFINITY;
        for (long q = 0; q < queries; q++) {
            const float *noisy = y + q * n;
            vec all0 = {}, all1 = {};
            for (long j = 0; j < n; j++) {
                vec a = noisy[j] - load(here + j * SIDE);
                vec b = noisy[j] - load(here + j * SIDE + LANES);
                squares[2 * j] = a = a * a * alpha;
                squares[2 * j + 1] = b = b * b * alpha;
                all0 += a;
                all1 += b;
            }
            for (long k = 0; k < n; k++) {
                const int32_t *at = list + starts[2 * k], *minus = list + starts[2 * k + 1];
                const int32_t *end = list + starts[2 * k + 2];
                long m = order[k], parent = parents[k];
                vec d0 = {}, d1 = {}, e0 = {}, e1 = {};
                if (parent >= 0) d0 = distances[2 * parent], d1 = distances[2 * parent + 1];
                if (parent == -2) d0 = all0, d1 = all1;
                for (; at + 1 < minus; at += 2) {
                    d0 += squares[2 * at[0]];
                    d1 += squares[2 * at[0] + 1];
                    e0 += squares[2 * at[1]];
                    e1 += squares[2 * at[1] + 1];
                }
                if (at < minus) {
                    d0 += squares[2 * at[0]];
                    d1 += squares[2 * at[0] + 1];
                }
                for (at = minus; at + 1 < end; at += 2) {
                    d0 -= squares[2 * at[0]];
                    d1 -= squares[2 * at[0] + 1];
                    e0 -= squares[2 * at[1]];
                    e1 -= squares[2 * at[1] + 1];
                }
                if (at < end) {
                    d0 -= squares[2 * at[0]];
                    d1 -= squares[2 * at[0] + 1];
                }
                distances[2 * m] = d0 += e0;
                distances[2 * m + 1] = d1 += e1;
                d0 += bias[0];
                d1 += bias[1];
                size_t s = q * n + m;
                float low = smallest(least(d0, d1));
                if (low < best[s]) {
                    float scale = exp2f(low - best[s]);
                    mass[s] *= scale;
                    total[s] *= scale;
                    best[s] = low;
                }
                if (!(low <= best[s] + limit)) continue;
                vec w0 = power(best[s] - d0), w1 = power(best[s] - d1);
                mass[s] += w0 + w1;
                total[s] += w0 * load(here + m * SIDE) + w1 * load(here + m * SIDE + LANES);
            }
        }
    }
    for (size_t s = 0; !failed && s < side; s++) {
        double sum = 0, value = 0;
        for (int i = 0; i < LANES; i++) sum += mass[s][i], value += total[s][i];
        states[3 * s] = best[s];
        states[3 * s + 1] = (float)sum;
        states[3 * s + 2] = (float)value;
    }
    free(squares);
    free(distances);
    free(mass);
    free(total);
    free(best);
    return failed;
}
