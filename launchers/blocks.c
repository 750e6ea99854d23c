/* Large blocks of memory that stay when they are freed, yet never more than lived at once.
 *
 * glibc either gives a large block back at every free, and pays for faulting it in again, or keeps
 * it in one heap with small ones, which leave holes that nothing large fits into. Here large blocks
 * have pages of their own. A freed one stays warm (resident) for the next request that it fits
 * best. Where none fits, cold pages are taken and as many warm ones given back, so that live and
 * warm pages together are never more than the most that were live at once.
 *
 * Preloaded into ranks by launchers/blocks.py. Everything small is glibc's.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { LARGE = 128 << 10, MOST_ALIGNED = 4096, NONE = 0, MOST_RUNS = 1 << 20 };

static const size_t TIMES_MEMORY = 4; /* of addresses, so that fragments do not matter */

extern void *__libc_malloc(size_t);
extern void __libc_free(void *);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

enum kind { LIVE, WARM, COLD };

/* A run of pages. Runs lie one after another and are linked in that order. */
struct run {
    size_t start, pages;
    uint32_t before, after; /* in order of address; NONE at the ends */
    uint32_t left, right;   /* others of its kind: a ring through the kind's head, or spare ones */
    enum kind kind;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *region, *region_end;
static struct run *runs; /* 0 is none; WARM and COLD are the heads of their rings */
static uint32_t *run_at; /* by its first page */
static uint32_t num_runs = COLD + 1, spare;
static size_t page; /* bytes */
static size_t live, warm, most_live; /* pages */

static void *reserve(size_t bytes) {
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

static uint32_t new_run(size_t start, size_t pages) {
    uint32_t id = spare;
    if (id != NONE)
        spare = runs[id].right;
    else
        id = num_runs++;
    runs[id] = (struct run){.start = start, .pages = pages, .kind = LIVE};
    run_at[start] = id;
    return id;
}

static void leave_ring(uint32_t id) {
    struct run *run = &runs[id];
    if (run->kind == LIVE)
        return;
    runs[run->left].right = run->right;
    runs[run->right].left = run->left;
    if (run->kind == WARM)
        warm -= run->pages;
    run->kind = LIVE;
}

static void join_ring(uint32_t id, enum kind kind) {
    struct run *run = &runs[id], *head = &runs[kind];
    run->kind = kind;
    run->left = kind;
    run->right = head->right;
    runs[head->right].left = id;
    head->right = id;
    if (kind == WARM)
        warm += run->pages;
}

/* Joins a run that is in no ring with the one after it. */
static void swallow_next(uint32_t id) {
    struct run *run = &runs[id];
    uint32_t gone = run->after;
    leave_ring(gone);
    run->pages += runs[gone].pages;
    run->after = runs[gone].after;
    if (run->after != NONE)
        runs[run->after].before = id;
    runs[gone].right = spare;
    spare = gone;
}

/* Cuts a run that is in no ring; the rest is in none either. */
static uint32_t cut(uint32_t id, size_t pages) {
    uint32_t rest = new_run(runs[id].start + pages, runs[id].pages - pages);
    runs[rest].before = id;
    runs[rest].after = runs[id].after;
    if (runs[rest].after != NONE)
        runs[runs[rest].after].before = rest;
    runs[id].after = rest;
    runs[id].pages = pages;
    return rest;
}

/* Puts a run that is in no ring among the free ones, joined with its neighbours of that kind. */
static void set_free(uint32_t id, enum kind kind) {
    uint32_t before = runs[id].before, after = runs[id].after;
    if (after != NONE && runs[after].kind == kind)
        swallow_next(id);
    if (before != NONE && runs[before].kind == kind) {
        leave_ring(before);
        swallow_next(before);
        id = before;
    }
    join_ring(id, kind);
}

static uint32_t best_fit(enum kind kind, size_t pages) {
    uint32_t best = NONE;
    for (uint32_t id = runs[kind].right; id != kind; id = runs[id].right) {
        if (runs[id].pages == pages)
            return id;
        if (runs[id].pages > pages && (best == NONE || runs[id].pages < runs[best].pages))
            best = id;
    }
    return best;
}

static uint32_t largest_warm(void) {
    uint32_t best = NONE;
    for (uint32_t id = runs[WARM].right; id != WARM; id = runs[id].right)
        if (best == NONE || runs[id].pages > runs[best].pages)
            best = id;
    return best;
}

static void give_back(size_t pages) {
    while (pages && warm) {
        uint32_t id = largest_warm();
        leave_ring(id);
        if (runs[id].pages > pages) {
            uint32_t rest = cut(id, runs[id].pages - pages);
            join_ring(id, WARM);
            id = rest;
        }
        madvise(region + runs[id].start * page, runs[id].pages * page, MADV_DONTNEED);
        pages -= runs[id].pages;
        set_free(id, COLD);
    }
}

static void lock_all(void) { pthread_mutex_lock(&lock); }
static void unlock_all(void) { pthread_mutex_unlock(&lock); }

static int is_ready(void) {
    static int tried;
    if (tried)
        return region != NULL;
    tried = 1;
    page = sysconf(_SC_PAGESIZE);
    size_t pages = TIMES_MEMORY * sysconf(_SC_PHYS_PAGES), bytes = pages * page;
    runs = reserve(MOST_RUNS * sizeof *runs);
    run_at = reserve(pages * sizeof *run_at);
    char *at = reserve(bytes);
    if (!runs || !run_at || !at)
        return 0;
    for (uint32_t kind = WARM; kind <= COLD; kind++)
        runs[kind] = (struct run){.left = kind, .right = kind, .kind = LIVE};
    join_ring(new_run(0, pages), COLD);
    pthread_atfork(lock_all, unlock_all, unlock_all);
    region = at;
    region_end = at + bytes;
    return 1;
}

/* Gives back what would be more than ever lived, when so many cold pages are taken. */
static void make_room(size_t pages) {
    size_t limit = most_live > live + pages ? most_live : live + pages;
    if (live + warm + pages > limit)
        give_back(live + warm + pages - limit);
}

/* A live run of so many pages; NONE where the region has no room. */
static uint32_t take_run(size_t pages, int *is_zero) {
    uint32_t id = best_fit(WARM, pages);
    *is_zero = id == NONE;
    if (id == NONE) {
        make_room(pages);
        id = best_fit(COLD, pages);
    }
    if (id == NONE)
        return NONE;
    leave_ring(id);
    if (runs[id].pages > pages)
        join_ring(cut(id, pages), *is_zero ? COLD : WARM);
    live += pages;
    most_live = live > most_live ? live : most_live;
    return id;
}

/* Adds the first pages of the free run that follows, if there are enough of them. */
static void take_next(uint32_t id, size_t pages) {
    uint32_t next = runs[id].after;
    if (next == NONE || runs[next].kind == LIVE || runs[next].pages < pages)
        return;
    if (runs[next].kind == COLD) {
        make_room(pages);
        next = runs[id].after; /* what was given back may have joined it */
    }
    enum kind kind = runs[next].kind;
    leave_ring(next);
    if (runs[next].pages > pages)
        join_ring(cut(next, pages), kind);
    swallow_next(id);
}

/* A large block; NULL for a small one, or where there is no room for it. */
static void *take(size_t bytes, int *is_zero) {
    char *found = NULL;
    if (bytes < LARGE)
        return NULL;
    pthread_mutex_lock(&lock);
    if (is_ready() && bytes < (size_t)(region_end - region) && num_runs < MOST_RUNS - 2) {
        uint32_t id = take_run((bytes + page - 1) / page, is_zero);
        found = id == NONE ? NULL : region + runs[id].start * page;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static int is_ours(const void *at) { return (char *)at >= region && (char *)at < region_end; }

static size_t size_of(const void *at) {
    return runs[run_at[((char *)at - region) / page]].pages * page;
}

static void put_back(void *at) {
    pthread_mutex_lock(&lock);
    uint32_t id = run_at[((char *)at - region) / page];
    live -= runs[id].pages;
    set_free(id, WARM);
    pthread_mutex_unlock(&lock);
}

/* Whether a block could be made longer or shorter where it lies. */
static int resized(void *at, size_t bytes) {
    size_t pages = (bytes + page - 1) / page;
    pthread_mutex_lock(&lock);
    uint32_t id = run_at[((char *)at - region) / page];
    size_t had = runs[id].pages;
    if (pages < had)
        set_free(cut(id, pages), WARM);
    else if (pages > had)
        take_next(id, pages - had);
    live += runs[id].pages - had;
    most_live = live > most_live ? live : most_live;
    int is_done = runs[id].pages == pages;
    pthread_mutex_unlock(&lock);
    return is_done;
}

void *malloc(size_t bytes) {
    int is_zero;
    void *found = take(bytes, &is_zero);
    return found ? found : __libc_malloc(bytes);
}

void free(void *at) {
    if (is_ours(at))
        put_back(at);
    else
        __libc_free(at);
}

void *calloc(size_t count, size_t each) {
    size_t bytes;
    int is_zero;
    void *found = NULL;
    if (!__builtin_mul_overflow(count, each, &bytes))
        found = take(bytes, &is_zero);
    if (!found)
        return __libc_calloc(count, each);
    return is_zero ? found : memset(found, 0, bytes);
}

void *realloc(void *at, size_t bytes) {
    if (!is_ours(at))
        return __libc_realloc(at, bytes);
    size_t had = size_of(at);
    if (bytes >= LARGE && resized(at, bytes))
        return at;
    void *found = bytes ? malloc(bytes) : NULL;
    if (!found && bytes)
        return NULL;
    if (found)
        memcpy(found, at, had < bytes ? had : bytes);
    put_back(at);
    return found;
}

void *reallocarray(void *at, size_t count, size_t each) {
    size_t bytes;
    if (__builtin_mul_overflow(count, each, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    return realloc(at, bytes);
}

void *memalign(size_t alignment, size_t bytes) {
    int is_zero;
    void *found = alignment <= MOST_ALIGNED ? take(bytes, &is_zero) : NULL;
    return found ? found : __libc_memalign(alignment, bytes);
}

void *aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }

int posix_memalign(void **out, size_t alignment, size_t bytes) {
    if (alignment % sizeof(void *) || alignment & (alignment - 1) || !alignment)
        return EINVAL;
    *out = memalign(alignment, bytes);
    return *out ? 0 : ENOMEM;
}

size_t malloc_usable_size(void *at) {
    static size_t (*other)(void *);
    if (is_ours(at))
        return size_of(at);
    if (!other)
        other = (size_t(*)(void *))dlsym(RTLD_NEXT, "malloc_usable_size");
    return other(at);
}
