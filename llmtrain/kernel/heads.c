/* Mamba-2's scan on a CPU, forward and backward: one decay for all of a head.

   h_t = decay_t h_{t-1} + B_t (delta_t x_t)' and y_t = C_t h_t + D x_t. A vector holds neighbouring
   channels of a head. The forward pass keeps the state before every chunk of steps; the backward
   pass computes from it the states before every span of a few steps, and those of a span in cache,
   which it walks from its end. */

#include "vectors.h"

enum { SPAN = 8 }; /* steps whose states are in cache together */

typedef struct {
    index_t batch, length, heads, width, groups, states, chunk_steps, threads;
    Tensor x;                  /* its channels are heads x width */
    const real *delta, *decay; /* [batch, length, heads] */
    const real *B, *C;         /* [batch, length, groups, states] */
    const real *skip;          /* [heads], or null */
    real *starts;              /* [chunks, batch, heads, states, vectors of a head] */
} Scan;

typedef struct {
    Tensor out, x;        /* of out as it is given, of x as it is to be written */
    real *delta, *decay;  /* [batch, length, heads] */
    real *B, *C;          /* [splits, batch, length, groups, states], to which is added */
    real *skip;           /* [batch, heads] */
    const real *last;     /* [batch, heads, states, vectors of a head]: of the last state */
    index_t splits;       /* into how many parts the heads of a sequence are dealt */
} Gradients;

static index_t vectors_of(const Scan *scan) { return (scan->width + LANES - 1) / LANES; }
static index_t state_of(const Scan *scan) { return scan->states * vectors_of(scan); }

static vec *start_at(const Scan *scan, index_t number, index_t b, index_t head)
{
    return (vec *)scan->starts +
           ((number * scan->batch + b) * scan->heads + head) * state_of(scan);
}

/* A span of a head's rows [vectors, SPAN], from or to a tensor. */
static void each_row(const Tensor *tensor, index_t width, index_t b, index_t head, index_t begin,
                     index_t steps, vec *rows, int is_put)
{
    for (index_t v = 0; v * LANES < width; v++) {
        int lanes = width - v * LANES < LANES ? (int)(width - v * LANES) : LANES;
        index_t first = offset(tensor, b, head * width + v * LANES, begin);
        if (is_put)
            put(tensor, first, steps, lanes, rows + v * SPAN);
        else
            fetch(tensor, first, steps, lanes, rows + v * SPAN);
    }
}

/* Walk a span's states. They lie one after the other from ``state`` on where ``stride`` is their
   size, and in one place where it is 0. The outputs are left out where nobody wants them. */
static inline __attribute__((always_inline)) void span_of(const Scan *scan, index_t vectors,
                                                          index_t b, index_t head, index_t begin,
                                                          index_t steps, const vec *x, vec *state,
                                                          index_t stride, vec *y, int wants_y)
{
    index_t states = scan->states, group = head / (scan->heads / scan->groups);
    real skip = scan->skip ? scan->skip[head] : 0;
    for (index_t t = 0; t < steps; t++) {
        index_t place = b * scan->length + begin + t;
        real delta = scan->delta[place * scan->heads + head];
        real decay = scan->decay[place * scan->heads + head];
        const real *B = scan->B + (place * scan->groups + group) * states;
        const real *C = scan->C + (place * scan->groups + group) * states;
        const vec *before = state + t * stride;
        vec *after = state + (t + 1) * stride, update[vectors], sum[vectors];
        for (index_t v = 0; v < vectors; v++) {
            update[v] = delta * x[v * SPAN + t];
            sum[v] = skip * x[v * SPAN + t];
        }
        for (index_t n = 0; n < states; n++)
            for (index_t v = 0; v < vectors; v++) {
                vec made = decay * before[n * vectors + v] + B[n] * update[v];
                after[n * vectors + v] = made;
                if (wants_y)
                    sum[v] += C[n] * made;
            }
        if (wants_y)
            for (index_t v = 0; v < vectors; v++)
                y[v * SPAN + t] = sum[v];
    }
}

/* The usual widths of a head have loops of their own, whose sums stay in registers. */
static void outputs(const Scan *scan, index_t b, index_t head, index_t begin, index_t steps,
                    const vec *x, vec *state, vec *y)
{
    switch (vectors_of(scan)) {
    case 2: span_of(scan, 2, b, head, begin, steps, x, state, 0, y, 1); break;
    case 4: span_of(scan, 4, b, head, begin, steps, x, state, 0, y, 1); break;
    case 8: span_of(scan, 8, b, head, begin, steps, x, state, 0, y, 1); break;
    default: span_of(scan, vectors_of(scan), b, head, begin, steps, x, state, 0, y, 1);
    }
}

