/* One call a message for the error-bounded codecs: quantise, find repeated vectors, code; and back.
 *
 * Byte for byte what codecs/portable.py writes; the layout is described there. Arithmetic is strict IEEE
 * double (no contraction), so both paths make the same codes. Every read of a payload is bounds-checked: a
 * payload may come from anywhere.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LZ = 1, RANS = 2, LOSSLESS = 4 };                 /* stages of a codec */
enum { CORRUPT = -1, TOO_LARGE = -2, NO_MEMORY = -3 };   /* results below zero */
enum { DIRECT = 256, ALPHABET = 352 };                   /* tokens: portable.py, tokens_of */
enum { SCALE_BITS = 12, SCALE = 1 << SCALE_BITS };       /* frequencies add up to 2^12 */
enum { WIDE = 32, NARROW = 4, WIDE_FROM = 8192 };        /* interleaved rANS states: of long and short arrays */
#define RANS_LOW 65536u                                  /* states lie in [2^16, 2^32) */
#define CODE_LIMIT 1073741824.0                          /* 2^30: codes beyond are carried exactly */
#define INLINE static inline __attribute__((always_inline))

int32_t shardwright_codecs_abi(void) { return 1; }

/* ---- writing and reading bytes, little endian ---- */

typedef struct { uint8_t *at, *end; int full; } writer_t;
typedef struct { const uint8_t *at, *end; int bad; } reader_t;

static void put(writer_t *w, const void *data, size_t size) {
    if (w->full || (size_t)(w->end - w->at) < size) { w->full = 1; return; }
    memcpy(w->at, data, size);
    w->at += size;
}
static void put8(writer_t *w, uint32_t v) { uint8_t b = (uint8_t)v; put(w, &b, 1); }
static void put16(writer_t *w, uint32_t v) { put8(w, v); put8(w, v >> 8); }
static void put32(writer_t *w, uint32_t v) { put16(w, v); put16(w, v >> 16); }

static const uint8_t *take(reader_t *r, uint64_t size) {
    if (r->bad || (uint64_t)(r->end - r->at) < size) { r->bad = 1; return NULL; }
    const uint8_t *p = r->at;
    r->at += size;
    return p;
}
INLINE uint32_t load16(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }
INLINE uint32_t load32(const uint8_t *p) { return load16(p) | load16(p + 2) << 16; }
static uint32_t get8(reader_t *r) { const uint8_t *p = take(r, 1); return p ? *p : 0; }
static uint32_t get16(reader_t *r) { const uint8_t *p = take(r, 2); return p ? load16(p) : 0; }
static uint32_t get32(reader_t *r) { const uint8_t *p = take(r, 4); return p ? load32(p) : 0; }

/* ---- bits, least significant first ---- */

typedef struct { uint8_t *at; uint64_t held; int bits; } bits_out_t; /* the caller made room */

INLINE void put_bits(bits_out_t *b, uint64_t v, int width) { /* at most 32 bits, on top of at most 31 */
    b->held |= v << b->bits;
    b->bits += width;
    if (b->bits >= 32) { /* little-endian machines only, as below */
        const uint32_t word = (uint32_t)b->held;
        memcpy(b->at, &word, 4);
        b->at += 4;
        b->held >>= 32;
        b->bits -= 32;
    }
}
static void end_bits(bits_out_t *b) {
    for (; b->bits > 0; b->bits -= 8, b->held >>= 8) *b->at++ = (uint8_t)b->held;
    b->held = 0;
    b->bits = 0;
}

typedef struct { const uint8_t *at, *end; uint64_t held; int bits; } bits_in_t;

INLINE uint32_t get_bits(bits_in_t *b, int width) { /* past the end: zeros; lengths are checked before */
    if (b->bits < width && b->end - b->at >= 4) {
        b->held |= (uint64_t)load32(b->at) << b->bits;
        b->at += 4;
        b->bits += 32;
    }
    while (b->bits < width) {
        b->held |= (uint64_t)(b->at < b->end ? *b->at++ : 0) << b->bits;
        b->bits += 8;
    }
    uint32_t v = (uint32_t)(b->held & ((1ull << width) - 1));
    b->held >>= width;
    b->bits -= width;
    return v;
}

