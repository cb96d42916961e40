/* The products of product.c with AVX-512 and its byte products (VNNI), and products with bfloat16 weights.
 *
 * A step takes 64 bytes of codes: a unit. Its activations are 16-bit integers cut into a high and a low signed byte,
 * because the instruction multiplies unsigned bytes (codes) with signed ones; the two sums are joined after it.
 * A lane of the sums holds 4 bytes of codes, so that groups of 32 columns and more are whole lanes.
 */

#define UNIT 64
#define LANES 16
#define AHEAD 24576 /* bytes asked for ahead, into the second cache: into the first it is half as fast */
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    int64_t units, unit_columns, unit_bytes; /* unit_bytes: of one unit's activations */
    int8_t *bytes;                           /* (tokens, units, planes of UNIT): even high, even low, odd high, odd low */
    int32_t *sums;                           /* (tokens, units, LANES) */
    float *scales;                           /* (tokens, units) */
} Planes;

/* A token's activations: those of each unit over their largest. */
TARGET_AVX512 static void prepare_planes(const Weight *w, Planes *p, int64_t token, const void *input, int32_t kind) {
    const int64_t width = p->unit_columns, per_lane = width / LANES;
    const uint16_t *half = (const uint16_t *)input + token * w->columns;
    const float *full = (const float *)input + token * w->columns;
    for (int64_t unit = 0; unit < p->units; unit++) {
        int64_t first = unit * width, count = w->columns - first < width ? w->columns - first : width;
        float values[BLOCK] = {0};
        int32_t numbers[BLOCK], *sums = p->sums + (token * p->units + unit) * LANES;
        if (kind == BFLOAT16) for (int64_t i = 0; i < count; i++) values[i] = widen(half[first + i]);
        else memcpy(values, full + first, sizeof(float) * (size_t)count);
        p->scales[token * p->units + unit] = round_block(values, width, numbers);
        for (int64_t lane = 0; lane < LANES; lane++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < per_lane; i++) sum += numbers[lane * per_lane + i];
            sums[lane] = sum;
        }
        int8_t *to = p->bytes + (token * p->units + unit) * p->unit_bytes;
        const int64_t step = w->bits == 4 ? 2 : 1;
        for (int64_t odd = 0; odd < step; odd++, to += 2 * UNIT)
            for (int64_t i = 0; i < UNIT; i++) {
                int32_t number = numbers[step * i + odd];
                to[i] = (int8_t)((number + 128) >> 8);
                to[UNIT + i] = (int8_t)number;
            }
    }
}

/* Scales of a row as float32, and its zero points where it has some; both are followed by room for a vector. */
TARGET_AVX512 INLINE void widen_scales(const Weight *w, int64_t row, float *scales, float *zeros) {
    const int64_t at = row * w->groups;
    if (w->scale_kind == BFLOAT16)
        for (int64_t i = 0; i < w->groups; i++) scales[i] = widen(((const uint16_t *)w->scale)[at + i]);
    else
        for (int64_t i = 0; i < w->groups; i++) scales[i] = scale_at(w, row, i);
    if (w->zeros) for (int64_t i = 0; i < w->groups; i++) zeros[i] = (float)zero_at(w, row, i);
}

