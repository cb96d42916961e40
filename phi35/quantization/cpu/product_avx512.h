/* The AVX-512 way (VNNI): included by product.c, where it has declared its weights.
 *
 * A step takes 64 bytes of codes: a unit. Its activations are 16-bit integers cut into a high and a low signed byte,
 * because the instruction multiplies unsigned bytes (codes) with signed ones; the two sums are joined after it.
 * Each unit has one, two or four slots: columns of one group, so that a slot has one scale, that of the weight times
 * that of the unit's activations. What the zero points take off follows from the sums of the activations of each slot,
 * once for a row.
 */

#define UNIT 64
#define LANES 16
#define AHEAD 16384 /* bytes at least asked for ahead, into the second cache: into the first it is half as fast */
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    int64_t units, unit_columns, unit_bytes; /* unit_bytes: of one unit's activations */
    int64_t unit_slots, slots, room;         /* slots of a unit and of a row; room: slots, up to whole vectors */
    int32_t shift;                           /* slot >> shift is its group */
    int8_t *bytes;                           /* (tokens, units, planes of UNIT): even high, even low, odd high, odd low */
    float *sums, *scales;                    /* (tokens, room): of the activations of a slot */
} Planes;

/* The sizes of a weight's activations; returns the bytes that their numbers take for so many tokens. */
static size_t size_planes(const Weight *w, Planes *p, int64_t tokens) {
    const int64_t group = w->columns / w->groups;
    p->unit_columns = UNIT * 8 / w->bits;
    p->units = (w->columns + p->unit_columns - 1) / p->unit_columns;
    p->unit_bytes = 2 * p->unit_columns;
    p->unit_slots = w->groups == 1 || group >= p->unit_columns ? 1 : p->unit_columns / group;
    p->slots = p->units * p->unit_slots;
    p->shift = w->groups == 1 ? 31 : group > p->unit_columns ? __builtin_ctzll((uint64_t)(group / p->unit_columns)) : 0;
    p->room = (p->slots + LANES - 1) / LANES * LANES;
    return (size_t)(tokens * (p->units * p->unit_bytes + 2 * p->room * (int64_t)sizeof(float)));
}

/* Places the numbers in memory of that size. */
static void place_planes(Planes *p, int64_t tokens, void *memory) {
    p->bytes = memory;
    p->sums = (float *)(p->bytes + tokens * p->units * p->unit_bytes);
    p->scales = p->sums + tokens * p->room;
}

/* A unit's activations, beyond its columns zero: over their largest, as high and low bytes. Returns their scale. */
TARGET_AVX512 INLINE float round_unit(const __m512 *values, const int bits, int8_t *to, int32_t *sums) {
    const int vectors = UNIT * 8 / bits / LANES;
    const __m512i size = _mm512_set1_epi32(0x7fffffff), half = _mm512_set1_epi32(128);
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    __m512i top = _mm512_setzero_si512(), numbers[8];
    for (int i = 0; i < vectors; i++) top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(values[i]), size));
    const int32_t most = _mm512_reduce_max_epi32(top); /* the order of sizes is that of their bits */
    float largest;
    memcpy(&largest, &most, 4);
    const float scale = largest / LEVELS, inverse = 1.0f / scale;
    const int finite = isfinite(inverse) && isfinite(scale);
    for (int i = 0; i < vectors; i++)
        numbers[i] = finite ? _mm512_cvtps_epi32(_mm512_mul_ps(values[i], _mm512_set1_ps(inverse)))
                            : _mm512_setzero_si512(); /* all zero, too small to be divided by, or infinite */
    /* Infinite or no number: so is the result. */
    if (most >= 0x7f800000) numbers[0] = _mm512_maskz_set1_epi32(1, 1);
    for (int i = 0; i < vectors / 2; i++)
        sums[i] = _mm512_reduce_add_epi32(_mm512_add_epi32(numbers[2 * i], numbers[2 * i + 1]));
    if (bits == 4) {
        __m512i apart[8];
        for (int i = 0; i < 4; i++) {
            apart[i] = _mm512_permutex2var_epi32(numbers[2 * i], even, numbers[2 * i + 1]);
            apart[4 + i] = _mm512_permutex2var_epi32(numbers[2 * i], odd, numbers[2 * i + 1]);
        }
        for (int i = 0; i < 8; i++) numbers[i] = apart[i];
    }
    for (int i = 0; i < vectors; i++) {
        int8_t *here = to + i / 4 * 2 * UNIT + i % 4 * LANES;
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(numbers[i], half), 8);
        _mm_storeu_si128((__m128i *)here, _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128((__m128i *)(here + UNIT), _mm512_cvtepi32_epi8(numbers[i]));
    }
    return finite || most >= 0x7f800000 ? scale : 0.0f;
}

