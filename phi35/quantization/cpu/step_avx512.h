/* One token of each row through all layers: included by product.c after the AVX-512 products.
 *
 * The threads stay together from the first norm to the last and meet five times a layer: a call, or a sleep, between
 * products costs more than most of what lies between them. Numbers are rounded to the model's dtype where its modules
 * round them. What is cheap and needed by all (norms, activations as integers) each thread works out for itself.
 */
#include <omp.h>
#include <sched.h>

#define LEAST 4    /* tasks of a product that a thread takes at once: shorter ones would wait for memory at their start */
#define SPINS 2000 /* looks of a waiting thread before it lets others run */

typedef struct {
    const uint8_t *codes;
    const void *scale;
    const float *row_scale;
    const int32_t *zeros;
    const void *bias;
    int64_t rows, columns, groups, bits, scale_kind;
} Linear;

typedef struct {
    Linear qkv, out, gate_up, down;
    const void *attention_norm, *feed_norm; /* (hidden) */
    void *keys, *values;                    /* (tokens, kv_heads, slots, head_dim) */
} Layer;

typedef struct {
    int64_t layers, tokens, hidden, heads, kv_heads, head_dim, width, slots, window, kind, threads;
    const Layer *layer;
    const int64_t *places; /* (tokens): the slot that a row's token takes; it sees those up to it */
    const void *cos, *sin; /* (tokens, head_dim) */
    const void *last_norm; /* (hidden) */
    void *stream;          /* (tokens, hidden): embeddings, then the normed states of the last layer */
} Step;

typedef struct {
    float *stream, *projected, *attended, *gated; /* (tokens, ...) what the threads share */
    int64_t *taken;                               /* (layers, 5) tasks given out */
    int64_t waiting, meeting, threads;
} Shared;

typedef struct {
    float *normed, *slots, *scores;
    void *planes;
} Own;

static inline float rounded(float value, int64_t kind) { return kind == BFLOAT16 ? widen(narrow(value)) : value; }

static inline float number_at(const void *values, int64_t at, int64_t kind) {
    return kind == BFLOAT16 ? widen(((const uint16_t *)values)[at]) : ((const float *)values)[at];
}

static inline void put_number(void *values, int64_t at, float value, int64_t kind) {
    if (kind == BFLOAT16) ((uint16_t *)values)[at] = narrow(value);
    else ((float *)values)[at] = value;
}

static Weight weight_of(const Linear *l) {
    return (Weight){l->codes, l->scale, l->row_scale, l->zeros, l->rows, l->columns, l->groups, (int32_t)l->bits,
                    (int32_t)l->scale_kind};
}

/* Waits for all threads. */
static void meet(Shared *shared) {
    if (shared->threads == 1) return;
    const int64_t meeting = __atomic_load_n(&shared->meeting, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&shared->waiting, 1, __ATOMIC_ACQ_REL) == shared->threads) {
        __atomic_store_n(&shared->waiting, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&shared->meeting, meeting + 1, __ATOMIC_RELEASE);
        return;
    }
    for (int64_t looks = 0; __atomic_load_n(&shared->meeting, __ATOMIC_ACQUIRE) == meeting; looks++) {
        if (looks < SPINS) _mm_pause();
        else sched_yield();
    }
}

/* The next tasks for a thread, fewer towards the end so that all end together; none where all are taken. */
static inline int take(int64_t *taken, int64_t tasks, int64_t least, int64_t threads, int64_t *first, int64_t *last) {
    int64_t begin = __atomic_load_n(taken, __ATOMIC_RELAXED), chunk;
    do {
        if (begin >= tasks) return 0;
        chunk = (tasks - begin) / (2 * threads) + 1;
        if (chunk < least) chunk = least;
    } while (!__atomic_compare_exchange_n(taken, &begin, begin + chunk, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    *first = begin;
    *last = begin + chunk < tasks ? begin + chunk : tasks;
    return 1;
}

/* Asks for the codes that the rows before a task would have asked for. */
static inline void ask(const Linear *l, int64_t row) {
    const int64_t row_bytes = l->columns * l->bits / 8, start = row * row_bytes;
    int64_t end = start + ahead_of(row_bytes);
    if (end > l->rows * row_bytes) end = l->rows * row_bytes;
    for (int64_t at = start; at < end; at += UNIT) _mm_prefetch((const char *)l->codes + at, _MM_HINT_T1);
}

/* e to the power of values up to 0 or moderate (below -87: 0), within 2e-7 of it. */
TARGET_AVX512 INLINE __m512 exp_of(__m512 value) {
    /* Of two numbers, the second is taken where one is none. */
    value = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(88.0f), value));
    const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(value, _mm512_set1_ps(1.44269504f)), 0);
    __m512 part = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693145752f), value);
    part = _mm512_fnmadd_ps(whole, _mm512_set1_ps(1.42860677e-6f), part);
    __m512 power = _mm512_set1_ps(1.0f / 720);
    const float terms[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (int i = 0; i < 6; i++) power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(terms[i]));
    return _mm512_scalef_ps(power, whole);
}

