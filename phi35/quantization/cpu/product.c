/* Products of a few activation rows with weights in 4 or 8 bits, read once in their stored layout.
 *
 * Activations are turned into 16-bit integers, block by block: a block is a weight group, or BLOCK columns where a row
 * has one scale. Sums within a block are then exact integers; each is multiplied by the block's two scales in float32.
 * The rounding of an activation is at most 2^-16 of the largest of its block, less than that of bfloat16.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define X86 1
#endif

#define BLOCK 128
#define LEVELS 32639.0f /* the largest whose high byte, rounded, is a signed one */
#define ROWS_AT_ONCE 8

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, UINT8 = 3 };
enum { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

typedef struct {
    const uint8_t *codes;   /* (rows, columns * bits / 8) */
    const void *scale;      /* (rows, groups), of scale_kind */
    const float *row_scale; /* (rows) or NULL */
    const int32_t *zeros;   /* (rows * bits / 32, groups) or NULL: the middle code */
    int64_t rows, columns, groups;
    int32_t bits, scale_kind;
} Weight;

typedef struct {
    int64_t blocks, block_bytes, row_bytes, unit; /* bytes of codes; unit: bytes that one step takes */
    int64_t stride;                               /* int16 numbers of one token */
    int16_t *numbers;                             /* by token, by unit: even columns, then odd ones (4 bits) */
    int16_t *plain;                               /* one token's, in order */
    float *scales;                                /* (tokens, blocks) */
    int32_t *sums;                                /* (tokens, blocks) */
} Activations;

static float widen(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Without a branch, so that loops of it become vector instructions. */
static inline uint16_t narrow_finite(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

static uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 64); /* not a number */
    return narrow_finite(value);
}

static float from_half(uint16_t half) {
    uint32_t exponent = half >> 10 & 31, fraction = half & 1023, sign = (uint32_t)(half & 0x8000) << 16, bits;
    if (exponent == 0) {
        float value = (float)fraction * 0x1p-24f;
        return sign ? -value : value;
    }
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float scale_at(const Weight *w, int64_t row, int64_t group) {
    int64_t at = row * w->groups + group;
    if (w->scale_kind == BFLOAT16) return widen(((const uint16_t *)w->scale)[at]);
    if (w->scale_kind == FLOAT16) return from_half(((const uint16_t *)w->scale)[at]);
    return (float)((const uint8_t *)w->scale)[at];
}

static inline int32_t zero_at(const Weight *w, int64_t row, int64_t group) {
    if (!w->zeros) return 1 << (w->bits - 1);
    int32_t per_word = 32 / w->bits;
    uint32_t word = (uint32_t)w->zeros[row / per_word * w->groups + group];
    return (int32_t)(word >> (row % per_word * w->bits) & ((1u << w->bits) - 1));
}

/* A block of values as 16-bit integers over the largest of them; returns what to multiply them by. */
static inline float round_block(const float *values, int64_t count, int32_t *numbers) {
    int32_t top = 0; /* the order of sizes is that of their bits, and what is no number is the largest */
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        memcpy(&bits, values + i, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float largest;
    memcpy(&largest, &top, 4);
    float scale = largest / LEVELS, inverse = 1.0f / scale;
    int finite = isfinite(inverse) && isfinite(scale);
    if (!finite) inverse = 0.0f; /* all zero, too small to be divided by, or infinite */
    for (int64_t i = 0; i < count; i++) {
        float rounded = (values[i] * inverse + 12582912.0f) - 12582912.0f;
        numbers[i] = (int32_t)rounded;
    }
    if (finite) return scale;
    if (top < 0x7f800000) return 0.0f;
    memset(numbers, 0, sizeof(int32_t) * (size_t)count);
    numbers[0] = 1; /* infinite or no number: so is the result */
    return scale;
}

/* One token's activations, in the order in which the kernels meet the codes. */
static void prepare(const Weight *w, Activations *a, int64_t token, const void *input, int32_t kind) {
    const int64_t per_byte = 8 / w->bits, width = a->block_bytes * per_byte, unit = a->unit;
    int16_t *numbers = a->numbers + token * a->stride, *plain = a->plain;
    const uint16_t *half = (const uint16_t *)input + token * w->columns;
    const float *full = (const float *)input + token * w->columns;
    for (int64_t block = 0; block < a->blocks; block++) {
        int64_t first = block * width, count = w->columns - first < width ? w->columns - first : width;
        float values[BLOCK];
        int32_t rounded[BLOCK], sum = 0;
        if (kind == BFLOAT16) for (int64_t i = 0; i < count; i++) values[i] = widen(half[first + i]);
        else memcpy(values, full + first, sizeof(float) * (size_t)count);
        a->scales[token * a->blocks + block] = round_block(values, count, rounded);
        for (int64_t i = 0; i < count; i++) {
            plain[first + i] = (int16_t)rounded[i];
            sum += rounded[i];
        }
        a->sums[token * a->blocks + block] = sum;
    }
    if (w->bits == 8) memcpy(numbers, plain, sizeof(int16_t) * (size_t)w->columns);
    else for (int64_t start = 0; start < a->stride; start += 2 * unit)
        for (int64_t i = 0; i < unit; i++) {
            numbers[start + i] = plain[start + 2 * i];
            numbers[start + unit + i] = plain[start + 2 * i + 1];
        }
}

static void row_portable(const Weight *w, const Activations *a, int64_t row, int64_t token, float *out) {
    const int64_t per_byte = 8 / w->bits, unit = a->unit;
    const uint8_t *codes = w->codes + row * a->row_bytes;
    const int16_t *numbers = a->numbers + token * a->stride;
    float total = 0.0f;
    for (int64_t block = 0; block < a->blocks; block++) {
        int64_t group = w->groups == 1 ? 0 : block;
        int64_t first = block * a->block_bytes, end = first + a->block_bytes;
        if (end > a->row_bytes) end = a->row_bytes;
        int32_t sum = -zero_at(w, row, group) * a->sums[token * a->blocks + block];
        for (int64_t start = first; start < end; start += unit) {
            const int16_t *even = numbers + start * per_byte, *odd = even + unit;
            int64_t count = end - start < unit ? end - start : unit;
            if (w->bits == 8) for (int64_t i = 0; i < count; i++) sum += codes[start + i] * even[i];
            else for (int64_t i = 0; i < count; i++)
                sum += (codes[start + i] & 15) * even[i] + (codes[start + i] >> 4) * odd[i];
        }
        total += (float)sum * (scale_at(w, row, group) * a->scales[token * a->blocks + block]);
    }
    *out = total;
}

#ifdef X86
__attribute__((target("avx2,fma"))) static void row_avx2(
    const Weight *w, const Activations *a, int64_t row, int64_t token, float *out) {
    const uint8_t *codes = w->codes + row * a->row_bytes;
    const __m256i low = _mm256_set1_epi16(15);
    __m256 total = _mm256_setzero_ps();
    for (int64_t block = 0; block < a->blocks; block++) {
        int64_t group = w->groups == 1 ? 0 : block;
        int64_t first = block * a->block_bytes, end = first + a->block_bytes;
        if (end > a->row_bytes) end = a->row_bytes;
        int32_t start_at = -zero_at(w, row, group) * a->sums[token * a->blocks + block];
        __m256i sum = _mm256_zextsi128_si256(_mm_cvtsi32_si128(start_at));
        for (int64_t byte = first; byte < end; byte += 16) {
            uint8_t rest[16] = {0};
            const uint8_t *here = codes + byte;
            if (byte + 16 > end) here = memcpy(rest, here, (size_t)(end - byte));
            __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)here));
            const int16_t *at = a->numbers + token * a->stride + byte * (8 / w->bits);
            __m256i even = _mm256_loadu_si256((const __m256i *)at);
            if (w->bits == 8) {
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(wide, even));
                continue;
            }
            __m256i odd = _mm256_loadu_si256((const __m256i *)(at + 16));
            __m256i even_part = _mm256_madd_epi16(_mm256_and_si256(wide, low), even);
            __m256i odd_part = _mm256_madd_epi16(_mm256_srli_epi16(wide, 4), odd);
            sum = _mm256_add_epi32(sum, _mm256_add_epi32(even_part, odd_part));
        }
        __m256 both = _mm256_set1_ps(scale_at(w, row, group) * a->scales[token * a->blocks + block]);
        total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), both, total);
    }
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    *out = _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