/* LANES activations of either kind as float32, zeros where the mask has none. */
TARGET_AVX512 INLINE __m512 load_values(const void *input, int64_t at, __mmask16 mask, int32_t kind) {
    if (kind == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float *)input + at);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)input + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __mmask16 lanes_of(int64_t left) { return left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1); }

/* Units first to last of a token's activations. */
TARGET_AVX512 INLINE void prepare_units(
    const Weight *w, Planes *p, int64_t token, const void *input, int32_t kind, const int bits, int64_t first,
    int64_t last) {
    const int64_t width = UNIT * 8 / bits;
    for (int64_t unit = first; unit < last; unit++) {
        const int64_t start = unit * width, slot = token * p->room + unit * p->unit_slots;
        __m512 values[8];
        int32_t sums[4];
        for (int i = 0; i < width / LANES; i++)
            values[i] = load_values(
                input, token * w->columns + start + i * LANES, lanes_of(w->columns - start - i * LANES), kind);
        const float scale = round_unit(values, bits, p->bytes + (token * p->units + unit) * p->unit_bytes, sums);
        const int64_t per_slot = width / 32 / p->unit_slots;
        for (int64_t s = 0; s < p->unit_slots; s++) {
            int32_t sum = 0;
            for (int64_t i = 0; i < per_slot; i++) sum += sums[s * per_slot + i];
            p->sums[slot + s] = (float)sum;
            p->scales[slot + s] = scale;
        }
    }
}

/* A token's activations: those of each unit over their largest. */
TARGET_AVX512 static void prepare_planes(const Weight *w, Planes *p, int64_t token, const void *input, int32_t kind) {
    for (int64_t slot = p->slots; slot < p->room; slot++)
        p->sums[token * p->room + slot] = p->scales[token * p->room + slot] = 0.0f;
    if (w->bits == 4) prepare_units(w, p, token, input, kind, 4, 0, p->units);
    else prepare_units(w, p, token, input, kind, 8, 0, p->units);
}

/* A row's scales from a group on as float32: as many as a vector holds, zeros beyond the last. */
TARGET_AVX512 INLINE __m512 load_scales(const Weight *w, int64_t row, int64_t group) {
    const __mmask16 mask = lanes_of(w->groups - group);
    const int64_t at = row * w->groups + group;
    if (w->scale_kind == BFLOAT16) return load_values(w->scale, at, mask, BFLOAT16);
    if (w->scale_kind == FLOAT16)
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)w->scale + at));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, (const uint8_t *)w->scale + at)));
}