/* ---- error-bounded quantiser ---- */

#define ROUND_MAGIC 6755399441055744.0 /* 1.5 * 2^52: adding and subtracting rounds to the nearest even */

/* Codes of n values; what cannot be held within eb gets code 0 and an entry in the list. Returns its length. */
static int64_t quantise(const float *x, int64_t n, double eb, int32_t *codes, uint32_t *where) {
    const double step = 2 * eb, inverse = 1 / step;
    int64_t listed = 0;
    for (int64_t base = 0; base < n; base += 256) {
        const int64_t m = n - base < 256 ? n - base : 256;
        uint64_t good = 0;
        for (int64_t i = 0; i < m; i++) {
            const double value = x[base + i], scaled = value * inverse;
            const int fits = scaled < CODE_LIMIT && scaled > -CODE_LIMIT;
            const double whole = ((fits ? scaled : 0) + ROUND_MAGIC) - ROUND_MAGIC;
            const double error = value - (double)(float)(whole * step);
            const int held = fits && error <= eb && error >= -eb;
            codes[base + i] = held ? (int32_t)whole : 0;
            good += (uint64_t)held;
        }
        if (good == (uint64_t)m) continue;
        for (int64_t i = 0; i < m; i++) { /* the same again, listing */
            const double value = x[base + i], scaled = value * inverse;
            const int fits = scaled < CODE_LIMIT && scaled > -CODE_LIMIT;
            const double whole = ((fits ? scaled : 0) + ROUND_MAGIC) - ROUND_MAGIC;
            const double error = value - (double)(float)(whole * step);
            if (!(fits && error <= eb && error >= -eb)) where[listed++] = (uint32_t)(base + i);
        }
    }
    return listed;
}

/* ---- repeated vectors ---- */

INLINE uint64_t hash_row(const int32_t *row, int64_t d) {
    uint64_t h = 0x9E3779B97F4A7C15ull;
    int64_t i = 0;
    for (; i + 1 < d; i += 2) { /* two codes a multiplication: the chain of products is what takes time */
        const uint64_t pair = (uint64_t)(uint32_t)row[i + 1] << 32 | (uint32_t)row[i];
        h = (h ^ pair) * 0xFF51AFD7ED558CCDull;
        h ^= h >> 29;
    }
    if (i < d) { h = (h ^ (uint32_t)row[i]) * 0xFF51AFD7ED558CCDull; h ^= h >> 29; }
    return h ^ h >> 32;
}

/* refs[i] = 0 where row i is new, else 1 + its place among the new rows; first[u] = row of the u-th new one.
 * Returns the number of new rows, or below zero. */
static int64_t find_repeats(const int32_t *codes, int64_t rows, int64_t d, uint32_t *refs, uint32_t *first) {
    uint64_t size = 16;
    while (size < 2 * (uint64_t)rows) size *= 2;
    uint32_t *table = calloc(size, sizeof(uint32_t)); /* 1 + place; 0 is empty */
    if (!table) return NO_MEMORY;
    int64_t found = 0;
    for (int64_t i = 0; i < rows; i++) {
        const int32_t *row = codes + i * d;
        uint64_t at = hash_row(row, d) & (size - 1);
        while (table[at] && memcmp(codes + (int64_t)first[table[at] - 1] * d, row, (size_t)d * 4)) at = (at + 1) & (size - 1);
        refs[i] = table[at];
        if (!table[at]) { first[found++] = (uint32_t)i; table[at] = (uint32_t)found; }
    }
    free(table);
    return found;
}

/* ---- fixed width ---- */

static int bit_length(uint32_t v) { return v ? 32 - __builtin_clz(v) : 0; }

