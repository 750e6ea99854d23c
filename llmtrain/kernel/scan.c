/* Mamba-1's selective scan on a CPU, forward and backward.

   h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t and y_t = (C_t h_t + D x_t) silu(z_t), with
   delta = softplus(dt + bias). A vector holds neighbouring channels, so that a step needs no sum
   over its lanes. The forward pass keeps the state before every chunk of steps; the backward pass
   computes a chunk's states again, in cache, and walks it from its end.

   Compiled with -DREAL=float, and with -DREAL=double for tests to compare with. */

#include "vectors.h"

typedef struct {
    index_t batch, length, channels, states, chunk_steps, threads, is_softplus;
    Tensor x, dt, z;
    const real *A;                /* [states, channels] */
    const real *B, *C;            /* [batch, length, states] */
    const real *skip, *bias;      /* [channels], or null */
    const uint8_t *is_continued;  /* [batch, length], or null: 0 where the state starts from zero */
    real *starts;                 /* [chunks, batch, states, channels] */
} Scan;

/* ---- a chunk: some steps of a vector of channels ---- */

typedef struct {
    vec *x, *delta, *step, *z, *y; /* [steps]; step is delta before its softplus */
    vec *path;                     /* [steps + 1, states]: before the first step, after each */
    vec *decay;                    /* [steps, states] */
    vec *made;                     /* [steps] of a result */
} Chunk;

static index_t chunk_vectors(const Scan *scan)
{
    return 6 * scan->chunk_steps + (2 * scan->chunk_steps + 1) * scan->states;
}

static Chunk chunk_in(const Scan *scan, vec **memory)
{
    index_t steps = scan->chunk_steps, states = scan->states;
    Chunk chunk;
    chunk.x = taken(memory, steps);
    chunk.delta = taken(memory, steps);
    chunk.step = taken(memory, steps);
    chunk.z = taken(memory, steps);
    chunk.y = taken(memory, steps);
    chunk.made = taken(memory, steps);
    chunk.path = taken(memory, (steps + 1) * states);
    chunk.decay = taken(memory, steps * states);
    return chunk;
}

/* Read a chunk's inputs and walk its states from path[0]; y is C h + D x, before the gate. */
static void walk(const Scan *scan, Chunk *chunk, const vec *A, index_t b, index_t channel,
                 int lanes, index_t begin, index_t steps)
{
    index_t states = scan->states;
    vec skip = scan->skip ? load(scan->skip + channel, lanes) : all(0);
    vec bias = scan->bias ? load(scan->bias + channel, lanes) : all(0);
    fetch(&scan->x, offset(&scan->x, b, channel, begin), steps, lanes, chunk->x);
    fetch(&scan->dt, offset(&scan->dt, b, channel, begin), steps, lanes, chunk->step);
    if (scan->z.data)
        fetch(&scan->z, offset(&scan->z, b, channel, begin), steps, lanes, chunk->z);
    for (index_t t = 0; t < steps; t++) {
        index_t place = b * scan->length + begin + t;
        const real *B = scan->B + place * states, *C = scan->C + place * states;
        vec step = chunk->step[t] + bias;
        vec delta = scan->is_softplus ? softplus(step) : step;
        vec update = delta * chunk->x[t], y = skip * chunk->x[t];
        const vec *before = chunk->path + t * states;
        vec *after = chunk->path + (t + 1) * states, *decay = chunk->decay + t * states;
        chunk->step[t] = step;
        chunk->delta[t] = delta;
        if (scan->is_continued && !scan->is_continued[place]) {
            for (index_t n = 0; n < states; n++) {
                decay[n] = all(0);
                after[n] = B[n] * update;
                y += C[n] * after[n];
            }
        } else {
            for (index_t n = 0; n < states; n++) {
                decay[n] = exp_of(delta * A[n]);
                after[n] = decay[n] * before[n] + B[n] * update;
                y += C[n] * after[n];
            }
        }
        chunk->y[t] = y;
    }
}

static int lanes_at(const Scan *scan, index_t channel)
{
    index_t left = scan->channels - channel;
    return left < LANES ? (int)left : LANES;
}

static index_t steps_at(const Scan *scan, index_t begin)
{
    index_t left = scan->length - begin;
    return left < scan->chunk_steps ? left : scan->chunk_steps;
}

static real *start_at(const Scan *scan, index_t number, index_t b, index_t channel)
{
    return scan->starts + (number * scan->batch + b) * scan->states * scan->channels + channel;
}