static void states(const Scan *scan, index_t b, index_t head, index_t begin, index_t steps,
                   const vec *x, vec *state, index_t stride)
{
    switch (vectors_of(scan)) {
    case 2: span_of(scan, 2, b, head, begin, steps, x, state, stride, NULL, 0); break;
    case 4: span_of(scan, 4, b, head, begin, steps, x, state, stride, NULL, 0); break;
    case 8: span_of(scan, 8, b, head, begin, steps, x, state, stride, NULL, 0); break;
    default: span_of(scan, vectors_of(scan), b, head, begin, steps, x, state, stride, NULL, 0);
    }
}

static index_t least(index_t a, index_t b) { return a < b ? a : b; }

/* Returns 0, or 1 where there is no memory. */
int heads_forward(const Scan *scan, const Tensor *out, real *last)
{
    index_t vectors = vectors_of(scan), size = state_of(scan);
    int failed = 0;
#pragma omp parallel num_threads(scan->threads)
    {
        vec *memory = memory_of(size + 2 * vectors * SPAN), *rest = memory;
        if (!memory)
            failed = 1;
        else {
            vec *state = taken(&rest, size), *x = taken(&rest, vectors * SPAN);
            vec *y = taken(&rest, vectors * SPAN);
#pragma omp for collapse(2) schedule(static) nowait
            for (index_t b = 0; b < scan->batch; b++)
                for (index_t head = 0; head < scan->heads; head++) {
                    memset(state, 0, size * sizeof(vec));
                    for (index_t begin = 0; begin < scan->length; begin += SPAN) {
                        index_t steps = least(SPAN, scan->length - begin);
                        if (begin % scan->chunk_steps == 0)
                            memcpy(start_at(scan, begin / scan->chunk_steps, b, head), state,
                                   size * sizeof(vec));
                        each_row(&scan->x, scan->width, b, head, begin, steps, x, 0);
                        outputs(scan, b, head, begin, steps, x, state, y);
                        each_row(out, scan->width, b, head, begin, steps, y, 1);
                    }
                    memcpy((vec *)last + (b * scan->heads + head) * size, state,
                           size * sizeof(vec));
                }
            free(memory);
        }
    }
    return failed;
}

/* What a part of a sequence's heads needs for a chunk. */
typedef struct {
    vec *x, *out;    /* [vectors, SPAN]: x becomes its own gradient */
    vec *path;       /* [SPAN + 1, states, vectors] */
    vec *starts;     /* [spans of a chunk, states, vectors] */
    vec *B, *C;      /* [chunk_steps, states]: gradients, of the heads of a group */
    vec *adjoint;    /* [heads of the part, states, vectors] */
} Memory;

/* Walk a span from its end: g_t = C_t dy_t + decay_{t+1} g_{t+1} is the gradient of a state. */
static inline __attribute__((always_inline)) void
back_of(const Scan *scan, index_t vectors, const Gradients *grads, Memory *memory, vec *adjoint,
        index_t b, index_t head, index_t begin, index_t steps)
{
    index_t states = scan->states, group = head / (scan->heads / scan->groups);
    real skip = scan->skip ? scan->skip[head] : 0, of_skip = 0;
    for (index_t t = steps - 1; t >= 0; t--) {
        index_t place = b * scan->length + begin + t, number = place * scan->heads + head;
        index_t in_chunk = (begin + t) % scan->chunk_steps;
        real delta = scan->delta[number], decay = scan->decay[number];
        const real *B = scan->B + (place * scan->groups + group) * states;
        const real *C = scan->C + (place * scan->groups + group) * states;
        const vec *before = memory->path + t * states * vectors;
        const vec *after = before + states * vectors;
        vec *of_B = memory->B + in_chunk * states, *of_C = memory->C + in_chunk * states;
        vec of_update[vectors], update[vectors], given[vectors], of_decay = all(0);
        for (index_t v = 0; v < vectors; v++) {
            given[v] = memory->out[v * SPAN + t];
            update[v] = delta * memory->x[v * SPAN + t];
            of_update[v] = all(0);
        }
        for (index_t n = 0; n < states; n++) {
            vec to_B = all(0), to_C = all(0);
            for (index_t v = 0; v < vectors; v++) {
                index_t item = n * vectors + v;
                vec g = adjoint[item] + C[n] * given[v];
                to_C += given[v] * after[item];
                to_B += g * update[v];
                of_update[v] += B[n] * g;
                of_decay += g * before[item];
                adjoint[item] = g * decay;
            }
            of_B[n] += to_B;
            of_C[n] += to_C;
        }
        vec of_delta = all(0), skipped = all(0);
        for (index_t v = 0; v < vectors; v++) {
            vec x = memory->x[v * SPAN + t];
            of_delta += of_update[v] * x;
            skipped += given[v] * x;
            memory->x[v * SPAN + t] = of_update[v] * delta + skip * given[v];
        }
        of_skip += sum_of(skipped);
        grads->delta[number] = sum_of(of_delta);
        grads->decay[number] = sum_of(of_decay);
    }
    grads->skip[b * scan->heads + head] += of_skip;
}

