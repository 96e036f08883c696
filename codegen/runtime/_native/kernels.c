/* One-pass quantise-dequantise and QSNR kernels for block-scaled formats.
 *
 * Each kernel repeats, operation for operation, the float32 arithmetic of mx_blocks.py and mx_elements.py, so
 * both give the same bits; that needs strict IEEE arithmetic: no -ffast-math and no contraction to FMA.
 * Loops run over whole blocks of a constant length so that a compiler vectorises them. Positive floats are
 * compared as their bits, which order the same way and need no care for NaN.
 *
 * Rows are contiguous; a row of n elements holds ceil(n / block) blocks, the last one possibly short. A
 * short block is processed in a buffer padded with zeros, which change neither scale nor result.
 */
#define _DEFAULT_SOURCE /* madvise */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#define ABI_VERSION 4
#define MAX_FORMATS 8
#define INLINE static inline __attribute__((always_inline))

enum { MAGNITUDE = 0x7FFFFFFF, EXPONENT = 0x7F800000, QUIET_NAN = 0x7FC00000, FLT_MAX_BITS = 0x7F7FFFFF };

typedef struct {
    int32_t pmin;    /* bits of 2^emin: the spacing does not shrink below it */
    float magic;     /* 2^(23 - mantissa): 2^23 spacings of the binade [1, 2) */
    float half;      /* 2^(-mantissa - 1): half a spacing of that binade */
    int32_t max;     /* bits of the largest magnitude */
    int32_t offset;  /* added to the maximum's bits: the scale mode (mx_blocks.mode_offset) */
    int32_t emax;    /* exponent of the element's largest power of two */
    int32_t away;    /* ties away from zero instead of to even */
} grid_t;

INLINE int32_t bits_of(float x) { int32_t b; memcpy(&b, &x, 4); return b; }
INLINE float float_of(int32_t b) { float x; memcpy(&x, &b, 4); return x; }
INLINE int32_t min32(int32_t a, int32_t b) { return a < b ? a : b; }
INLINE int32_t max32(int32_t a, int32_t b) { return a > b ? a : b; }

/* Bits of the largest magnitude of a block. */
INLINE int32_t largest(const float *x, const int k) {
    int32_t m = 0;
    for (int i = 0; i < k; i++) m = max32(m, bits_of(x[i]) & MAGNITUDE);
    return m;
}

/* A float's bits with values in 2^-127..2^-126 brought to the form of normal numbers, smaller ones to 0. */
INLINE int32_t leading(int32_t m) {
    int64_t doubled = 2 * (int64_t)m - 0x800000;
    return doubled < 0 ? 0 : (int32_t)(doubled < m ? doubled : m);
}

/* E8M0 byte of a finite maximum. */
INLINE int32_t scale_byte(int32_t m, const grid_t *g) {
    int32_t byte = ((leading(m) + g->offset) >> 23) - g->emax;
    return min32(max32(byte, 0), 254);
}

/* 2^(byte - 127); byte 0 is a subnormal float. */
INLINE float power(int32_t byte) { return float_of(byte ? byte << 23 : 0x400000); }

/* The nearest grid value of a magnitude a >= 0, saturating. */
INLINE float round_grid(float a, int32_t pmin, float magic, float half, int32_t max, const int away) {
    float p = float_of(max32(bits_of(a) & EXPONENT, pmin));
    float shift = p * magic;
    float r = (a + shift) - shift;
    if (away) {
        float h = p * half;
        r = (a - r) == h ? r + (h + h) : r;
    }
    return float_of(min32(bits_of(r), max));
}

INLINE void fill_nan(float *y, const int k) {
    for (int i = 0; i < k; i++) y[i] = float_of(QUIET_NAN);
}

INLINE float signed_saturated(float magnitude, float sign_of) {
    return float_of(min32(bits_of(magnitude), FLT_MAX_BITS) | (bits_of(sign_of) & ~MAGNITUDE));
}

/* --- one block, elements that share only the block's scale (OCP MX, MSFP) --- */
INLINE void block_mx(const float *x, float *y, const int k, const grid_t *g, const int away) {
    const int32_t m = largest(x, k);
    if (m >= EXPONENT) { fill_nan(y, k); return; }
    const int32_t byte = scale_byte(m, g);
    const float inverse = power(254 - byte), scale = power(byte);
    const int32_t pmin = g->pmin, max = g->max;
    const float magic = g->magic, half = g->half;
    for (int i = 0; i < k; i++) {
        float a = float_of(bits_of(x[i]) & MAGNITUDE) * inverse;
        y[i] = signed_saturated(round_grid(a, pmin, magic, half, max, away) * scale, x[i]);
    }
}