/* The scales of a row's slots for one token into slots (room); returns what the zero points take off, over all lanes. */
TARGET_AVX512 static __attribute__((noinline)) __m512 slot_scales(const Weight *w, const Planes *p, int64_t row, int64_t token, float *slots) {
    const __m512i order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i which = _mm512_srl_epi32(order, _mm_cvtsi32_si128(p->shift));
    const int32_t per_word = w->bits == 4 ? 8 : 4, mask = w->bits == 4 ? 15 : 255;
    const int32_t *zeros = w->zeros ? w->zeros + (row >> (w->bits == 4 ? 3 : 2)) * w->groups : NULL;
    const __m128i down = _mm_cvtsi32_si128((int32_t)(row & (per_word - 1)) * w->bits);
    __m512 off = _mm512_setzero_ps(), zero = _mm512_set1_ps((float)(1 << (w->bits - 1)));
    for (int64_t slot = 0; slot < p->room; slot += LANES) {
        const int64_t group = slot >> p->shift, at = token * p->room + slot;
        __m512 scale = load_scales(w, row, group);
        if (zeros) {
            const __m512i word = _mm512_maskz_loadu_epi32(lanes_of(w->groups - group), zeros + group);
            zero = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srl_epi32(word, down), _mm512_set1_epi32(mask)));
        }
        if (p->shift) {
            scale = _mm512_permutexvar_ps(which, scale);
            if (zeros) zero = _mm512_permutexvar_ps(which, zero);
        }
        scale = _mm512_mul_ps(scale, _mm512_loadu_ps(p->scales + at));
        _mm512_storeu_ps(slots + slot, scale);
        off = _mm512_fmadd_ps(_mm512_mul_ps(scale, zero), _mm512_loadu_ps(p->sums + at), off);
    }
    return off;
}

/* The same of eight rows at once in the usual form; totals: what is left to add. */
TARGET_AVX512 static __attribute__((noinline)) void usual_scales(
    const Weight *w, const Planes *p, int64_t row, int64_t token, float *slots, __m512 *total) {
    const __m512 middle = _mm512_set1_ps((float)(1 << (w->bits - 1)));
    const uint16_t *scales = (const uint16_t *)w->scale + row * w->groups;
    __m512 left[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) left[r] = _mm512_setzero_ps();
    for (int64_t slot = 0; slot < p->room; slot += LANES) {
        const __m512 times = _mm512_loadu_ps(p->scales + token * p->room + slot);
        const __m512 off = _mm512_mul_ps(middle, _mm512_loadu_ps(p->sums + token * p->room + slot));
        const __mmask16 mask = lanes_of(w->groups - slot);
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) {
            const __m512 scale = _mm512_mul_ps(load_values(scales, r * w->groups + slot, mask, BFLOAT16), times);
            _mm512_storeu_ps(slots + r * p->room + slot, scale);
            left[r] = _mm512_fnmadd_ps(scale, off, left[r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) total[r] = left[r];
}

/* A unit's scales, each in the lanes of its slot. */
TARGET_AVX512 INLINE __m512 unit_scales(const float *slots, const int unit_slots, const __m512i which) {
    if (unit_slots == 1) return _mm512_set1_ps(*slots);
    double pair;
    if (unit_slots == 4) return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(slots)), which);
    memcpy(&pair, slots, 8);
    return _mm512_permutevar_ps(_mm512_castpd_ps(_mm512_set1_pd(pair)), which);
}

/* How far ahead memory is asked for: whole tasks, since a shorter way would end in rows that are being read. */
INLINE int64_t ahead_of(int64_t row_bytes) {
    const int64_t task = ROWS_AT_ONCE * row_bytes;
    return (AHEAD + task - 1) / task * task;
}

/* Where the compiler shall not work a value out again from others, for which it has no registers. */
#define KEEP(value) __asm__("" : "+r"(value))

/* Every third row's start: the rows between lie one and two strides on, which an address can say by itself. */
typedef struct {
    const uint8_t *codes[3], *ahead[3]; /* ahead: the same rows of a later task */
    const float *slots[3];
    int64_t row_bytes, room;
    const int8_t *x;
} Place;