static void write_packed(writer_t *w, const int32_t *v, int64_t n) {
    int32_t low = n ? v[0] : 0, high = low;
    for (int64_t i = 0; i < n; i++) { low = v[i] < low ? v[i] : low; high = v[i] > high ? v[i] : high; }
    const int width = bit_length((uint32_t)high - (uint32_t)low);
    const uint64_t size = ((uint64_t)n * (uint64_t)width + 7) / 8;
    put32(w, (uint32_t)low);
    put8(w, (uint32_t)width);
    if (w->full || (uint64_t)(w->end - w->at) < size) { w->full = 1; return; }
    bits_out_t bits = {w->at, 0, 0};
    if (width) for (int64_t i = 0; i < n; i++) put_bits(&bits, (uint32_t)v[i] - (uint32_t)low, width);
    end_bits(&bits);
    w->at += size;
}

static void read_packed(reader_t *r, int32_t *v, int64_t n) {
    const uint32_t low = get32(r);
    const int width = (int)get8(r);
    if (width > 32) { r->bad = 1; return; }
    const uint64_t size = ((uint64_t)n * (uint64_t)width + 7) / 8;
    const uint8_t *p = take(r, size);
    if (!p) return;
    bits_in_t bits = {p, p + size, 0, 0};
    for (int64_t i = 0; i < n; i++) v[i] = (int32_t)(low + (width ? get_bits(&bits, width) : 0));
}

/* ---- entropy coder: tokens, frequencies, interleaved rANS ---- */

INLINE uint32_t zigzag(int32_t q) { return (uint32_t)q << 1 ^ (uint32_t)(q >> 31); }
INLINE int32_t zagzig(uint32_t v) { return (int32_t)(v >> 1 ^ (0u - (v & 1))); }

INLINE uint32_t token_of(uint32_t v) {
    if (v < DIRECT) return v;
    const int n = bit_length(v);
    return DIRECT + (uint32_t)(n - 9) * 4 + (v >> (n - 3) & 3);
}

/* Frequencies with the sum 2^12, at least 1 for each symbol that occurs. */
static void normalise(const uint64_t *count, uint64_t n, uint32_t *freq) {
    int64_t excess = -SCALE;
    for (int s = 0; s < ALPHABET; s++) {
        const uint64_t f = (count[s] * SCALE + n / 2) / n;
        freq[s] = count[s] ? (uint32_t)(f ? f : 1) : 0;
        excess += freq[s];
    }
    while (excess) {
        int top = 0;
        for (int s = 1; s < ALPHABET; s++) if (freq[s] > freq[top]) top = s;
        const int64_t room = freq[top] - freq[top] / 2 - (freq[top] == 1); /* leaves at least a half, and 1 */
        const int64_t change = excess > room ? room : excess; /* below zero: all of it is added */
        freq[top] = (uint32_t)((int64_t)freq[top] - change);
        excess -= change;
    }
}

static void write_frequencies(writer_t *w, const uint32_t *freq) {
    int last = ALPHABET;
    while (last && !freq[last - 1]) last--;
    put16(w, (uint32_t)last);
    for (int s = 0; s < last;) {
        if (freq[s] == 0) {
            int run = 0;
            while (run < 255 && freq[s] == 0) { run++; s++; }
            put8(w, 0);
            put8(w, (uint32_t)run);
        } else {
            if (freq[s] < 128) put8(w, freq[s]);
            else { put8(w, 128 | freq[s] >> 8); put8(w, freq[s]); }
            s++;
        }
    }
}

static void read_frequencies(reader_t *r, uint32_t *freq) {
    memset(freq, 0, ALPHABET * sizeof *freq);
    const uint32_t last = get16(r);
    uint32_t sum = 0;
    if (last > ALPHABET) r->bad = 1;
    for (uint32_t s = 0; s < last && !r->bad;) {
        const uint32_t b = get8(r);
        if (b == 0) {
            const uint32_t run = get8(r);
            if (run == 0 || run > last - s) r->bad = 1;
            s += run;
        } else {
            freq[s] = b < 128 ? b : (b & 127) << 8 | get8(r);
            sum += freq[s++];
        }
    }
    if (sum != SCALE) r->bad = 1;
}