static void back(const Scan *scan, const Gradients *grads, Memory *memory, vec *adjoint, index_t b,
                 index_t head, index_t begin, index_t steps)
{
    switch (vectors_of(scan)) {
    case 2: back_of(scan, 2, grads, memory, adjoint, b, head, begin, steps); break;
    case 4: back_of(scan, 4, grads, memory, adjoint, b, head, begin, steps); break;
    case 8: back_of(scan, 8, grads, memory, adjoint, b, head, begin, steps); break;
    default: back_of(scan, vectors_of(scan), grads, memory, adjoint, b, head, begin, steps);
    }
}

/* One head over one chunk: its states again, and then their gradients. */
static void chunk_back(const Scan *scan, const Gradients *grads, Memory *memory, vec *adjoint,
                       index_t b, index_t head, index_t number)
{
    index_t size = state_of(scan), first = number * scan->chunk_steps;
    index_t end = least(first + scan->chunk_steps, scan->length);
    vec *state = memory->path;
    memcpy(state, start_at(scan, number, b, head), size * sizeof(vec));
    for (index_t begin = first; begin < end; begin += SPAN) {
        memcpy(memory->starts + (begin - first) / SPAN * size, state, size * sizeof(vec));
        if (begin + SPAN < end) {
            each_row(&scan->x, scan->width, b, head, begin, SPAN, memory->x, 0);
            states(scan, b, head, begin, SPAN, memory->x, state, 0);
        }
    }
    for (index_t begin = first + (end - first - 1) / SPAN * SPAN; begin >= first; begin -= SPAN) {
        index_t steps = least(SPAN, end - begin);
        memcpy(memory->path, memory->starts + (begin - first) / SPAN * size, size * sizeof(vec));
        each_row(&scan->x, scan->width, b, head, begin, steps, memory->x, 0);
        each_row(&grads->out, scan->width, b, head, begin, steps, memory->out, 0);
        states(scan, b, head, begin, steps, memory->x, memory->path, size);
        back(scan, grads, memory, adjoint, b, head, begin, steps);
        each_row(&grads->x, scan->width, b, head, begin, steps, memory->x, 1);
    }
}

static void part_back(const Scan *scan, const Gradients *grads, index_t b, index_t split,
                      index_t first, index_t end, Memory *memory)
{
    index_t states = scan->states, size = state_of(scan), in_group = scan->heads / scan->groups;
    index_t chunks = (scan->length + scan->chunk_steps - 1) / scan->chunk_steps;
    memcpy(memory->adjoint, (const vec *)grads->last + (b * scan->heads + first) * size,
           (end - first) * size * sizeof(vec));
    for (index_t head = first; head < end; head++)
        grads->skip[b * scan->heads + head] = 0;
    for (index_t number = chunks - 1; number >= 0; number--) {
        index_t begin = number * scan->chunk_steps;
        index_t steps = least(scan->chunk_steps, scan->length - begin);
        for (index_t head = first; head < end; head++) {
            if (head == first || head % in_group == 0)
                memset(memory->B, 0, 2 * scan->chunk_steps * states * sizeof(vec));
            chunk_back(scan, grads, memory, memory->adjoint + (head - first) * size, b, head,
                       number);
            if (head != end - 1 && (head + 1) % in_group != 0)
                continue;
            for (index_t t = 0; t < steps; t++) {
                index_t place = (split * scan->batch + b) * scan->length + begin + t;
                index_t row = (place * scan->groups + head / in_group) * states;
                for (index_t n = 0; n < states; n++) {
                    grads->B[row + n] = sum_of(memory->B[t * states + n]);
                    grads->C[row + n] = sum_of(memory->C[t * states + n]);
                }
            }
        }
    }
}

/* Returns 0, or 1 where there is no memory. */
int heads_backward(const Scan *scan, const Gradients *grads)
{
    index_t vectors = vectors_of(scan), size = state_of(scan), splits = grads->splits;
    index_t most = (scan->heads + splits - 1) / splits;
    index_t spans = (scan->chunk_steps + SPAN - 1) / SPAN;
    index_t count = 2 * vectors * SPAN + (SPAN + 1 + spans + most) * size;
    int failed = 0;
    count += 2 * scan->chunk_steps * scan->states;
#pragma omp parallel num_threads(scan->threads)
    {
        vec *block = memory_of(count), *rest = block;
        if (!block)
            failed = 1;
        else {
            Memory memory;
            memory.x = taken(&rest, vectors * SPAN);
            memory.out = taken(&rest, vectors * SPAN);
            memory.path = taken(&rest, (SPAN + 1) * size);
            memory.starts = taken(&rest, spans * size);
            memory.B = taken(&rest, scan->chunk_steps * scan->states);
            memory.C = taken(&rest, scan->chunk_steps * scan->states);
            memory.adjoint = taken(&rest, most * size);
#pragma omp for collapse(2) schedule(dynamic) nowait
            for (index_t b = 0; b < scan->batch; b++)
                for (index_t split = 0; split < splits; split++)
                    part_back(scan, grads, b, split, split * scan->heads / splits,
                              (split + 1) * scan->heads / splits, &memory);
            free(block);
        }
    }
    return failed;
}