/* --- one block of 16 with a one-bit sub-exponent for each pair (BDR MX9, MX6, MX4) --- */
INLINE void block_pairs(const float *x, float *y, const grid_t *g, const int away) {
    const int32_t m = largest(x, 16);
    if (m >= EXPONENT) { fill_nan(y, 16); return; }
    const int32_t byte = scale_byte(m, g);
    const float inverse = power(254 - byte), scale = power(byte);
    const int32_t threshold = bits_of(scale), pmin = g->pmin, max = g->max;
    const float magic = g->magic, half = g->half;
    int32_t below[16];
    uint64_t pair[8];
    for (int i = 0; i < 16; i++) below[i] = (bits_of(x[i]) & MAGNITUDE) < threshold ? -1 : 0;
    memcpy(pair, below, sizeof pair);
    for (int i = 0; i < 8; i++) pair[i] &= (pair[i] << 32) | (pair[i] >> 32); /* both below the block's binade */
    memcpy(below, pair, sizeof below);
    for (int i = 0; i < 16; i++) {
        const int32_t binade = below[i] & 0x800000; /* one step of the exponent field: 2 and 1/2 */
        float a = float_of(bits_of(x[i]) & MAGNITUDE) * inverse * float_of(0x3F800000 + binade);
        float r = round_grid(a, pmin, magic, half, max, away) * float_of(0x3F800000 - binade);
        y[i] = signed_saturated(r * scale, x[i]);
    }
}

/* --- one block of NVFP4: E4M3 scale under the tensor's fp32 scale --- */
INLINE void block_nvfp4(const float *x, float *y, const grid_t *g, float tensor_scale, float inverse_tensor_scale,
                        const int away) {
    const int32_t m = largest(x, 16);
    if (m >= EXPONENT) { fill_nan(y, 16); return; }
    float wanted = float_of(m) / 6.0f / tensor_scale;
    wanted = wanted < 0.015625f ? 0.015625f : wanted > 448.0f ? 448.0f : wanted;
    const float s = round_grid(wanted, 0x3C800000 /* 2^-6 */, 1048576.0f /* 2^20 */, 0, 0x43E00000 /* 448 */, 0);
    const float inverse = inverse_tensor_scale / s, scale = s * tensor_scale;
    const int32_t pmin = g->pmin, max = g->max;
    const float magic = g->magic, half = g->half;
    for (int i = 0; i < 16; i++) {
        float a = float_of(bits_of(x[i]) & MAGNITUDE) * inverse;
        y[i] = signed_saturated(round_grid(a, pmin, magic, half, max, away) * scale, x[i]);
    }
}

/* Runs STATEMENT for each block of each row, with x and y at a full block; K is its length. */
#define FOR_BLOCKS(K, STATEMENT)                                         \
    for (int64_t row = 0; row < rows; row++) {                           \
        const float *in = xs + row * n;                                  \
        float *out = ys + row * n;                                       \
        int64_t at = 0;                                                  \
        for (; at + (K) <= n; at += (K)) {                               \
            const float *x = in + at;                                    \
            float *y = out + at;                                         \
            STATEMENT;                                                   \
        }                                                                \
        if (at < n) {                                                    \
            float x[K] = {0}, y[K];                                      \
            memcpy(x, in + at, (size_t)(n - at) * sizeof(float));        \
            STATEMENT;                                                   \
            memcpy(out + at, y, (size_t)(n - at) * sizeof(float));       \
        }                                                                \
    }

int shardwright_abi(void) { return ABI_VERSION; }

/* Ask for huge pages under a large result that is about to be written once: without them the first touch
 * of each 4 KiB page takes longer than quantising what lies on it. A hint: failure does not matter. */
void shardwright_large_result(float *ys, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, start = ((uintptr_t)ys + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)ys + (uintptr_t)bytes) / page * page;
    if (end > start) madvise((void *)start, end - start, MADV_HUGEPAGE);
#else
    (void)ys, (void)bytes;
#endif
}