/* Adds the products of a unit of COUNT rows to their totals, and goes on to the next unit. */
TARGET_AVX512 INLINE void add_unit(
    Place *at, __mmask64 mask, const int bits, const int unit_slots, const int count, __m512 *total) {
    const __m512i low = _mm512_set1_epi8(15), none = _mm512_setzero_si512();
    const __m512i quarters = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i which = unit_slots == 2 ? _mm512_srli_epi32(quarters, 1) : quarters;
    const __m512i x_high = _mm512_loadu_si512(at->x), x_low = _mm512_loadu_si512(at->x + UNIT);
    const __m512i odd_high = bits == 4 ? _mm512_loadu_si512(at->x + 2 * UNIT) : x_high;
    const __m512i odd_low = bits == 4 ? _mm512_loadu_si512(at->x + 3 * UNIT) : x_low;
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) {
        _mm_prefetch((const char *)at->ahead[r / 3] + r % 3 * at->row_bytes, _MM_HINT_T1);
        __m512i raw = _mm512_maskz_loadu_epi8(mask, at->codes[r / 3] + r % 3 * at->row_bytes), sum;
        __asm__("" : "+v"(raw)); /* loaded once */
        if (bits == 4) {
            const __m512i even = _mm512_and_si512(raw, low);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(raw, 4), low);
            sum = _mm512_slli_epi32(_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(none, even, x_high), odd, odd_high), 8);
            sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, even, x_low), odd, odd_low);
        } else
            sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(_mm512_dpbusd_epi32(none, raw, x_high), 8), raw, x_low);
        const __m512 value = _mm512_cvtepi32_ps(sum);
        const float *slots = at->slots[r / 3] + r % 3 * at->room;
        total[r] = _mm512_fmadd_ps(value, unit_scales(slots, unit_slots, which), total[r]);
    }
    for (int i = 0; i < 3; i++) at->codes[i] += UNIT, at->ahead[i] += UNIT, at->slots[i] += unit_slots;
    at->x += UNIT * 16 / bits;
}

/* Sums over the lanes of eight vectors. */
TARGET_AVX512 INLINE __m256 sums_of_lanes(const __m512 *total) {
    __m256 half[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        half[i] = _mm256_add_ps(_mm512_castps512_ps256(total[i]), _mm512_extractf32x8_ps(total[i], 1));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) half[i] = _mm256_hadd_ps(half[2 * i], half[2 * i + 1]);
    const __m256 first = _mm256_hadd_ps(half[0], half[1]), second = _mm256_hadd_ps(half[2], half[3]);
    const __m256 low = _mm256_permute2f128_ps(first, second, 0x20), high = _mm256_permute2f128_ps(first, second, 0x31);
    return _mm256_add_ps(low, high);
}

/* COUNT rows at a time for one token: the activations are loaded once for all of them. */
TARGET_AVX512 INLINE void rows_avx512(
    const Weight *w, const Planes *p, int64_t row, int64_t token, float *scratch, float *out, const int bits,
    const int unit_slots, const int count) {
    const int64_t row_bytes = w->columns * bits / 8, full = row_bytes / UNIT, ahead = ahead_of(row_bytes);
    const int64_t scale_bytes = w->groups * (w->scale_kind == UINT8 ? 1 : 2), later = ahead / row_bytes * scale_bytes;
    const uint8_t *codes = w->codes + row * row_bytes;
    __m512 total[ROWS_AT_ONCE];
    const int usual = count == 8 && w->scale_kind == BFLOAT16 && !w->zeros && !p->shift;
    if (usual) usual_scales(w, p, row, token, scratch, total);
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) {
        if (!usual) total[r] = _mm512_sub_ps(_mm512_setzero_ps(), slot_scales(w, p, row + r, token, scratch + r * p->room));
        _mm_prefetch((const char *)w->scale + (row + r) * scale_bytes + later, _MM_HINT_T1);
    }
    Place at = {
        {codes, codes + 3 * row_bytes, codes + 6 * row_bytes},
        {codes + ahead, codes + 3 * row_bytes + ahead, codes + 6 * row_bytes + ahead},
        {scratch, scratch + 3 * p->room, scratch + 6 * p->room},
        row_bytes,
        p->room,
        p->bytes + token * p->units * p->unit_bytes};
    for (int i = 0; count > 1 && i < 3; i++) {
        KEEP(at.codes[i]);
        KEEP(at.ahead[i]);
        KEEP(at.slots[i]);
    }
    for (int64_t unit = 0; unit < full; unit++) add_unit(&at, ~0ull, bits, unit_slots, count, total);
    if (row_bytes % UNIT) add_unit(&at, (1ull << row_bytes % UNIT) - 1, bits, unit_slots, count, total);
    if (count == 8) _mm256_storeu_ps(out, sums_of_lanes(total));
    else for (int r = 0; r < count; r++) out[r] = _mm512_reduce_add_ps(total[r]);
}

