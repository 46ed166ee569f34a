/* Posterior mean of uint8 images under one mask per coordinate, in integer products.
 *
 * With u the stored bytes and Y = 127.5 (y + 1) the noisy image in the same units, logits are
 *
 *     alpha * sum_j M_mj (2 Y_j u_ij - u_ij^2) / ln 2,   alpha = 1 / (2 (127.5 sigma)^2),
 *
 * up to a constant per coordinate m. Y is given in signed digits to the base 256, squares in two
 * bytes: every sum over j is then a product of bytes with 32-bit sums, without any rounding.
 * Weights and weighted sums are float32.
 *
 * A tile is 16 outputs by 16 candidates. Candidates come packed, (tiles, chunks, 16, 16, 4): chunk
 * of 64 coordinates, four neighbouring coordinates of each candidate side by side, as the
 * instructions want them. Chunks in which no output of a tile compares anything are left out.
 *
 * Compiled by build.py, for processors with AVX-512 and AMX.
 */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 16                    /* outputs and candidates of a tile */
#define CHUNK 64                   /* coordinates in a chunk */
#define TILE (SIDE * SIDE)         /* sums in a tile */
#define PACKED (SIDE * CHUNK)      /* bytes of a packed chunk */
#define DIGITS 3                   /* at most */
#define CACHE (768 * 1024)         /* bytes of candidates and squares in a block */
#define RESCALE 24.0f              /* a logit (base 2) so far above the reference moves it */
#define NOTHING (-60.0f)           /* weights below 2^NOTHING of the reference count as zero */
#define PERMIT 0x1023              /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18               /* XFEATURE_XTILEDATA */

struct state {                     /* of the softmax of one output */
    double reference;
    int fresh;                     /* nothing has been taken in */
    float mass[SIDE], total[SIDE]; /* per candidate of a tile, relative to 2^reference */
};

struct config {                    /* of the tile registers */
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Whether the system lets this process use tile registers. */
int permit_tiles(void) {
    return syscall(SYS_arch_prctl, PERMIT, TILE_DATA) == 0;
}

static void configure(void) {
    struct config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = SIDE;
    }
    _tile_loadconfig(&config);
}

/* Sums of left sides a, (planes, 16, stride) signed bytes, with two right sides of packed
 * candidates, into sums[planes][2][TILE]. Only the chunks listed count. */
static void multiply(const int8_t *a, int planes, long stride, const uint8_t *b0,
                     const uint8_t *b1, const int *chunks, int used, int32_t *sums) {
    __asm__ volatile("" ::: "memory"); /* GCC's tile loads do not say that they read memory */
    for (int p = 0; p < planes; p += 2) {
        const int8_t *a0 = a + p * SIDE * stride, *a1 = a0 + SIDE * stride;
        int pair = p + 1 < planes;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int i = 0; i < used; i++) {
            long left = (long)chunks[i] * CHUNK, right = (long)chunks[i] * PACKED;
            _tile_loadd(4, a0 + left, stride);
            _tile_loadd(6, b0 + right, 64);
            _tile_loadd(7, b1 + right, 64);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            if (pair) {
                _tile_loadd(5, a1 + left, stride);
                _tile_dpbsud(2, 5, 6);
                _tile_dpbsud(3, 5, 7);
            }
        }
        _tile_stored(0, sums + 2 * p * TILE, 64);
        _tile_stored(1, sums + (2 * p + 1) * TILE, 64);
        if (pair) {
            _tile_stored(2, sums + (2 * p + 2) * TILE, 64);
            _tile_stored(3, sums + (2 * p + 3) * TILE, 64);
        }
    }
}

/* High and low bytes of the squares of packed bytes. */
static void square(const uint8_t *packed, long bytes, uint8_t *high, uint8_t *low) {
    for (long i = 0; i < bytes; i += 32) {
        __m512i u = _mm512_cvtepu8_epi16(_mm256_load_si256((const __m256i *)(packed + i)));
        __m512i s = _mm512_mullo_epi16(u, u);
        _mm256_store_si256((__m256i *)(high + i), _mm512_cvtepi16_epi8(_mm512_srli_epi16(s, 8)));
        _mm256_store_si256((__m256i *)(low + i), _mm512_cvtepi16_epi8(s));
    }
}