#include "product_avx512.h"
#endif

/* One row of the weight itself, of kind; inlined into functions that may use wider instructions. */
static inline __attribute__((always_inline)) void restore_row(
    const Weight *w, int64_t row, int32_t kind, const int bits, float *values, void *out) {
    const int64_t bytes = w->columns * bits / 8, per_group = w->columns / w->groups * bits / 8;
    const uint8_t *codes = w->codes + row * bytes;
    for (int64_t group = 0; group < w->groups; group++) {
        const float scale = scale_at(w, row, group) * (w->row_scale ? w->row_scale[row] : 1.0f);
        const int32_t zero = zero_at(w, row, group);
        const uint8_t *here = codes + group * per_group;
        float *to = values + group * (w->columns / w->groups);
        if (bits == 8) for (int64_t i = 0; i < per_group; i++) to[i] = (float)(here[i] - zero) * scale;
        else for (int64_t i = 0; i < per_group; i++) {
            to[2 * i] = (float)((here[i] & 15) - zero) * scale;
            to[2 * i + 1] = (float)((here[i] >> 4) - zero) * scale;
        }
    }
    uint16_t *half = out;
    if (kind == BFLOAT16) for (int64_t i = 0; i < w->columns; i++) half[i] = narrow_finite(values[i]);
}