/* Returns 0, or 1 where there is no memory. out [batch, channel, time], last [batch, states,
   channels] */
int scan_forward(const Scan *scan, const Tensor *out, real *last)
{
    index_t states = scan->states, channels = scan->channels;
    index_t blocks = (channels + LANES - 1) / LANES;
    int failed = 0;
#pragma omp parallel num_threads(scan->threads)
    {
        vec *memory = memory_of(chunk_vectors(scan) + states), *rest = memory;
        if (!memory)
            failed = 1;
        else {
            Chunk chunk = chunk_in(scan, &rest);
            vec *A = taken(&rest, states);
#pragma omp for collapse(2) schedule(static) nowait
            for (index_t b = 0; b < scan->batch; b++)
                for (index_t block = 0; block < blocks; block++) {
                    index_t channel = block * LANES, begin = 0, number = 0;
                    int lanes = lanes_at(scan, channel);
                    for (index_t n = 0; n < states; n++) {
                        A[n] = load(scan->A + n * channels + channel, lanes);
                        chunk.path[n] = all(0);
                    }
                    for (; begin < scan->length; begin += scan->chunk_steps, number++) {
                        index_t steps = steps_at(scan, begin);
                        real *start = start_at(scan, number, b, channel);
                        for (index_t n = 0; n < states; n++)
                            store(start + n * channels, lanes, chunk.path[n]);
                        walk(scan, &chunk, A, b, channel, lanes, begin, steps);
                        if (scan->z.data)
                            for (index_t t = 0; t < steps; t++)
                                chunk.y[t] *= chunk.z[t] * sigmoid(chunk.z[t]);
                        put(out, offset(out, b, channel, begin), steps, lanes, chunk.y);
                        memcpy(chunk.path, chunk.path + steps * states, states * sizeof(vec));
                    }
                    for (index_t n = 0; n < states; n++)
                        store(last + (b * states + n) * channels + channel, lanes, chunk.path[n]);
                }
            free(memory);
        }
    }
    return failed;
}

typedef struct {
    Tensor out, x, dt, z;     /* of out as it is given, of the others as they are to be written */
    real *last, *A;           /* [batch, states, channels]: given; written */
    real *B, *C;              /* [splits, batch, length, states], each split over its channels */
    real *skip, *bias;        /* [batch, channels] */
    index_t splits;           /* into how many parts the channels of a sequence are dealt */
} Gradients;

/* What one part of a sequence's channels carries from chunk to chunk, by blocks of channels. */
typedef struct {
    vec *adjoint, *A;   /* [blocks, states] */
    vec *skip, *bias;   /* [blocks] */
    vec *B, *C;         /* [steps, states]: of the chunk alone */
    vec *A_of_block;    /* [states] */
} Carried;

/* Walk a chunk from its end: g_t = C_t dy_t + decay_{t+1} g_{t+1} is the gradient of a state. */
static void walk_back(const Scan *scan, Chunk *chunk, const Gradients *grads, Carried *carried,
                      index_t block, index_t b, index_t channel, int lanes, index_t begin,
                      index_t steps)
{
    index_t states = scan->states;
    vec skip = scan->skip ? load(scan->skip + channel, lanes) : all(0);
    vec *adjoint = carried->adjoint + block * states, *of_A = carried->A + block * states;
    vec *given = chunk->made;
    fetch(&grads->out, offset(&grads->out, b, channel, begin), steps, lanes, given);
    for (index_t t = steps - 1; t >= 0; t--) {
        index_t place = b * scan->length + begin + t;
        const real *B = scan->B + place * states, *C = scan->C + place * states;
        const vec *before = chunk->path + t * states, *after = before + states;
        const vec *decay = chunk->decay + t * states;
        vec *of_B = carried->B + t * states, *of_C = carried->C + t * states;
        vec x = chunk->x[t], delta = chunk->delta[t], update = delta * x, of_y = given[t];
        if (scan->z.data) {
            vec z = chunk->z[t], gate = sigmoid(z);
            chunk->z[t] = of_y * chunk->y[t] * gate * (1 + z * (1 - gate));
            of_y *= z * gate;
        }
        vec of_update = all(0), of_delta = all(0);
        for (index_t n = 0; n < states; n++) {
            vec g = adjoint[n] + C[n] * of_y;
            vec passed = g * decay[n], of_exponent = passed * before[n];
            of_C[n] += of_y * after[n];
            of_B[n] += g * update;
            of_update += B[n] * g;
            of_delta += of_exponent * carried->A_of_block[n];
            of_A[n] += of_exponent * delta;
            adjoint[n] = passed;
        }
        of_delta += of_update * x;
        if (scan->is_softplus)
            of_delta *= sigmoid(chunk->step[t]);
        carried->skip[block] += of_y * x;
        carried->bias[block] += of_delta;
        chunk->x[t] = of_update * delta + skip * of_y;
        chunk->step[t] = of_delta;
    }
    put(&grads->x, offset(&grads->x, b, channel, begin), steps, lanes, chunk->x);
    put(&grads->dt, offset(&grads->dt, b, channel, begin), steps, lanes, chunk->step);
    if (scan->z.data)
        put(&grads->z, offset(&grads->z, b, channel, begin), steps, lanes, chunk->z);
}