/* Quantise-dequantise (rows, n); returns 0, or 1 for a block size without a kernel. */
int shardwright_qdq_mx(const float *xs, float *ys, int64_t rows, int64_t n, int32_t block, const grid_t *grid) {
    const grid_t g = *grid;
    if (block == 32 && !g.away) { FOR_BLOCKS(32, block_mx(x, y, 32, &g, 0)) }
    else if (block == 32) { FOR_BLOCKS(32, block_mx(x, y, 32, &g, 1)) }
    else if (block == 16 && !g.away) { FOR_BLOCKS(16, block_mx(x, y, 16, &g, 0)) }
    else if (block == 16) { FOR_BLOCKS(16, block_mx(x, y, 16, &g, 1)) }
    else return 1;
    return 0;
}

int shardwright_qdq_pairs(const float *xs, float *ys, int64_t rows, int64_t n, int32_t block, const grid_t *grid) {
    const grid_t g = *grid;
    if (block != 16) return 1;
    if (g.away) { FOR_BLOCKS(16, block_pairs(x, y, &g, 1)) }
    else { FOR_BLOCKS(16, block_pairs(x, y, &g, 0)) }
    return 0;
}

int shardwright_qdq_nvfp4(const float *xs, float *ys, int64_t rows, int64_t n, float tensor_scale,
                          float inverse_tensor_scale, const grid_t *grid) {
    const grid_t g = *grid;
    FOR_BLOCKS(16, block_nvfp4(x, y, &g, tensor_scale, inverse_tensor_scale, 0))
    return 0;
}

/* The largest magnitude in the blocks of 16 that hold no NaN or infinity. */
float shardwright_finite_max(const float *xs, int64_t rows, int64_t n) {
    int32_t most = 0;
    for (int64_t row = 0; row < rows; row++) {
        const float *in = xs + row * n;
        int64_t at = 0;
        for (; at + 16 <= n; at += 16) {
            int32_t m = largest(in + at, 16);
            most = m < EXPONENT ? max32(most, m) : most;
        }
        int32_t m = 0;
        for (; at < n; at++) m = max32(m, bits_of(in[at]) & MAGNITUDE);
        most = m < EXPONENT ? max32(most, m) : most;
    }
    return float_of(most);
}

/* --- codes and scales, as mx_elements.encode and mx_blocks.to_blocks make them --- */
typedef struct {
    float steps;    /* 2^(mantissa - emin): subnormal values in units of their spacing */
    int32_t shift;  /* 23 - mantissa */
    int32_t rebias; /* (126 + emin) << mantissa: the exponent field of 2^emin is 1 */
    int32_t sign;   /* bits - 1: where the sign goes */
    int32_t twos;   /* two's complement */
} codec_t;

INLINE int32_t code_of(float r, int32_t negative, int32_t pmin, const codec_t *c) {
    const int32_t normal = (bits_of(r) >> c->shift) - c->rebias;
    const int32_t magnitude = bits_of(r) < pmin ? (int32_t)(r * c->steps) : normal;
    return c->twos ? (magnitude ^ -negative) + negative : magnitude | negative << c->sign;
}

INLINE void block_codes(const float *x, uint8_t *codes, uint8_t *scale, uint8_t *shifts, const int k, const grid_t *g,
                        const codec_t *codec, const int away) {
    const codec_t c = *codec;
    const int32_t m = largest(x, k);
    if (m >= EXPONENT) {
        memset(codes, 0, (size_t)k);
        if (shifts) memset(shifts, 0, (size_t)k / 2);
        *scale = 255;
        return;
    }
    const int32_t byte = scale_byte(m, g);
    const float inverse = power(254 - byte);
    const int32_t threshold = bits_of(power(byte)), pmin = g->pmin, max = g->max;
    const float magic = g->magic, half = g->half;
    float up[32];
    *scale = (uint8_t)byte;
    if (shifts)
        for (int i = 0; i < k; i += 2) {
            const int32_t pair = max32(bits_of(x[i]) & MAGNITUDE, bits_of(x[i + 1]) & MAGNITUDE);
            shifts[i / 2] = pair < threshold;
            /* a factor of its own: inverse * 2 would overflow for byte 0 */
            up[i] = up[i + 1] = pair < threshold ? 2.0f : 1.0f;
        }
    for (int i = 0; i < k; i++) {
        float a = float_of(bits_of(x[i]) & MAGNITUDE) * inverse;
        if (shifts) a *= up[i];
        const float r = round_grid(a, pmin, magic, half, max, away);
        codes[i] = (uint8_t)code_of(r, (int32_t)((uint32_t)bits_of(x[i]) >> 31), pmin, &c);
    }
}