#define RESTORE(NAME, TARGET)                                                                              \
    TARGET static void NAME(const Weight *w, int64_t row, int32_t kind, float *values, void *out) {        \
        if (w->bits == 4) restore_row(w, row, kind, 4, values, out);                                       \
        else restore_row(w, row, kind, 8, values, out);                                                    \
    }

RESTORE(restore_portable, )
#ifdef X86
RESTORE(restore_avx2, __attribute__((target("avx2"))))
RESTORE(restore_avx512, TARGET_AVX512)
#endif

/* Rows first to first + count of the weight, of kind, into out (count, columns). Returns 1 where memory is lacking. */
int32_t phi35_restore(
    const uint8_t *codes, const void *scale, const float *row_scale, const int32_t *zeros, void *out, int64_t first,
    int64_t count, int64_t columns, int64_t groups, int32_t bits, int32_t scale_kind, int32_t kind, int32_t threads,
    int32_t variant) {
    Weight w = {codes, scale, row_scale, zeros, first + count, columns, groups, bits, scale_kind};
    int32_t failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *buffer = kind == BFLOAT16 ? malloc(sizeof(float) * (size_t)columns) : NULL;
        failed = kind == BFLOAT16 && !buffer;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < count; row++) {
            void *here = (char *)out + row * columns * (kind == BFLOAT16 ? 2 : 4);
            float *values = kind == BFLOAT16 ? buffer : here;
            if (failed) continue;
#ifdef X86
            if (variant == AVX512) restore_avx512(&w, first + row, kind, values, here);
            else if (variant == AVX2) restore_avx2(&w, first + row, kind, values, here);
            else
#endif
                restore_portable(&w, first + row, kind, values, here);
        }
        free(buffer);
    }
    (void)variant;
    return failed;
}

int32_t phi35_variant(void) {
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

/* Tasks that a thread takes at once: few, so that all threads end together though other work may hold one up. */
static inline int64_t chunk_of(int64_t tasks, int64_t threads) {
    const int64_t share = tasks / (threads * 32);
    return share > 4 ? share : 4;
}

/* Scaled, biased sums of count rows as numbers of kind. */
static void put(
    const float *sums, const float *row_scale, const void *bias, void *out, int64_t row, int count, int64_t offset,
    int32_t kind) {
    for (int r = 0; r < count; r++) {
        int64_t at = row + r;
        float value = sums[r];
        if (row_scale) value *= row_scale[at];
        if (bias) value += kind == BFLOAT16 ? widen(((const uint16_t *)bias)[at]) : ((const float *)bias)[at];
        if (kind == BFLOAT16) ((uint16_t *)out)[offset + at] = narrow(value);
        else ((float *)out)[offset + at] = value;
    }
}

static int32_t narrow_product(
    const Weight *w, const void *input, const void *bias, void *out, int64_t tokens, int32_t kind, int32_t threads,
    int32_t variant) {
    int64_t per_byte = 8 / w->bits, group = w->groups == 1 ? BLOCK : w->columns / w->groups;
    Activations a;
    a.row_bytes = w->columns / per_byte;
    a.block_bytes = group / per_byte;
    a.blocks = (w->columns + group - 1) / group;
    a.unit = 16;
    a.stride = (a.row_bytes + 63) / 64 * 64 * per_byte;
    size_t held = (size_t)(tokens * a.blocks);
    a.numbers = calloc((size_t)((tokens + 1) * a.stride), sizeof(int16_t));
    a.scales = malloc(held * sizeof(float));
    a.sums = malloc(held * sizeof(int32_t));
    int32_t failed = !a.numbers || !a.scales || !a.sums;
    if (!failed) {
        a.plain = a.numbers + tokens * a.stride;
        for (int64_t token = 0; token < tokens; token++) prepare(w, &a, token, input, kind);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t row = 0; row < w->rows; row++)
            for (int64_t token = 0; token < tokens; token++) {
                float sum;
#ifdef X86
                if (variant == AVX2) row_avx2(w, &a, row, token, &sum);
                else
#endif
                    row_portable(w, &a, row, token, &sum);
                put(&sum, w->row_scale, bias, out, row, 1, token * w->rows, kind);
            }
    }
    (void)variant;
    free(a.numbers);
    free(a.scales);
    free(a.sums);
    return failed;
}

