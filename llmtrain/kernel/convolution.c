/* A causal depthwise convolution over time and its SiLU, forward and backward.

   y_t = silu(bias + sum_w weight_w x_{t - W + 1 + w}), of which a tap counts where it lies in the
   document of t. What comes before the SiLU is computed again in the backward pass. */

#include "vectors.h"

typedef struct {
    index_t batch, length, channels, taps, threads, is_silu;
    Tensor x;
    const real *weight;  /* [taps, channels] */
    const real *bias;    /* [channels], or null */
    const uint8_t *seen; /* [batch, length], or null: how many tokens before t its taps may see */
} Convolution;

typedef struct {
    Tensor out, x;       /* of out as it is given, of x as it is to be written */
    real *weight, *bias; /* [batch, taps, channels], [batch, channels] */
} Gradients;

static int lanes_at(const Convolution *of, index_t channel)
{
    index_t left = of->channels - channel;
    return left < LANES ? (int)left : LANES;
}

static inline index_t seen_at(const Convolution *of, index_t b, index_t t)
{
    index_t most = of->taps - 1 < t ? of->taps - 1 : t;
    index_t seen = of->seen ? of->seen[b * of->length + t] : most;
    return seen < most ? seen : most;
}

/* Before the SiLU. */
static inline vec sum_at(const Convolution *of, const vec *x, const vec *weight, vec bias,
                         index_t b, index_t t)
{
    for (index_t back = seen_at(of, b, t); back >= 0; back--)
        bias += weight[of->taps - 1 - back] * x[t - back];
    return bias;
}

static index_t weights(const Convolution *of, index_t channel, int lanes, vec *weight, vec *bias)
{
    for (index_t tap = 0; tap < of->taps; tap++)
        weight[tap] = load(of->weight + tap * of->channels + channel, lanes);
    *bias = of->bias ? load(of->bias + channel, lanes) : all(0);
    return of->taps;
}

/* Returns 0, or 1 where there is no memory. */
int convolution_forward(const Convolution *of, const Tensor *out)
{
    index_t blocks = (of->channels + LANES - 1) / LANES;
    int failed = 0;
#pragma omp parallel num_threads(of->threads)
    {
        vec *memory = memory_of(2 * of->length + of->taps), *rest = memory;
        if (!memory)
            failed = 1;
        else {
            vec *x = taken(&rest, of->length), *y = taken(&rest, of->length), bias;
            vec *weight = taken(&rest, of->taps);
#pragma omp for collapse(2) schedule(static) nowait
            for (index_t b = 0; b < of->batch; b++)
                for (index_t block = 0; block < blocks; block++) {
                    index_t channel = block * LANES;
                    int lanes = lanes_at(of, channel);
                    weights(of, channel, lanes, weight, &bias);
                    fetch(&of->x, offset(&of->x, b, channel, 0), of->length, lanes, x);
                    for (index_t t = 0; t < of->length; t++) {
                        vec sum = sum_at(of, x, weight, bias, b, t);
                        y[t] = of->is_silu ? sum * sigmoid(sum) : sum;
                    }
                    put(out, offset(out, b, channel, 0), of->length, lanes, y);
                }
            free(memory);
        }
    }
    return failed;
}

/* Returns 0, or 1 where there is no memory. */
int convolution_backward(const Convolution *of, const Gradients *grads)
{
    index_t blocks = (of->channels + LANES - 1) / LANES, taps = of->taps;
    int failed = 0;
#pragma omp parallel num_threads(of->threads)
    {
        vec *memory = memory_of(3 * of->length + 2 * taps), *rest = memory;
        if (!memory)
            failed = 1;
        else {
            vec *x = taken(&rest, of->length), *out = taken(&rest, of->length), bias;
            vec *of_x = taken(&rest, of->length);
            vec *weight = taken(&rest, taps), *of_weight = taken(&rest, taps);
#pragma omp for collapse(2) schedule(static) nowait
            for (index_t b = 0; b < of->batch; b++)
                for (index_t block = 0; block < blocks; block++) {
                    index_t channel = block * LANES;
                    int lanes = lanes_at(of, channel);
                    vec of_bias = all(0);
                    weights(of, channel, lanes, weight, &bias);
                    memset(of_weight, 0, taps * sizeof(vec));
                    memset(of_x, 0, of->length * sizeof(vec));
                    fetch(&of->x, offset(&of->x, b, channel, 0), of->length, lanes, x);
                    fetch(&grads->out, offset(&grads->out, b, channel, 0), of->length, lanes, out);
                    for (index_t t = 0; t < of->length; t++) {
                        vec given = out[t];
                        if (of->is_silu) {
                            vec sum = sum_at(of, x, weight, bias, b, t), gate = sigmoid(sum);
                            given *= gate * (1 + sum * (1 - gate));
                        }
                        of_bias += given;
                        for (index_t back = seen_at(of, b, t); back >= 0; back--) {
                            of_weight[taps - 1 - back] += given * x[t - back];
                            of_x[t - back] += given * weight[taps - 1 - back];
                        }
                    }
                    put(&grads->x, offset(&grads->x, b, channel, 0), of->length, lanes, of_x);
                    for (index_t tap = 0; tap < taps; tap++)
                        store(grads->weight + (b * taps + tap) * of->channels + channel, lanes,
                              of_weight[tap]);
                    store(grads->bias + b * of->channels + channel, lanes, of_bias);
                }
            free(memory);
        }
    }
    return failed;
}