INLINE void rows_codes(const float *xs, uint8_t *codes, uint8_t *scales, uint8_t *shifts, int64_t rows, int64_t n,
                       const int k, const grid_t *g, const codec_t *c, const int away) {
    for (int64_t row = 0; row < rows; row++) {
        const float *in = xs + row * n;
        uint8_t *out = codes + row * n;
        for (int64_t at = 0; at < n; at += k) {
            if (at + k <= n) {
                block_codes(in + at, out + at, scales, shifts, k, g, c, away);
            } else {
                float x[32] = {0};
                uint8_t y[32];
                memcpy(x, in + at, (size_t)(n - at) * sizeof(float));
                block_codes(x, y, scales, shifts, k, g, c, away);
                memcpy(out + at, y, (size_t)(n - at));
            }
            scales++;
            if (shifts) shifts += k / 2;
        }
    }
}

/* Codes (rows, n), scales (rows, blocks) and, unless it is NULL, one-bit shifts (rows, blocks, block / 2). */
int shardwright_codes(const float *xs, uint8_t *codes, uint8_t *scales, uint8_t *shifts, int64_t rows, int64_t n,
                      int32_t block, const grid_t *grid, const codec_t *codec) {
    const grid_t g = *grid;
    const codec_t c = *codec;
    if (shifts && block == 16) rows_codes(xs, codes, scales, shifts, rows, n, 16, &g, &c, g.away);
    else if (!shifts && block == 16) rows_codes(xs, codes, scales, NULL, rows, n, 16, &g, &c, g.away);
    else if (!shifts && block == 32) rows_codes(xs, codes, scales, NULL, rows, n, 32, &g, &c, g.away);
    else return 1;
    return 0;
}

/* --- rows that share a scale: FBGEMM's integers and FP8 --- */

/* The least and the largest value of each row; both NaN if one value is not finite. */
void shardwright_row_range(const float *xs, int64_t rows, int64_t n, float *low, float *high) {
    for (int64_t row = 0; row < rows; row++) {
        const float *x = xs + row * n;
        int32_t m = 0;
        float least = x[0], most = x[0];
        for (int64_t i = 0; i < n; i++) {
            m = max32(m, bits_of(x[i]) & MAGNITUDE);
            least = x[i] < least ? x[i] : least;
            most = x[i] > most ? x[i] : most;
        }
        low[row] = m < EXPONENT ? least : float_of(QUIET_NAN);
        high[row] = m < EXPONENT ? most : float_of(QUIET_NAN);
    }
}

/* The bits of the largest magnitude of each row, as floats: NaN and infinity stay. */
void shardwright_row_max(const float *xs, int64_t rows, int64_t n, float *largest_of) {
    for (int64_t row = 0; row < rows; row++) {
        const float *x = xs + row * n;
        int32_t m = 0;
        for (int64_t i = 0; i < n; i++) m = max32(m, bits_of(x[i]) & MAGNITUDE);
        largest_of[row] = float_of(m);
    }
}

/* y = code * scale + bias, rounded once; code = (x - bias) * inverse to the nearest of 0..levels. */
void shardwright_row_affine(const float *xs, float *ys, int64_t rows, int64_t n, const float *scale,
                            const float *bias, const float *inverse, float levels) {
    for (int64_t row = 0; row < rows; row++) {
        const float *x = xs + row * n;
        float *y = ys + row * n;
        const float s = scale[row], b = bias[row], v = inverse[row];
        for (int64_t i = 0; i < n; i++) {
            float code = (x[i] - b) * v;
            code = code > 0.0f ? code : 0.0f; /* NaN, from an infinite bias, becomes 0 */
            code = code < levels ? code : levels;
            code = (code + 8388608.0f) - 8388608.0f; /* 2^23: to the nearest integer, ties to even */
            y[i] = __builtin_fmaf(code, s, b);
        }
    }
}