/* 2^x for -60 <= x <= 24, to the last bit or two of float32. */
static __m512 power(__m512 x) {
    static const float taylor[] = {1.5252734e-5f, 1.5403530e-4f, 1.3333558e-3f, 9.6181291e-3f,
                                   5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(x, whole), sum = _mm512_set1_ps(taylor[0]);
    for (int i = 1; i < 8; i++) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(taylor[i]));
    return _mm512_scalef_ps(sum, whole);
}

/* Eight logits less a reference. Sums of digit p lie at sums + p * 2 * TILE. */
static inline __attribute__((always_inline)) __m512d exactly(
    const int32_t *sums, int planes, const int32_t *squares, const double *factors,
    double reference) {
    __m512d l = _mm512_fmadd_pd(_mm512_set1_pd(factors[planes]),
                                _mm512_cvtepi32_pd(_mm256_load_si256((const __m256i *)squares)),
                                _mm512_set1_pd(-reference));
    for (int p = planes - 1; p >= 0; p--) {
        const __m256i *at = (const __m256i *)(sums + p * 2 * TILE);
        l = _mm512_fmadd_pd(_mm512_set1_pd(factors[p]),
                            _mm512_cvtepi32_pd(_mm256_load_si256(at)), l);
    }
    return l;
}

/* Sixteen logits less a reference, which cancels in double precision. */
static inline __attribute__((always_inline)) __m512 relative(
    const int32_t *sums, int planes, const int32_t *squares, const double *factors,
    double reference) {
    __m512d low = exactly(sums, planes, squares, factors, reference);
    __m512d high = exactly(sums + 8, planes, squares + 8, factors, reference);
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)),
                              _mm512_cvtpd_ps(high), 1);
}

/* The largest of sixteen logits, those that count: float32 would be off by more than NOTHING where
 * logits are billions. */
static inline __attribute__((always_inline)) double largest(
    const int32_t *sums, int planes, const int32_t *squares, const double *factors,
    __mmask16 valid) {
    const __m512d never = _mm512_set1_pd(-INFINITY);
    __m512d low = exactly(sums, planes, squares, factors, 0);
    __m512d high = exactly(sums + 8, planes, squares + 8, factors, 0);
    low = _mm512_mask_mov_pd(never, (__mmask8)valid, low);
    high = _mm512_mask_mov_pd(never, (__mmask8)(valid >> 8), high);
    return _mm512_reduce_max_pd(_mm512_max_pd(low, high));
}

/* Fold two tiles of candidates into the softmax of their outputs.
 *
 * sums, squares: of the first tile; the second one's follow. factors: of the digits, then of the
 * squares. values: the packed candidates of each. first: number of the first output. valid: which
 * candidates count.
 */