#ifdef X86
static int32_t wide_product(
    const Weight *w, const void *input, const void *bias, void *out, int64_t tokens, int32_t kind, int32_t threads) {
    Planes p;
    void *memory = malloc(size_planes(w, &p, tokens));
    int32_t failed = !memory;
    place_planes(&p, tokens, memory);
    if (!failed) {
        for (int64_t token = 0; token < tokens; token++) prepare_planes(w, &p, token, input, kind);
        int64_t tasks = (w->rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
#pragma omp parallel num_threads(threads) reduction(| : failed)
        {
            float *scratch = malloc(sizeof(float) * (size_t)(ROWS_AT_ONCE * p.room));
            failed = !scratch;
#pragma omp for schedule(dynamic, chunk_of(tasks, threads))
            for (int64_t task = 0; task < tasks; task++) {
                int64_t row = task * ROWS_AT_ONCE;
                int count = w->rows - row < ROWS_AT_ONCE ? (int)(w->rows - row) : ROWS_AT_ONCE;
                for (int64_t token = 0; scratch && token < tokens; token++) {
                    float part[ROWS_AT_ONCE];
                    some_rows_avx512(w, &p, row, count, token, scratch, part);
                    put(part, w->row_scale, bias, out, row, count, token * w->rows, kind);
                }
            }
            free(scratch);
        }
    }
    free(memory);
    return failed;
}
#endif

/* out (tokens, rows) = input (tokens, columns) times the weight, plus bias (rows) or NULL; all three of one kind.
 * Returns 0, or 1 where memory is lacking. */
int32_t phi35_product(
    const void *input, const uint8_t *codes, const void *scale, const float *row_scale, const int32_t *zeros,
    const void *bias, void *out, int64_t tokens, int64_t rows, int64_t columns, int64_t groups, int32_t bits,
    int32_t scale_kind, int32_t kind, int32_t threads, int32_t variant) {
    Weight w = {codes, scale, row_scale, zeros, rows, columns, groups, bits, scale_kind};
#ifdef X86
    if (variant == AVX512) return wide_product(&w, input, bias, out, tokens, kind, threads);
#endif
    return narrow_product(&w, input, bias, out, tokens, kind, threads, variant);
}

/* The same with a bfloat16 weight (rows, columns), all of bfloat16. Returns 2 where the processor lacks AVX-512. */
int32_t phi35_bfloat16_product(
    const uint16_t *input, const uint16_t *weight, const uint16_t *bias, uint16_t *out, int64_t tokens, int64_t rows,
    int64_t columns, int32_t threads) {
#ifdef X86
    int64_t stride = (columns + 31) / 32 * 32, tasks = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    float *wide = calloc((size_t)(tokens * stride), sizeof(float));
    if (!wide) return 1;
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t i = 0; i < columns; i++)
            wide[token * stride + i / 32 * 32 + i % 2 * 16 + i % 32 / 2] = widen(input[token * columns + i]);
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk_of(tasks, threads))
    for (int64_t task = 0; task < tasks; task++) {
        int64_t row = task * ROWS_AT_ONCE;
        int count = rows - row < ROWS_AT_ONCE ? (int)(rows - row) : ROWS_AT_ONCE;
        for (int64_t token = 0; token < tokens; token++) {
            float part[ROWS_AT_ONCE];
            some_bfloat16_rows(weight + row * columns, wide + token * stride, columns, part, count);
            put(part, NULL, bias, out, row, count, token * rows, BFLOAT16);
        }
    }
    free(wide);
    return 0;
#else
    return 2;
#endif
}

#ifdef X86
#include "step_avx512.h"
#endif

/* A decoding step of all layers; numbers: a Step, whose fields are all of 64 bits. Returns 0; 1 where memory is lacking,
 * 2 where the processor lacks AVX-512. */
int32_t phi35_step(const int64_t *numbers, float eps, float scale) {
#ifdef X86
    Step step;
    if (phi35_variant() != AVX512) return 2;
    memcpy(&step, numbers, sizeof step);
    return decode_step(&step, eps, scale);
#else
    (void)numbers, (void)eps, (void)scale;
    return 2;
#endif
}