static void part_back(const Scan *scan, const Gradients *grads, index_t b, index_t split,
                      index_t first, index_t end, vec *memory)
{
    index_t states = scan->states, channels = scan->channels, blocks = end - first;
    index_t chunks = (scan->length + scan->chunk_steps - 1) / scan->chunk_steps;
    Chunk chunk = chunk_in(scan, &memory);
    Carried carried;
    carried.A_of_block = taken(&memory, states);
    carried.B = taken(&memory, scan->chunk_steps * states);
    carried.C = taken(&memory, scan->chunk_steps * states);
    carried.adjoint = taken(&memory, blocks * states);
    carried.A = taken(&memory, blocks * states);
    carried.skip = taken(&memory, blocks);
    carried.bias = taken(&memory, blocks);
    memset(carried.A, 0, (blocks * states + 2 * blocks) * sizeof(vec));
    for (index_t block = 0; block < blocks; block++)
        for (index_t n = 0; n < states; n++) {
            index_t channel = (first + block) * LANES;
            real *row = grads->last + (b * states + n) * channels + channel;
            carried.adjoint[block * states + n] = load(row, lanes_at(scan, channel));
        }
    for (index_t number = chunks - 1; number >= 0; number--) {
        index_t begin = number * scan->chunk_steps, steps = steps_at(scan, begin);
        memset(carried.B, 0, 2 * scan->chunk_steps * states * sizeof(vec));
        for (index_t block = 0; block < blocks; block++) {
            index_t channel = (first + block) * LANES;
            int lanes = lanes_at(scan, channel);
            const real *start = start_at(scan, number, b, channel);
            for (index_t n = 0; n < states; n++) {
                chunk.path[n] = load(start + n * channels, lanes);
                carried.A_of_block[n] = load(scan->A + n * channels + channel, lanes);
            }
            walk(scan, &chunk, carried.A_of_block, b, channel, lanes, begin, steps);
            walk_back(scan, &chunk, grads, &carried, block, b, channel, lanes, begin, steps);
        }
        index_t place = ((split * scan->batch + b) * scan->length + begin) * states;
        for (index_t item = 0; item < steps * states; item++) {
            grads->B[place + item] = sum_of(carried.B[item]);
            grads->C[place + item] = sum_of(carried.C[item]);
        }
    }
    for (index_t block = 0; block < blocks; block++) {
        index_t channel = (first + block) * LANES;
        int lanes = lanes_at(scan, channel);
        for (index_t n = 0; n < states; n++)
            store(grads->A + (b * states + n) * channels + channel, lanes,
                  carried.A[block * states + n]);
        store(grads->skip + b * channels + channel, lanes, carried.skip[block]);
        store(grads->bias + b * channels + channel, lanes, carried.bias[block]);
    }
}

/* Returns 0, or 1 where there is no memory. */
int scan_backward(const Scan *scan, const Gradients *grads)
{
    index_t states = scan->states, splits = grads->splits;
    index_t blocks = (scan->channels + LANES - 1) / LANES;
    index_t most = (blocks + splits - 1) / splits;
    index_t vectors = chunk_vectors(scan) + states * (1 + 2 * scan->chunk_steps);
    vectors += most * (2 * states + 2);
    int failed = 0;
#pragma omp parallel num_threads(scan->threads)
    {
        vec *memory = memory_of(vectors);
        if (!memory)
            failed = 1;
        else {
#pragma omp for collapse(2) schedule(dynamic) nowait
            for (index_t b = 0; b < scan->batch; b++)
                for (index_t split = 0; split < splits; split++)
                    part_back(scan, grads, b, split, split * blocks / splits,
                              (split + 1) * blocks / splits, memory);
            free(memory);
        }
    }
    return failed;
}