static inline __attribute__((always_inline)) void fold(
    const int32_t *sums, int planes, const int32_t *squares, const double *factors,
    const uint8_t *const values[2], long first, long outputs, const __mmask16 valid[2],
    struct state *states) {
    const __m512 never = _mm512_set1_ps(-INFINITY), limit = _mm512_set1_ps(RESCALE);
    for (int m = 0; m < SIDE && first + m < outputs; m++) {
        struct state *state = states + m;
        __m512 x[2];
        for (int c = 0; c < 2; c++)
            x[c] = _mm512_mask_mov_ps(never, valid[c],
                                      relative(sums + c * TILE + m * SIDE, planes,
                                               squares + c * TILE + m * SIDE, factors,
                                               state->reference));
        __m512 high = _mm512_max_ps(x[0], x[1]);
        if (state->fresh || _mm512_cmp_ps_mask(high, limit, _CMP_GT_OQ)) {
            double reference = -INFINITY;
            for (int c = 0; c < 2; c++)
                reference = fmax(reference, largest(sums + c * TILE + m * SIDE, planes,
                                                    squares + c * TILE + m * SIDE, factors,
                                                    valid[c]));
            if (reference == -INFINITY) continue; /* no candidate of these counts */
            float shift = (float)(state->reference - reference);
            __m512 scale = _mm512_set1_ps(state->fresh ? 0 : exp2f(shift));
            state->fresh = 0;
            state->reference = reference;
            _mm512_storeu_ps(state->mass, _mm512_mul_ps(_mm512_loadu_ps(state->mass), scale));
            _mm512_storeu_ps(state->total, _mm512_mul_ps(_mm512_loadu_ps(state->total), scale));
            for (int c = 0; c < 2; c++)
                x[c] = _mm512_mask_mov_ps(never, valid[c],
                                          relative(sums + c * TILE + m * SIDE, planes,
                                                   squares + c * TILE + m * SIDE, factors,
                                                   state->reference));
            high = _mm512_max_ps(x[0], x[1]);
        }
        const __m512 nothing = _mm512_set1_ps(NOTHING);
        if (!_mm512_cmp_ps_mask(high, nothing, _CMP_GE_OQ)) continue;
        long at = first + m, place = at / CHUNK * PACKED + at % CHUNK / 4 * 64;
        __m128i shift = _mm_cvtsi32_si128(8 * (int)(at % 4));
        __m512 mass = _mm512_loadu_ps(state->mass), total = _mm512_loadu_ps(state->total);
        for (int c = 0; c < 2; c++) {
            __mmask16 counts = _mm512_cmp_ps_mask(x[c], nothing, _CMP_GE_OQ);
            __m512 weight = _mm512_maskz_mov_ps(counts, power(x[c]));
            __m512i four = _mm512_load_si512(values[c] + place);
            __m512i byte = _mm512_and_si512(_mm512_srl_epi32(four, shift),
                                            _mm512_set1_epi32(255));
            mass = _mm512_add_ps(mass, weight);
            total = _mm512_fmadd_ps(weight, _mm512_cvtepi32_ps(byte), total);
        }
        _mm512_storeu_ps(state->mass, mass);
        _mm512_storeu_ps(state->total, total);
    }
}

/* Numbers of the chunks in which any of 16 rows of a mask is not zero; how many. */
static int list_chunks(const uint8_t *rows, long stride, int *list) {
    int used = 0;
    for (long c = 0; c < stride / CHUNK; c++) {
        __m512i any = _mm512_setzero_si512();
        for (int m = 0; m < SIDE; m++)
            any = _mm512_or_si512(any, _mm512_loadu_si512(rows + m * stride + c * CHUNK));
        if (_mm512_test_epi8_mask(any, any)) list[used++] = (int)c;
    }
    return used;
}

/* Left sides (planes, 16, stride): digits (planes, stride) where a row of the mask is not zero. */
static void select_digits(const uint8_t *rows, const int8_t *digits, int planes, long stride,
                          const int *chunks, int used, int8_t *left) {
    for (int p = 0; p < planes; p++)
        for (int m = 0; m < SIDE; m++)
            for (int i = 0; i < used; i++) {
                long at = (long)chunks[i] * CHUNK;
                __m512i on = _mm512_loadu_si512(rows + m * stride + at);
                __m512i digit = _mm512_loadu_si512(digits + p * stride + at);
                _mm512_store_si512(left + (p * SIDE + m) * stride + at,
                                   _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(on, on), digit));
            }
}

/* Which of the 16 candidates of a tile, the first of them `number`, lie in [first, last). */
static __mmask16 candidates_in(long number, long first, long last) {
    __mmask16 valid = 0xffff;
    if (number >= last || number + SIDE <= first) return 0;
    if (number < first) valid &= 0xffff << (first - number);
    if (number + SIDE > last) valid &= 0xffff >> (number + SIDE - last);
    return valid;
}

/* Weighted mean of one output. */
static float mean(const struct state *state) {
    double mass = 0, total = 0;
    for (int i = 0; i < SIDE; i++) {
        mass += state->mass[i];
        total += state->total[i];
    }
    return (float)(total / mass);
}

/* Share `worker` of `workers` of the posterior means of several queries; 0, or 1 without memory.
 *
 * packed:  candidates (tiles, chunks, 16, 16, 4), of which [first, last) count; 64-byte aligned.
 * mask:    0 or 1, (16 * groups, stride), padded with zeros; stride = 64 * chunks.
 * digits:  (queries, planes, stride), the lowest digit first, padded with zeros.
 * factors: (queries, planes + 1): of each digit's sums and of the sums of squares.
 * out:     (queries, outputs), in bytes' units.
 */