TARGET_AVX512 INLINE __m512 round_vector(__m512 values, int64_t kind) {
    if (kind == FLOAT32) return values;
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    const __m512 even = _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32((int32_t)0xffff0000)));
    return _mm512_mask_mov_ps(even, _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), values);
}

/* RMS norm of one token. */
TARGET_AVX512 static void norm(
    const float *values, const void *weight, int64_t count, float eps, int64_t kind, float *out) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += LANES) {
        const __m512 value = _mm512_maskz_loadu_ps(lanes_of(count - i), values + i);
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    const __m512 inverse = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)count + eps));
    for (int64_t i = 0; i < count; i += LANES) {
        const __mmask16 mask = lanes_of(count - i);
        const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, values + i), inverse);
        const __m512 scaled = _mm512_mul_ps(value, load_values(weight, i, mask, (int32_t)kind));
        _mm512_mask_storeu_ps(out + i, mask, round_vector(scaled, kind));
    }
}

/* Sums of a task's rows for one token, from the given row on, scaled, biased and rounded. */
static void sums_of(
    const Linear *l, const Weight *w, const Planes *p, int64_t row, int count, int64_t token, const Step *s,
    float *slots, float *sums) {
    some_rows_avx512(w, p, row, count, token, slots, sums);
    for (int r = 0; r < count; r++) {
        if (l->row_scale) sums[r] *= l->row_scale[row + r];
        if (l->bias) sums[r] += number_at(l->bias, row + r, s->kind);
        sums[r] = rounded(sums[r], s->kind);
    }
}