/* Kept apart, so that each has the registers to itself. */
#define WIDE_ROWS(BITS, SLOTS)                                                                                      \
    TARGET_AVX512 static __attribute__((noinline)) void rows_##BITS##_##SLOTS(                                      \
        const Weight *w, const Planes *p, int64_t row, int count, int64_t token, float *scratch, float *out) {      \
        if (count == ROWS_AT_ONCE) rows_avx512(w, p, row, token, scratch, out, BITS, SLOTS, ROWS_AT_ONCE);          \
        else for (int r = 0; r < count; r++) rows_avx512(w, p, row + r, token, scratch, out + r, BITS, SLOTS, 1);   \
    }

WIDE_ROWS(4, 1)
WIDE_ROWS(4, 2)
WIDE_ROWS(4, 4)
WIDE_ROWS(8, 1)
WIDE_ROWS(8, 2)

/* scratch: ROWS_AT_ONCE times the room of a row's slots. */
static void some_rows_avx512(
    const Weight *w, const Planes *p, int64_t row, int count, int64_t token, float *scratch, float *out) {
    if (w->bits == 8) (p->unit_slots == 1 ? rows_8_1 : rows_8_2)(w, p, row, count, token, scratch, out);
    else if (p->unit_slots == 1) rows_4_1(w, p, row, count, token, scratch, out);
    else (p->unit_slots == 2 ? rows_4_2 : rows_4_4)(w, p, row, count, token, scratch, out);
}

/* Adds the products of 32 columns of COUNT rows; the token's even columns stand before its odd ones, 16 and 16. */
TARGET_AVX512 INLINE void add_columns(
    const uint16_t *weight, const float *token, int64_t columns, int64_t ahead, __mmask32 mask, const int count,
    __m512 *even, __m512 *odd) {
    const __m512i top = _mm512_set1_epi32((int32_t)0xffff0000);
    const __m512 x_even = _mm512_loadu_ps(token), x_odd = _mm512_loadu_ps(token + 16);
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) {
        _mm_prefetch((const char *)(weight + r * columns) + ahead, _MM_HINT_T1);
        __m512i raw = _mm512_maskz_loadu_epi16(mask, weight + r * columns);
        __asm__("" : "+v"(raw)); /* loaded once */
        even[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)), x_even, even[r]);
        odd[r] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(raw, top)), x_odd, odd[r]);
    }
}

/* Eight rows at once, or one, of a bfloat16 weight times one token. */
TARGET_AVX512 INLINE void bfloat16_rows(
    const uint16_t *weight, const float *token, int64_t columns, float *out, const int count) {
    const int64_t task = 16 * columns, ahead = (AHEAD + task - 1) / task * task, rest = columns % 32;
    __m512 even[8], odd[8];
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) even[r] = odd[r] = _mm512_setzero_ps();
    const uint16_t *end = weight + columns - rest;
    for (; weight < end; weight += 32, token += 32)
        add_columns(weight, token, columns, ahead, ~0u, count, even, odd);
    if (rest) add_columns(weight, token, columns, ahead, (1u << rest) - 1, count, even, odd);
#pragma GCC unroll 8
    for (int r = 0; r < count; r++) out[r] = _mm512_reduce_add_ps(_mm512_add_ps(even[r], odd[r]));
}

TARGET_AVX512 static void some_bfloat16_rows(
    const uint16_t *weight, const float *token, int64_t columns, float *out, int count) {
    int r = 0;
    for (; r + 8 <= count; r += 8) bfloat16_rows(weight + r * columns, token, columns, out + r, 8);
    for (; r < count; r++) bfloat16_rows(weight + r * columns, token, columns, out + r, 1);
}