/* Words are written from the end of `words` downwards; returns the first. */
INLINE uint16_t *rans_encode(const uint16_t *tokens, int64_t n, const uint32_t *freq, const uint32_t *start,
                             uint32_t *x, const int lanes, uint16_t *words) {
    for (int l = 0; l < lanes; l++) x[l] = RANS_LOW;
    for (int64_t i = n - 1; i >= 0; i--) {
        uint32_t *state = &x[i & (lanes - 1)];
        const uint32_t f = freq[tokens[i]];
        uint32_t v = *state;
        if (v >= (uint64_t)f << 20) { *--words = (uint16_t)v; v >>= 16; }
        const uint32_t quotient = v / f;
        *state = (quotient << SCALE_BITS) + (v - quotient * f) + start[tokens[i]];
    }
    return words;
}

INLINE int rans_decode(uint16_t *tokens, int64_t n, const uint16_t *symbol, const uint32_t *step,
                       uint32_t *x, const int lanes, const uint8_t *words, const uint8_t *end) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t v = x[i & (lanes - 1)];
        const uint32_t slot = v & (SCALE - 1), move = step[slot];
        tokens[i] = symbol[slot];
        v = ((move >> 16) + 1) * (v >> SCALE_BITS) + (move & 0xFFFF);
        if (v < RANS_LOW) {
            if (words == end) return 0;
            v = v << 16 | load16(words);
            words += 2;
        }
        x[i & (lanes - 1)] = v;
    }
    for (int l = 0; l < lanes; l++) if (x[l] != RANS_LOW) return 0;
    return words == end;
}

static int write_rans(writer_t *w, const int32_t *v, int64_t n, int signs) {
    if (n == 0) return 0;
    uint16_t *tokens = malloc((size_t)n * 2), *words = malloc((size_t)n * 2);
    uint8_t *extra = malloc((size_t)n * 4 + 8);
    if (!tokens || !words || !extra) { free(tokens); free(words); free(extra); return NO_MEMORY; }
    uint64_t count[ALPHABET] = {0};
    uint32_t freq[ALPHABET], start[ALPHABET], x[WIDE];
    bits_out_t bits = {extra, 0, 0};
    for (int64_t i = 0; i < n; i++) {
        const uint32_t value = signs ? zigzag(v[i]) : (uint32_t)v[i];
        tokens[i] = (uint16_t)token_of(value);
        count[tokens[i]]++;
        if (value >= DIRECT) {
            const int width = bit_length(value) - 3;
            put_bits(&bits, value & ((1u << width) - 1), width);
        }
    }
    end_bits(&bits);
    normalise(count, (uint64_t)n, freq);
    for (uint32_t s = 0, sum = 0; s < ALPHABET; s++) { start[s] = sum; sum += freq[s]; }
    const int lanes = n < WIDE_FROM ? NARROW : WIDE;
    uint16_t *first = lanes == WIDE ? rans_encode(tokens, n, freq, start, x, WIDE, words + n)
                                    : rans_encode(tokens, n, freq, start, x, NARROW, words + n);
    write_frequencies(w, freq);
    for (int l = 0; l < lanes; l++) put32(w, x[l]);
    const uint32_t used = (uint32_t)(words + n - first), more = (uint32_t)(bits.at - extra);
    put32(w, used);
    put32(w, more);
    put(w, first, (size_t)used * 2); /* little-endian machines only; the loader refuses others */
    put(w, extra, more);
    free(tokens); free(words); free(extra);
    return 0;
}