/* out (tokens, rows) is what the product gives, or takes it on top. */
static void share_product(
    const Linear *l, const float *input, const Step *s, Shared *shared, const Own *own, int64_t *taken, float *out,
    int adds) {
    const Weight w = weight_of(l);
    Planes p;
    size_planes(&w, &p, s->tokens);
    place_planes(&p, s->tokens, own->planes);
    for (int64_t token = 0; token < s->tokens; token++) prepare_planes(&w, &p, token, input, FLOAT32);
    const int64_t tasks = (l->rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    for (int64_t task, last; take(taken, tasks, LEAST, shared->threads, &task, &last);) {
        ask(l, task * ROWS_AT_ONCE);
        for (; task < last; task++) {
            const int64_t row = task * ROWS_AT_ONCE;
            const int count = l->rows - row < ROWS_AT_ONCE ? (int)(l->rows - row) : ROWS_AT_ONCE;
            for (int64_t token = 0; token < s->tokens; token++) {
                float sums[ROWS_AT_ONCE], *to = out + token * l->rows + row;
                sums_of(l, &w, &p, row, count, token, s, own->slots, sums);
                for (int r = 0; r < count; r++) to[r] = adds ? rounded(to[r] + sums[r], s->kind) : sums[r];
            }
        }
    }
}

/* silu(gate) * up: a task takes the same rows of both. */
TARGET_AVX512 static void share_gate(
    const Linear *l, const float *input, const Step *s, Shared *shared, const Own *own, int64_t *taken) {
    const Weight w = weight_of(l);
    Planes p;
    size_planes(&w, &p, s->tokens);
    place_planes(&p, s->tokens, own->planes);
    for (int64_t token = 0; token < s->tokens; token++) prepare_planes(&w, &p, token, input, FLOAT32);
    const int64_t tasks = (s->width + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    for (int64_t task, last; take(taken, tasks, LEAST, shared->threads, &task, &last);) {
        ask(l, task * ROWS_AT_ONCE);
        ask(l, s->width + task * ROWS_AT_ONCE);
        for (; task < last; task++) {
            const int64_t row = task * ROWS_AT_ONCE;
            const int count = s->width - row < ROWS_AT_ONCE ? (int)(s->width - row) : ROWS_AT_ONCE;
            for (int64_t token = 0; token < s->tokens; token++) {
                float gate[LANES] = {0}, up[LANES] = {0};
                sums_of(l, &w, &p, row, count, token, s, own->slots, gate);
                sums_of(l, &w, &p, s->width + row, count, token, s, own->slots, up);
                const __m512 open = _mm512_loadu_ps(gate), one = _mm512_set1_ps(1.0f);
                const __m512 below = _mm512_add_ps(one, exp_of(_mm512_sub_ps(_mm512_setzero_ps(), open)));
                const __m512 acted = round_vector(_mm512_div_ps(open, below), s->kind);
                const __m512 product = round_vector(_mm512_mul_ps(acted, _mm512_loadu_ps(up)), s->kind);
                _mm512_mask_storeu_ps(shared->gated + token * s->width + row, lanes_of(count), product);
            }
        }
    }
}

/* A head turned by its place, rounded. */
static void rotate(const float *head, const Step *s, int64_t token, float *out) {
    const int64_t half = s->head_dim / 2, at = token * s->head_dim;
    for (int64_t i = 0; i < s->head_dim; i++) {
        const float cosine = number_at(s->cos, at + i, s->kind), sine = number_at(s->sin, at + i, s->kind);
        const float other = i < half ? -head[i + half] : head[i - half];
        out[i] = rounded(rounded(head[i] * cosine, s->kind) + rounded(other * sine, s->kind), s->kind);
    }
}

/* One query over the keys and values of its head. */
TARGET_AVX512 static void attend(
    const Step *s, const float *query, const void *keys, const void *values, int64_t first, int64_t last, float scale,
    float *scores, float *out) {
    const int64_t dim = s->head_dim;
    const int32_t kind = (int32_t)s->kind;
    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t slot = first; slot < last; slot++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < dim; i += LANES) {
            const __mmask16 mask = lanes_of(dim - i);
            const __m512 key = load_values(keys, slot * dim + i, mask, kind);
            sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, query + i), key, sum);
        }
        scores[slot - first] = _mm512_reduce_add_ps(sum) * scale;
    }
    for (int64_t i = 0; i < last - first; i += LANES)
        top = _mm512_mask_max_ps(top, lanes_of(last - first - i), top, _mm512_loadu_ps(scores + i));
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t i = 0; i < last - first; i += LANES) {
        const __m512 share = exp_of(_mm512_sub_ps(_mm512_loadu_ps(scores + i), largest));
        _mm512_storeu_ps(scores + i, share);
        total = _mm512_mask_add_ps(total, lanes_of(last - first - i), total, share);
    }
    const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    for (int64_t i = 0; i < dim; i += LANES) {
        const __mmask16 mask = lanes_of(dim - i);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t slot = first; slot < last; slot++) {
            const __m512 value = load_values(values, slot * dim + i, mask, kind);
            sum = _mm512_fmadd_ps(_mm512_set1_ps(scores[slot - first]), value, sum);
        }
        _mm512_mask_storeu_ps(out + i, mask, round_vector(_mm512_mul_ps(sum, inverse), s->kind));
    }
}

/* Keys and values of each kv head go to the cache, and its queries attend. */
static void share_attention(
    const Layer *layer, const Step *s, Shared *shared, const Own *own, int64_t *taken, float scale) {
    const int64_t dim = s->head_dim, group = s->heads / s->kv_heads, size = (s->kind == BFLOAT16 ? 2 : 4) * dim;
    for (int64_t task, last; take(taken, s->tokens * s->kv_heads, 1, shared->threads, &task, &last);)
        for (; task < last; task++) {
            const int64_t token = task / s->kv_heads, head = task % s->kv_heads, place = s->places[token];
            const float *queries = shared->projected + token * (s->heads + 2 * s->kv_heads) * dim;
            const float *key = queries + (s->heads + head) * dim, *value = key + s->kv_heads * dim;
            char *keys = (char *)layer->keys + task * s->slots * size, *values = (char *)layer->values + task * s->slots * size;
            float *turned = own->normed;
            rotate(key, s, token, turned);
            for (int64_t i = 0; i < dim; i++) {
                put_number(keys, place * dim + i, turned[i], s->kind);
                put_number(values, place * dim + i, value[i], s->kind);
            }
            const int64_t first = s->window && place + 1 > s->window ? place + 1 - s->window : 0;
            for (int64_t query = head * group; query < (head + 1) * group; query++) {
                rotate(queries + query * dim, s, token, turned);
                float *out = shared->attended + (token * s->heads + query) * dim;
                attend(s, turned, keys, values, first, place + 1, scale, own->scores, out);
            }
        }
}