/* y = FP8(x * multiplier) * scale, with one multiplier and scale for each row. */
void shardwright_row_fp8(const float *xs, float *ys, int64_t rows, int64_t n, const float *multiplier,
                         const float *scale, const grid_t *grid) {
    const int32_t pmin = grid->pmin, max = grid->max;
    const float magic = grid->magic, half = grid->half;
    for (int64_t row = 0; row < rows; row++) {
        const float *x = xs + row * n;
        float *y = ys + row * n;
        const float m = multiplier[row], s = scale[row];
        if (s != s) {
            for (int64_t i = 0; i < n; i++) y[i] = s;
            continue;
        }
        for (int64_t i = 0; i < n; i++) {
            float a = float_of(min32(bits_of(x[i] * m) & MAGNITUDE, max));
            y[i] = signed_saturated(round_grid(a, pmin, magic, half, max, 0) * s, x[i]);
        }
    }
}

/* --- QSNR of several formats with blocks of 32 in one read ---
 *
 * Everything is in units of 2^E, the power of two of the block's maximum, so squares neither overflow nor
 * underflow; sums over a block are float32 in 16 fixed lanes, sums over blocks float64 in 8 fixed lanes,
 * which makes the result independent of the machine's vector length.
 */
typedef struct { double lane[8]; } sum_t;

INLINE void fold(sum_t *sum, const float *lane16, double weight) {
    for (int l = 0; l < 8; l++) sum->lane[l] += (double)(lane16[l] + lane16[l + 8]) * weight;
}

INLINE void block_noise(const float *u, const grid_t *g, int32_t m, int32_t base, sum_t *sum, double weight) {
    /* units: the format's scale is 2^(E + up - emax) */
    const int32_t up = scale_byte(m, g) + g->emax - base;
    const int32_t exponent = (up - g->emax) * 0x800000;
    const int32_t pmin = g->pmin + exponent, max = g->max + exponent;
    const float magic = g->magic, half = g->half;
    const int away = g->away;
    float lane[16] = {0};
    for (int h = 0; h < 32; h += 16)
        for (int l = 0; l < 16; l++) {
            float d = u[h + l] - round_grid(u[h + l], pmin, magic, half, max, 0);
            lane[l] += d * d;
        }
    if (__builtin_expect(away, 0)) {
        memset(lane, 0, sizeof lane);
        for (int h = 0; h < 32; h += 16)
            for (int l = 0; l < 16; l++) {
                float d = u[h + l] - round_grid(u[h + l], pmin, magic, half, max, 1);
                lane[l] += d * d;
            }
    }
    fold(sum, lane, weight);
}

INLINE int block_qsnr(const float *x, const grid_t *g, const int formats, sum_t *sums) {
    const int32_t m = largest(x, 32);
    if (m >= EXPONENT) return 1;
    const int32_t base = leading(m) >> 23; /* E + 127 */
    const float inverse = power(254 - base);
    const double scale = (double)power(base), weight = scale * scale;
    float u[32], lane[16] = {0};
    for (int i = 0; i < 32; i++) u[i] = float_of(bits_of(x[i]) & MAGNITUDE) * inverse;
    for (int h = 0; h < 32; h += 16)
        for (int l = 0; l < 16; l++) lane[l] += u[h + l] * u[h + l];
    fold(&sums[formats], lane, weight);
    for (int f = 0; f < formats; f++) block_noise(u, &g[f], m, base, &sums[f], weight);
    return 0;
}

/* Sums of squared errors of each format, then of the squared signal, into out[formats + 1].
 * Returns 0; 1 if a value is not finite (out is then not written); 2 for too many formats. */
int shardwright_qsnr32(const float *xs, int64_t rows, int64_t n, const grid_t *grids, int32_t formats, double *out) {
    if (formats > MAX_FORMATS) return 2;
    grid_t g[MAX_FORMATS];
    sum_t sums[MAX_FORMATS + 1];
    memcpy(g, grids, (size_t)formats * sizeof(grid_t));
    memset(sums, 0, sizeof sums);
    for (int64_t row = 0; row < rows; row++) {
        const float *in = xs + row * n;
        int64_t at = 0;
        for (; at + 32 <= n; at += 32)
            if (block_qsnr(in + at, g, formats, sums)) return 1;
        if (at < n) {
            float x[32] = {0};
            memcpy(x, in + at, (size_t)(n - at) * sizeof(float));
            if (block_qsnr(x, g, formats, sums)) return 1;
        }
    }
    for (int f = 0; f <= formats; f++) {
        double total = 0;
        for (int l = 0; l < 8; l++) total += sums[f].lane[l];
        out[f] = total;
    }
    return 0;
}