static int read_rans(reader_t *r, int32_t *v, int64_t n, int signs) {
    if (n == 0) return 0;
    uint32_t freq[ALPHABET], step[SCALE], x[WIDE];
    uint16_t symbol[SCALE];
    read_frequencies(r, freq);
    if (r->bad) return 0;
    for (uint32_t s = 0, slot = 0; s < ALPHABET; s++)
        for (uint32_t k = 0; k < freq[s]; k++, slot++) { symbol[slot] = (uint16_t)s; step[slot] = (freq[s] - 1) << 16 | k; }
    const int lanes = n < WIDE_FROM ? NARROW : WIDE;
    for (int l = 0; l < lanes; l++) {
        x[l] = get32(r);
        if (x[l] < RANS_LOW) r->bad = 1;
    }
    const uint32_t used = get32(r), more = get32(r);
    const uint8_t *words = take(r, (uint64_t)used * 2), *extra = take(r, more);
    if (r->bad) return 0;
    uint16_t *tokens = malloc((size_t)n * 2);
    if (!tokens) return NO_MEMORY;
    const int fine = lanes == WIDE ? rans_decode(tokens, n, symbol, step, x, WIDE, words, words + (uint64_t)used * 2)
                                   : rans_decode(tokens, n, symbol, step, x, NARROW, words, words + (uint64_t)used * 2);
    if (!fine) { r->bad = 1; free(tokens); return 0; }
    bits_in_t bits = {extra, extra + more, 0, 0};
    uint64_t needed = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t value = tokens[i];
        if (value >= DIRECT) {
            const uint32_t k = value - DIRECT;
            const int width = (int)(k / 4) + 6;
            needed += (uint64_t)width;
            value = (4 | (k & 3)) << width | get_bits(&bits, width);
        }
        v[i] = signs ? zagzig(value) : (int32_t)value;
    }
    free(tokens);
    if ((needed + 7) / 8 != more) r->bad = 1;
    return 0;
}

static int write_array(writer_t *w, const int32_t *v, int64_t n, int stages, int signs) {
    if (stages & RANS) return write_rans(w, v, n, signs);
    write_packed(w, v, n);
    return 0;
}

static int read_array(reader_t *r, int32_t *v, int64_t n, int stages, int signs) {
    if (stages & RANS) return read_rans(r, v, n, signs);
    read_packed(r, v, n);
    return 0;
}

/* ---- a message ---- */

typedef struct { int32_t *codes; uint32_t *where, *refs, *first; } scratch_t;

static int64_t encode(const float *x, int64_t rows, int64_t d, double eb, int stages, scratch_t *s, writer_t *w) {
    const int64_t n = rows * d;
    int64_t listed = 0, distinct = rows;
    if (stages & LOSSLESS) memcpy(s->codes, x, (size_t)n * 4);
    else listed = quantise(x, n, eb, s->codes, s->where);
    if (stages & LZ) distinct = find_repeats(s->codes, rows, d, s->refs, s->first);
    if (distinct < 0) return distinct;
    put32(w, (uint32_t)listed);
    put32(w, (uint32_t)distinct);
    for (int64_t i = 0; i < listed && !w->full; i++) {
        put32(w, s->where[i]);
        put(w, x + s->where[i], 4);
    }
    if (stages & LZ) {
        for (int64_t u = 0; u < distinct; u++) /* in place: first[u] >= u */
            memmove(s->codes + u * d, s->codes + (int64_t)s->first[u] * d, (size_t)d * 4);
        const int failed = write_array(w, (const int32_t *)s->refs, rows, stages, 0);
        if (failed) return failed;
    }
    return write_array(w, s->codes, distinct * d, stages, 1);
}

/* Encode rows x d floats into out; returns the bytes written, TOO_LARGE if they are more than capacity. */
int64_t shardwright_codec_encode(const float *x, int64_t rows, int64_t d, double eb, int32_t stages,
                                 uint8_t *out, int64_t capacity) {
    const size_t n = (size_t)(rows * d);
    scratch_t s = {malloc(n * 4 + 4), malloc(n * 4 + 4), malloc((size_t)rows * 4 + 4), malloc((size_t)rows * 4 + 4)};
    writer_t w = {out, out + capacity, 0};
    int64_t result = NO_MEMORY;
    if (s.codes && s.where && s.refs && s.first) result = encode(x, rows, d, eb, stages, &s, &w);
    free(s.codes); free(s.where); free(s.refs); free(s.first);
    if (result) return result;
    return w.full ? TOO_LARGE : w.at - out;
}

static void restore(const int32_t *codes, int64_t n, double eb, int stages, float *x) {
    const double step = 2 * eb;
    if (stages & LOSSLESS) { memcpy(x, codes, (size_t)n * 4); return; }
    for (int64_t i = 0; i < n; i++) x[i] = (float)(codes[i] * step);
}