int posterior(const uint8_t *packed, long first, long last, const uint8_t *mask,
              const int8_t *digits, const double *factors, float *out, long outputs, long stride,
              long queries, int planes, long worker, long workers) {
    long groups = (outputs + SIDE - 1) / SIDE, chunks = stride / CHUNK;
    long own = worker < groups ? (groups - worker + workers - 1) / workers : 0;
    long candidate_bytes = SIDE * stride;
    long block = CACHE / (3 * candidate_bytes) / 2 * 2;
    if (block < 2) block = 2;
    if (!own) return 0;
    struct state *states = malloc((size_t)own * queries * SIDE * sizeof(struct state));
    int *lists = malloc((size_t)own * (chunks + 1) * sizeof(int));
    uint8_t *squares = aligned_alloc(64, 2 * block * candidate_bytes);
    int8_t *left = aligned_alloc(64, DIGITS * SIDE * stride);
    int32_t *square_sums = aligned_alloc(64, (block + 1) * TILE * sizeof(int32_t));
    int32_t *sums = aligned_alloc(64, (DIGITS + 1) * 2 * TILE * sizeof(int32_t));
    int failed = !states || !lists || !squares || !left || !square_sums || !sums;
    if (!failed) configure();
    for (long g = 0; !failed && g < own; g++) {
        int *list = lists + g * (chunks + 1); /* how many, then which */
        list[0] = list_chunks(mask + (worker + g * workers) * SIDE * stride, stride, list + 1);
    }
    for (long s = 0; !failed && s < own * queries * SIDE; s++) {
        memset(&states[s], 0, sizeof states[s]);
        states[s].fresh = 1;
    }
    long end = (last + SIDE - 1) / SIDE;
    for (long start = first / SIDE; !failed && start < end; start += block) {
        long count = end - start < block ? end - start : block;
        const uint8_t *here = packed + start * candidate_bytes;
        uint8_t *high = squares, *low = squares + block * candidate_bytes;
        square(here, count * candidate_bytes, high, low);
        for (long g = 0; g < own; g++) {
            long group = worker + g * workers;
            const uint8_t *rows = mask + group * SIDE * stride;
            const int *list = lists + g * (chunks + 1) + 1;
            int used = list[-1];
            for (long t = 0; t < count; t++) {
                multiply((const int8_t *)rows, 1, stride, high + t * candidate_bytes,
                         low + t * candidate_bytes, list, used, sums);
                for (int i = 0; i < TILE; i++)
                    square_sums[t * TILE + i] = 256 * sums[i] + sums[TILE + i];
            }
            for (long q = 0; q < queries; q++) {
                select_digits(rows, digits + q * planes * stride, planes, stride, list, used,
                              left);
                for (long t = 0; t < count; t += 2) {
                    const uint8_t *b0 = here + t * candidate_bytes;
                    const uint8_t *b[2] = {b0, t + 1 < count ? b0 + candidate_bytes : b0};
                    long number = (start + t) * SIDE;
                    const __mmask16 valid[2] = {
                        candidates_in(number, first, last),
                        t + 1 < count ? candidates_in(number + SIDE, first, last) : 0};
                    multiply(left, planes, stride, b[0], b[1], list, used, sums);
                    const double *f = factors + q * (planes + 1);
                    const int32_t *e = square_sums + t * TILE;
                    struct state *to = states + (g * queries + q) * SIDE;
                    if (planes == 2)
                        fold(sums, 2, e, f, b, group * SIDE, outputs, valid, to);
                    else
                        fold(sums, 3, e, f, b, group * SIDE, outputs, valid, to);
                }
            }
        }
    }
    for (long g = 0; !failed && g < own; g++)
        for (long q = 0; q < queries; q++)
            for (int m = 0; m < SIDE; m++) {
                long at = (worker + g * workers) * SIDE + m;
                if (at < outputs)
                    out[q * outputs + at] = mean(states + (g * queries + q) * SIDE + m);
            }
    if (!failed) _tile_release();
    free(states);
    free(lists);
    free(squares);
    free(left);
    free(square_sums);
    free(sums);
    return failed;
}