/* COUNT rows at a time for one token: the activations are loaded once for all of them. */
TARGET_AVX512 INLINE void rows_avx512(
    const Weight *w, const Planes *p, int64_t row, int64_t token, float *scratch, float *out, const int bits,
    const int with_zeros, const int count) {
    const int64_t row_bytes = w->columns * bits / 8, room = w->groups + LANES;
    const int64_t group = w->groups == 1 ? INT64_MAX : w->columns / w->groups, lane_columns = p->unit_columns / LANES;
    const int64_t lanes = group / lane_columns < LANES ? group / lane_columns : LANES;
    const uint8_t *codes = w->codes + row * row_bytes;
    const int8_t *bytes = p->bytes + token * p->units * p->unit_bytes;
    const int32_t *sums = p->sums + token * p->units * LANES;
    const float *scales = p->scales + token * p->units;
    const __m512i low = _mm512_set1_epi8(15), middle = _mm512_set1_epi32(with_zeros ? 0 : -(1 << (bits - 1)));
    const __m512i order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    /* Which of a unit's groups a lane belongs to: lanes is a power of two. */
    const __m512i which = _mm512_srli_epi32(order, (unsigned)__builtin_ctzll((unsigned long long)lanes));
    __m512 total[ROWS_AT_ONCE];
    for (int r = 0; r < count; r++) {
        total[r] = _mm512_setzero_ps();
        widen_scales(w, row + r, scratch + 2 * r * room, scratch + (2 * r + 1) * room);
    }
    for (int64_t unit = 0; unit < p->units; unit++) {
        const int64_t left = row_bytes - unit * UNIT, first_group = unit * p->unit_columns / group;
        const __mmask64 mask = left >= UNIT ? ~0ull : (1ull << left) - 1;
        const int8_t *at = bytes + unit * p->unit_bytes;
        const __m512i x_high = _mm512_loadu_si512(at), x_low = _mm512_loadu_si512(at + UNIT);
        const __m512i odd_high = bits == 4 ? _mm512_loadu_si512(at + 2 * UNIT) : x_high;
        const __m512i odd_low = bits == 4 ? _mm512_loadu_si512(at + 3 * UNIT) : x_low;
        const __m512i sum = _mm512_loadu_si512(sums + unit * LANES);
        const __m512i start = _mm512_mullo_epi32(sum, middle);
        const __m512 wide_sum = _mm512_cvtepi32_ps(sum), scale = _mm512_set1_ps(scales[unit]);
        for (int r = 0; r < count; r++) {
            const uint8_t *here = codes + r * row_bytes + unit * UNIT;
            _mm_prefetch((const char *)here + AHEAD, _MM_HINT_T1);
            const __m512i raw = _mm512_maskz_loadu_epi8(mask, here);
            __m512i high, small;
            if (bits == 4) {
                const __m512i even = _mm512_and_si512(raw, low);
                const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(raw, 4), low);
                high = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), even, x_high), odd, odd_high);
                small = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(start, even, x_low), odd, odd_low);
            } else {
                high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), raw, x_high);
                small = _mm512_dpbusd_epi32(start, raw, x_low);
            }
            const float *row_scales = scratch + 2 * r * room + first_group;
            __m512 value = _mm512_cvtepi32_ps(_mm512_add_epi32(small, _mm512_slli_epi32(high, 8)));
            const __m512 theirs =
                _mm512_permutexvar_ps(which, _mm512_castps128_ps512(_mm_loadu_ps(row_scales)));
            if (with_zeros) {
                const __m512i zeros = _mm512_castps_si512(_mm512_castps128_ps512(_mm_loadu_ps(row_scales + room)));
                value = _mm512_fnmadd_ps(_mm512_castsi512_ps(_mm512_permutexvar_epi32(which, zeros)), wide_sum, value);
            }
            total[r] = _mm512_fmadd_ps(value, _mm512_mul_ps(theirs, scale), total[r]);
        }
    }
    for (int r = 0; r < count; r++) out[r] = _mm512_reduce_add_ps(total[r]);
}

#define WIDE_CASE(BITS, ZEROS)                                                                                    \
    if (w->bits == BITS && (w->zeros != NULL) == ZEROS) {                                                         \
        if (count == ROWS_AT_ONCE) rows_avx512(w, p, row, token, scratch, out, BITS, ZEROS, ROWS_AT_ONCE);        \
        else for (int r = 0; r < count; r++) rows_avx512(w, p, row + r, token, scratch, out + r, BITS, ZEROS, 1); \
    }

TARGET_AVX512 static void some_rows_avx512(
    const Weight *w, const Planes *p, int64_t row, int count, int64_t token, float *scratch, float *out) {
    WIDE_CASE(4, 0)
    WIDE_CASE(4, 1)
    WIDE_CASE(8, 0)
    WIDE_CASE(8, 1)
}

/* Rows of a bfloat16 weight times one token, whose even columns stand before its odd ones, 16 and 16. */
TARGET_AVX512 INLINE void bfloat16_rows(
    const uint16_t *weight, const float *token, int64_t columns, float *out, const int count) {
    const __m512i top = _mm512_set1_epi32((int32_t)0xffff0000);
    __m512 even[ROWS_AT_ONCE], odd[ROWS_AT_ONCE];
    for (int r = 0; r < count; r++) even[r] = odd[r] = _mm512_setzero_ps();
    for (int64_t first = 0; first < columns; first += 32) {
        const __m512 x_even = _mm512_loadu_ps(token + first), x_odd = _mm512_loadu_ps(token + first + 16);
        const __mmask32 mask = columns - first >= 32 ? 0xffffffffu : (1u << (columns - first)) - 1;
        for (int r = 0; r < count; r++) {
            const uint16_t *here = weight + r * columns + first;
            _mm_prefetch((const char *)here + AHEAD, _MM_HINT_T1);
            const __m512i raw = _mm512_maskz_loadu_epi16(mask, here);
            even[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)), x_even, even[r]);
            odd[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(raw, top)), x_odd, odd[r]);
        }
    }
    for (int r = 0; r < count; r++) out[r] = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
}

TARGET_AVX512 static void some_bfloat16_rows(
    const uint16_t *weight, const float *token, int64_t columns, float *out, int count) {
    if (count == ROWS_AT_ONCE) bfloat16_rows(weight, token, columns, out, ROWS_AT_ONCE);
    else for (int r = 0; r < count; r++) bfloat16_rows(weight + r * columns, token, columns, out + r, 1);
}