static int decode(reader_t *r, float *x, int64_t rows, int64_t d, double eb, int stages, int32_t *codes, int32_t *refs) {
    const int64_t n = rows * d;
    const uint32_t listed = get32(r), distinct = get32(r);
    if (listed > n || distinct > rows || (!(stages & LZ) && distinct != rows)) return CORRUPT;
    const uint8_t *list = take(r, (uint64_t)listed * 8);
    int failed = 0;
    if (stages & LZ) failed = read_array(r, refs, rows, stages, 0);
    if (!failed) failed = read_array(r, codes, (int64_t)distinct * d, stages, 1);
    if (failed) return failed;
    if (r->bad || r->at != r->end) return CORRUPT;
    if (stages & LZ) {
        int64_t next = 0;
        for (int64_t i = 0; i < rows; i++) { /* refs become the number of each row's vector */
            const uint32_t ref = (uint32_t)refs[i];
            if (ref > (uint64_t)next || (ref == 0 && next == distinct)) return CORRUPT;
            refs[i] = (int32_t)(ref ? ref - 1 : next++);
        }
        if (next != distinct) return CORRUPT;
        for (int64_t i = 0, seen = 0; i < rows; i++) {
            float *row = x + i * d;
            if (refs[i] == seen) { restore(codes + seen * d, d, eb, stages, row); refs[seen++] = (int32_t)i; }
            else memcpy(row, x + (int64_t)refs[refs[i]] * d, (size_t)d * 4);
        }
    } else restore(codes, n, eb, stages, x);
    for (uint32_t i = 0; i < listed; i++) {
        const uint32_t at = load32(list + 8 * (size_t)i);
        if (at >= n) return CORRUPT;
        memcpy(x + at, list + 8 * (size_t)i + 4, 4);
    }
    return 0;
}

/* Decode `size` bytes into rows x d floats; 0, CORRUPT (x then holds anything) or NO_MEMORY. */
int64_t shardwright_codec_decode(const uint8_t *in, int64_t size, float *x, int64_t rows, int64_t d, double eb,
                                 int32_t stages) {
    reader_t r = {in, in + size, 0};
    int32_t *codes = malloc((size_t)(rows * d) * 4 + 4), *refs = malloc((size_t)rows * 4 + 4);
    const int result = codes && refs ? decode(&r, x, rows, d, eb, stages, codes, refs) : NO_MEMORY;
    free(codes); free(refs);
    return result;
}

/* ---- FBGEMM's fused 8-bit rows (mx_rowwise.py): d codes, then scale and bias ---- */

/* Returns 0, or 1 if a scale or bias is not finite (out is then not whole). */
int32_t shardwright_int8_encode(const float *x, int64_t rows, int64_t d, uint8_t *out) {
    for (int64_t r = 0; r < rows; r++, x += d, out += d + 8) {
        float low = x[0], high = x[0], poison = 0;
        for (int64_t i = 0; i < d; i++) {
            low = x[i] < low ? x[i] : low;
            high = x[i] > high ? x[i] : high;
            poison += x[i] * 0.0f; /* NaN once a value is not finite */
        }
        const float span = high - low, scale = span / 255.0f, inverse = 255.0f / (span + 1e-8f);
        if (!(poison == 0.0f) || !(span <= 3.402823466e38f)) return 1;
        for (int64_t i = 0; i < d; i++) {
            float step = (x[i] - low) * inverse; /* at least 0 */
            step = step > 255.0f ? 255.0f : step;
            out[i] = (uint8_t)(int32_t)((step + 8388608.0f) - 8388608.0f); /* 2^23: to the nearest even */
        }
        memcpy(out + d, &scale, 4);
        memcpy(out + d + 4, &low, 4);
    }
    return 0;
}

void shardwright_int8_decode(const uint8_t *in, int64_t rows, int64_t d, float *x) {
    for (int64_t r = 0; r < rows; r++, x += d, in += d + 8) {
        float scale, bias;
        memcpy(&scale, in + d, 4);
        memcpy(&bias, in + d + 4, 4);
        for (int64_t i = 0; i < d; i++) x[i] = fmaf((float)in[i], scale, bias);
    }
}
