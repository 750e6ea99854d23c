/* The cross-entropy of rows of logits, which become their gradient: softmax minus one-hot.

   A row is in cache from its largest value to its gradient. */

#include "vectors.h"

typedef struct {
    index_t rows, columns, kind, threads;
    void *logits;          /* [rows, columns], side by side */
    const int64_t *labels; /* [rows]; below 0 a row has no loss and no gradient */
    real *losses;          /* [rows] */
} Rows;

static Tensor row_of(const Rows *rows, index_t row)
{
    static const index_t sizes[] = {4, 2, 8};
    return (Tensor){(char *)rows->logits + row * rows->columns * sizes[rows->kind], 0, 1, LANES,
                    rows->kind};
}

static int row_loss(const Rows *rows, index_t row, vec *values)
{
    index_t columns = rows->columns, whole = columns / LANES, label = rows->labels[row];
    int rest = (int)(columns % LANES);
    Tensor tensor = row_of(rows, row);
    if (label >= columns)
        return 2;
    if (label < 0) {
        memset(values, 0, (whole + 1) * sizeof(vec));
        rows->losses[row] = 0;
    } else {
        fetch(&tensor, 0, whole, LANES, values);
        if (rest)
            fetch(&tensor, whole * LANES, 1, rest, values + whole);
        real most = ((real *)values)[0], sum = 0, *each = (real *)values;
        vec largest = all(most), total = all(0);
        for (index_t v = 0; v < whole; v++)
            largest = pick(values[v] > largest, values[v], largest);
        FOR_LANES most = largest[lane] > most ? largest[lane] : most;
        for (int lane = 0; lane < rest; lane++)
            most = values[whole][lane] > most ? values[whole][lane] : most;
        real of_label = each[label];
        for (index_t v = 0; v < whole; v++) {
            values[v] = exp_of(values[v] - most);
            total += values[v];
        }
        sum = sum_of(total);
        if (rest) {
            values[whole] = exp_of(values[whole] - most);
            for (int lane = 0; lane < rest; lane++)
                sum += values[whole][lane];
        }
        rows->losses[row] = most - of_label + (sizeof(real) == 4 ? logf(sum) : log(sum));
        real share = 1 / sum;
        for (index_t v = 0; v < whole + (rest > 0); v++)
            values[v] *= share;
        each[label] -= 1;
    }
    put(&tensor, 0, whole, LANES, values);
    if (rest)
        put(&tensor, whole * LANES, 1, rest, values + whole);
    return 0;
}

/* Returns 0, 1 where there is no memory, or 2 where a label is no column. */
int cross_entropy(const Rows *rows)
{
    int failed = 0;
#pragma omp parallel num_threads(rows->threads)
    {
        vec *values = memory_of(rows->columns / LANES + 1);
        if (!values)
            failed = 1;
        else {
#pragma omp for schedule(static) nowait
            for (index_t row = 0; row < rows->rows; row++)
                if (row_loss(rows, row, values))
                    failed = 2;
            free(values);
        }
    }
    return failed;
}
