/* Vectors of 16 numbers, and tensors of any dtype and strides that they are read from. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

enum { LANES = 16, FP32 = 0, BF16 = 1, FP64 = 2 };

typedef REAL real;
typedef real vec __attribute__((vector_size(LANES * sizeof(real)), aligned(sizeof(real))));
#if REAL_IS_FLOAT
typedef int32_t lane_bits;
#else
typedef int64_t lane_bits;
#endif
typedef lane_bits bits __attribute__((vector_size(LANES * sizeof(real)), aligned(sizeof(real))));
typedef int64_t index_t;

/* A tensor [batch, channel, time] of any strides, in elements; data is null where it is absent. */
typedef struct {
    void *data;
    index_t batch, channel, time, kind;
} Tensor;

/* ---- vectors ---- */

static inline vec all(real value) { return value - (vec){0}; }

static inline vec pick(bits where, vec yes, vec no)
{
    return (vec)((where & (bits)yes) | (~where & (bits)no));
}

#define FOR_LANES for (int lane = 0; lane < LANES; lane++)

#if REAL_IS_FLOAT
/* 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2, and e^r by its series: rounding is all there
   is of an error. Below the smallest normal number it is 0. */
static inline vec exp_of(vec x)
{
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    x = pick(x > 89.0f, all(89.0f), x);
    x = pick(x < -88.0f, all(-88.0f), x);
    vec shifted = x * 1.44269504f + shift;
    vec n = shifted - shift;
    vec r = x - n * 0.693145752f - n * 1.42860677e-6f;
    vec p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    bits power = ((bits)shifted - 0x4b400000 + 127) << 23;
    return p * (vec)power;
}

/* log(1 + u) for 0 <= u <= 1, exact for small u: 2 artanh(u / (2 + u)). */
static inline vec log1p_of(vec u)
{
    vec s = u / (u + 2.0f), q = s * s;
    vec p = q * (1.0f / 17) + 1.0f / 15;
    p = p * q + 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    p = p * q + 1.0f;
    return 2.0f * s * p;
}
#else
static inline vec exp_of(vec x)
{
    FOR_LANES x[lane] = exp(x[lane]);
    return x;
}

static inline vec log1p_of(vec u)
{
    FOR_LANES u[lane] = log1p(u[lane]);
    return u;
}
#endif

static inline vec sigmoid(vec x) { return 1 / (1 + exp_of(-x)); }

static inline vec softplus(vec x)
{
    vec above = pick(x < 0, all(0), x); /* which keeps what is no number */
    return above + log1p_of(exp_of(pick(x < 0, x, -x)));
}

static inline real sum_of(vec x)
{
    real sum = 0;
    FOR_LANES sum += x[lane];
    return sum;
}

/* Some lanes of a row; the others are 0, and are not written. */
static inline vec load(const real *row, int lanes)
{
    vec found = {0};
    if (lanes == LANES)
        return *(const vec *)row;
    for (int lane = 0; lane < lanes; lane++)
        found[lane] = row[lane];
    return found;
}

static inline void store(real *row, int lanes, vec values)
{
    if (lanes == LANES)
        *(vec *)row = values;
    else
        for (int lane = 0; lane < lanes; lane++)
            row[lane] = values[lane];
}

/* ---- tensors of any dtype ---- */

static inline float widened(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t rounded(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* ties to even */
    return value == value ? nearest : 0x7fc0;
}

#define READ(TYPE, VALUE)                                                                   \
    {                                                                                       \
        const TYPE *data = (const TYPE *)tensor->data + first;                              \
        if (tensor->channel == 1 && lanes == LANES)                                         \
            for (index_t t = 0; t < steps; t++)                                             \
                FOR_LANES into[t][lane] = VALUE(data[t * tensor->time + lane]);             \
        else                                                                                \
            for (int lane = 0; lane < lanes; lane++)                                        \
                for (index_t t = 0; t < steps; t++)                                         \
                    into[t][lane] = VALUE(data[t * tensor->time + lane * tensor->channel]); \
    }

#define WRITE(TYPE, VALUE)                                                                  \
    {                                                                                       \
        TYPE *data = (TYPE *)tensor->data + first;                                          \
        if (tensor->channel == 1 && lanes == LANES)                                         \
            for (index_t t = 0; t < steps; t++)                                             \
                FOR_LANES data[t * tensor->time + lane] = VALUE(from[t][lane]);             \
        else                                                                                \
            for (int lane = 0; lane < lanes; lane++)                                        \
                for (index_t t = 0; t < steps; t++)                                         \
                    data[t * tensor->time + lane * tensor->channel] = VALUE(from[t][lane]); \
    }

static index_t offset(const Tensor *tensor, index_t b, index_t channel, index_t time)
{
    return b * tensor->batch + channel * tensor->channel + time * tensor->time;
}

static void fetch(const Tensor *tensor, index_t first, index_t steps, int lanes, vec *into)
{
    if (lanes < LANES)
        memset(into, 0, steps * sizeof(vec));
    if (tensor->kind == BF16)
        READ(uint16_t, widened)
    else if (tensor->kind == FP32)
        READ(float, )
    else
        READ(double, )
}

static void put(const Tensor *tensor, index_t first, index_t steps, int lanes, const vec *from)
{
    if (tensor->kind == BF16)
        WRITE(uint16_t, rounded)
    else if (tensor->kind == FP32)
        WRITE(float, )
    else
        WRITE(double, )
}

static vec *memory_of(index_t vectors)
{
    void *memory;
    return posix_memalign(&memory, 64, vectors * sizeof(vec)) ? NULL : memory;
}

static vec *taken(vec **memory, index_t count)
{
    vec *first = *memory;
    *memory += count;
    return first;
}