static void norm_all(const Step *s, const float *values, const void *weight, float eps, float *out) {
    for (int64_t token = 0; token < s->tokens; token++)
        norm(values + token * s->hidden, weight, s->hidden, eps, s->kind, out + token * s->hidden);
}

/* What each thread does, in step with the others. */
static void run_layers(const Step *s, Shared *shared, const Own *own, float eps, float scale) {
    for (int64_t number = 0; number < s->layers; number++) {
        const Layer *layer = s->layer + number;
        int64_t *taken = shared->taken + number * 5;
        norm_all(s, shared->stream, layer->attention_norm, eps, own->normed);
        share_product(&layer->qkv, own->normed, s, shared, own, taken, shared->projected, 0);
        meet(shared);
        share_attention(layer, s, shared, own, taken + 1, scale);
        meet(shared);
        share_product(&layer->out, shared->attended, s, shared, own, taken + 2, shared->stream, 1);
        meet(shared);
        norm_all(s, shared->stream, layer->feed_norm, eps, own->normed);
        share_gate(&layer->gate_up, own->normed, s, shared, own, taken + 3);
        meet(shared);
        share_product(&layer->down, shared->gated, s, shared, own, taken + 4, shared->stream, 1);
        meet(shared);
    }
}

static size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Bytes of a thread's own memory; with memory, its parts. */
static size_t place_own(const Step *s, Own *own, char *memory) {
    size_t planes = 0, room = 0, normed = (size_t)(s->tokens * s->hidden + 2 * s->head_dim);
    for (int64_t number = 0; number < s->layers; number++) {
        const Linear *linear = &s->layer[number].qkv;
        for (int i = 0; i < 4; i++) {
            const Weight w = weight_of(linear + i);
            Planes p;
            const size_t bytes = size_planes(&w, &p, s->tokens);
            if (bytes > planes) planes = bytes;
            if ((size_t)p.room > room) room = (size_t)p.room;
        }
    }
    int64_t longest = 0;
    for (int64_t token = 0; token < s->tokens; token++) longest = s->places[token] > longest ? s->places[token] : longest;
    const size_t parts[] = {
        padded(sizeof(float) * normed), padded(sizeof(float) * ROWS_AT_ONCE * room),
        padded(sizeof(float) * (size_t)(longest + 1 + LANES)), padded(planes)};
    if (memory) {
        own->normed = (float *)memory;
        own->slots = (float *)(memory + parts[0]);
        own->scores = (float *)(memory + parts[0] + parts[1]);
        own->planes = memory + parts[0] + parts[1] + parts[2];
    }
    return parts[0] + parts[1] + parts[2] + parts[3];
}

/* Returns 1 where memory is lacking. */
static int32_t decode_step(const Step *s, float eps, float scale) {
    const size_t projected = (size_t)((s->heads + 2 * s->kv_heads) * s->head_dim), attended = (size_t)(s->heads * s->head_dim);
    const size_t numbers = (size_t)s->tokens * ((size_t)s->hidden + projected + attended + (size_t)s->width);
    const size_t counts = padded(sizeof(int64_t) * (size_t)s->layers * 5), shares = padded(sizeof(float) * numbers);
    const size_t each = place_own(s, NULL, NULL);
    char *memory = aligned_alloc(64, counts + shares + (size_t)s->threads * each);
    if (!memory) return 1;
    memset(memory, 0, counts);
    Shared shared = {.taken = (int64_t *)memory, .stream = (float *)(memory + counts)};
    shared.projected = shared.stream + s->tokens * s->hidden;
    shared.attended = shared.projected + (size_t)s->tokens * projected;
    shared.gated = shared.attended + (size_t)s->tokens * attended;
    for (int64_t i = 0; i < s->tokens * s->hidden; i++) shared.stream[i] = number_at(s->stream, i, s->kind);
#pragma omp parallel num_threads(s->threads)
    {
#pragma omp single
        shared.threads = omp_get_num_threads();
        Own own;
        place_own(s, &own, memory + counts + shares + (size_t)omp_get_thread_num() * each);
        run_layers(s, &shared, &own, eps, scale);
    }
    for (int64_t token = 0; token < s->tokens; token++) {
        float *values = shared.stream + token * s->hidden;
        norm(values, s->last_norm, s->hidden, eps, s->kind, values);
        for (int64_t i = 0; i < s->hidden; i++) put_number(s->stream, token * s->hidden + i, values[i], s->kind);
    }
    free(memory);
    return 0;
}
