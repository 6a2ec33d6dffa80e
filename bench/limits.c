/* What the machine can do, measured without merging anything; bench/merge.py runs this beside the merges.
 *
 *   limits copy MIB THREADS REPEATS                     a STREAM-like copy: bytes read + bytes written a second
 *   limits pass READ WRITE OUT BLOCK THREADS INPUT...   reads every input, writes OUT (as large as the largest input)
 *   limits warm FILE... | evict FILE... | resident FILE...   the page cache of files
 *
 * READ is buffered or direct (O_DIRECT). WRITE is tmpfs (no fsync) or, with an fsync that the time includes, buffered, early
 * (preallocated, and write-back of each block starts at once, so that reading and writing overlap) or direct. A block is
 * read from all inputs, then written: the order of a merge, with the arithmetic left out.
 * Every command prints one line of JSON.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define MAX_THREADS 64
#define MAX_INPUTS 16
#define ALIGNMENT 4096

static _Noreturn void fail(const char *what, const char *name) {
    fprintf(stderr, "limits: %s %s: %s\n", what, name, strerror(errno));
    exit(1);
}

static _Noreturn void usage(void) {
    fprintf(stderr, "usage: limits copy MIB THREADS REPEATS | pass READ WRITE OUT BLOCK THREADS INPUT... | warm|evict|resident FILE...\n");
    exit(2);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static off_t size_of(int file, const char *name) {
    struct stat s;
    if (fstat(file, &s)) fail("stat", name);
    return s.st_size;
}

static int open_input(const char *name, int flags) {
    int file = open(name, O_RDONLY | flags);
    if (file < 0) fail("open", name);
    return file;
}

static char *buffer(size_t bytes) {
    char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) fail("mmap", "buffer");
    madvise(p, bytes, MADV_HUGEPAGE);
    memset(p, 1, bytes);
    return p;
}

/* ---- copy ---- */

/* Streaming stores: without them every written line is read first, which the byte count would not show. */
#ifdef __AVX512F__
static void copy_streaming(char *to, const char *from, size_t n) {
    for (size_t i = 0; i < n; i += 128) {
        __m512i a = _mm512_load_si512((const void *)(from + i)), b = _mm512_load_si512((const void *)(from + i + 64));
        _mm512_stream_si512((void *)(to + i), a);
        _mm512_stream_si512((void *)(to + i + 64), b);
    }
    _mm_sfence();
}
#elif defined(__AVX2__)
static void copy_streaming(char *to, const char *from, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        __m256i a = _mm256_load_si256((const void *)(from + i)), b = _mm256_load_si256((const void *)(from + i + 32));
        _mm256_stream_si256((void *)(to + i), a);
        _mm256_stream_si256((void *)(to + i + 32), b);
    }
    _mm_sfence();
}
#else
static void copy_streaming(char *to, const char *from, size_t n) { memcpy(to, from, n); }
#endif

/* Ordinary stores, as STREAM has them: a loop that the compiler makes vectors of, but not a call of memcpy. */
__attribute__((optimize("no-tree-loop-distribute-patterns"))) static void copy_plain(char *restrict to,
                                                                                   const char *restrict from, size_t n) {
    double *restrict t = (double *)to;
    const double *restrict f = (const double *)from;
    for (size_t i = 0; i < n / sizeof *t; i++) t[i] = f[i];
}

static void copy_memcpy(char *to, const char *from, size_t n) { memcpy(to, from, n); }

struct copier {
    void (*copy)(char *, const char *, size_t);
    char *to, *from;
    size_t bytes;
    int repeats;
    pthread_barrier_t *barrier;
    double *starts, *ends;
    int thread, threads;
};

static void *copier(void *argument) {
    struct copier *c = argument;
    for (int r = 0; r < c->repeats; r++) {
        pthread_barrier_wait(c->barrier);
        c->starts[r * c->threads + c->thread] = now();
        c->copy(c->to, c->from, c->bytes);
        c->ends[r * c->threads + c->thread] = now();
        pthread_barrier_wait(c->barrier);
    }
    return NULL;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure_copy(const char *name, void (*copy)(char *, const char *, size_t), char *to, char *from, size_t bytes,
                         int threads, int repeats, const char *separator) {
    pthread_t ids[MAX_THREADS];
    struct copier work[MAX_THREADS];
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, threads);
    double *starts = calloc((size_t)repeats * threads, sizeof *starts), *ends = calloc((size_t)repeats * threads, sizeof *ends);
    double *rates = calloc(repeats, sizeof *rates);
    if (!starts || !ends || !rates) fail("calloc", "times");
    size_t share = bytes / threads / ALIGNMENT * ALIGNMENT;
    for (int t = 0; t < threads; t++) {
        work[t] = (struct copier){copy, to + t * share, from + t * share, share, repeats, &barrier, starts, ends, t, threads};
        if (pthread_create(&ids[t], NULL, copier, &work[t])) fail("pthread_create", "copy");
    }
    for (int t = 0; t < threads; t++) pthread_join(ids[t], NULL);
    for (int r = 0; r < repeats; r++) {
        double first = starts[r * threads], last = ends[r * threads];
        for (int t = 1; t < threads; t++) {
            if (starts[r * threads + t] < first) first = starts[r * threads + t];
            if (ends[r * threads + t] > last) last = ends[r * threads + t];
        }
        rates[r] = 2.0 * share * threads / (last - first);
    }
    qsort(rates, repeats, sizeof *rates, ascending);
    printf("\"%s\": {\"best\": %.0f, \"median\": %.0f}%s", name, rates[repeats - 1], rates[repeats / 2], separator);
    free(starts), free(ends), free(rates);
}

static int command_copy(size_t mib, int threads, int repeats) {
    size_t bytes = mib << 20;
    char *from = buffer(bytes), *to = buffer(bytes);
    printf("{\"bytes\": %zu, \"threads\": %d, \"repeats\": %d, \"bytes_per_second\": {", bytes, threads, repeats);
    measure_copy("streaming", copy_streaming, to, from, bytes, threads, repeats, ", ");
    measure_copy("memcpy", copy_memcpy, to, from, bytes, threads, repeats, ", ");
    measure_copy("plain", copy_plain, to, from, bytes, threads, repeats, "");
    printf("}}\n");
    return 0;
}

/* ---- pass ---- */

static struct {
    int inputs[MAX_INPUTS], count, out;
    const char *names[MAX_INPUTS], *out_name;
    off_t sizes[MAX_INPUTS], size;
    size_t block;
    int direct_write, early;
    atomic_llong next, read, written;
} pass;

static void read_block(int input, char *into, size_t bytes, off_t at) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pread(pass.inputs[input], into + done, bytes - done, at + done);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail("read", pass.names[input]);
        if (n == 0) break; /* the end, where an O_DIRECT read asked for a whole page */
        done += n;
    }
}

static void write_block(const char *from, size_t bytes, off_t at) {
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pwrite(pass.out, from + done, bytes - done, at + done);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) fail("write", pass.out_name);
        done += n;
    }
}

static size_t rounded(size_t n) { return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static void *passer(void *unused) {
    (void)unused;
    char *block = buffer(pass.block);
    for (;;) {
        off_t at = (off_t)atomic_fetch_add(&pass.next, 1) * pass.block;
        if (at >= pass.size) break;
        size_t length = pass.size - at < (off_t)pass.block ? (size_t)(pass.size - at) : pass.block;
        for (int i = 0; i < pass.count; i++) {
            if (at >= pass.sizes[i]) continue;
            size_t here = pass.sizes[i] - at < (off_t)length ? (size_t)(pass.sizes[i] - at) : length;
            read_block(i, block, rounded(here), at);
            atomic_fetch_add(&pass.read, here);
        }
        write_block(block, pass.direct_write ? rounded(length) : length, at);
        if (pass.early) sync_file_range(pass.out, at, length, SYNC_FILE_RANGE_WRITE);
        atomic_fetch_add(&pass.written, length);
    }
    munmap(block, pass.block);
    return NULL;
}

static int command_pass(const char *read, const char *write, const char *out, size_t block, int threads, int count,
                        char **inputs) {
    int direct_read = !strcmp(read, "direct"), on_tmpfs = !strcmp(write, "tmpfs");
    pass.early = !strcmp(write, "early");
    pass.direct_write = !strcmp(write, "direct");
    if (!direct_read && strcmp(read, "buffered")) usage();
    if (!on_tmpfs && !pass.early && !pass.direct_write && strcmp(write, "buffered")) usage();
    if (block % ALIGNMENT || !block) usage();
    pass.block = block;
    pass.count = count;
    double start = now();
    for (int i = 0; i < count; i++) {
        pass.names[i] = inputs[i];
        pass.inputs[i] = open_input(inputs[i], direct_read ? O_DIRECT : 0);
        pass.sizes[i] = size_of(pass.inputs[i], inputs[i]);
        if (pass.sizes[i] > pass.size) pass.size = pass.sizes[i];
        if (!direct_read) posix_fadvise(pass.inputs[i], 0, 0, POSIX_FADV_SEQUENTIAL);
    }
    pass.out_name = out;
    pass.out = open(out, O_CREAT | O_TRUNC | O_WRONLY | (pass.direct_write ? O_DIRECT : 0), 0644);
    if (pass.out < 0) fail("create", out);
    if ((pass.early || pass.direct_write) && fallocate(pass.out, 0, 0, rounded(pass.size))) fail("fallocate", out);
    pthread_t ids[MAX_THREADS];
    for (int t = 0; t < threads; t++)
        if (pthread_create(&ids[t], NULL, passer, NULL)) fail("pthread_create", "pass");
    for (int t = 0; t < threads; t++) pthread_join(ids[t], NULL);
    if (ftruncate(pass.out, pass.size)) fail("truncate", out);
    double moved = now();
    if (!on_tmpfs && fsync(pass.out)) fail("fsync", out);
    double end = now();
    close(pass.out);
    printf("{\"read\": \"%s\", \"write\": \"%s\", \"threads\": %d, \"block\": %zu, \"bytes_in\": %lld, \"bytes_out\": %lld, "
           "\"wall_s\": %.6f, \"fsync_s\": %.6f}\n", read, write, threads, block, (long long)pass.read, (long long)pass.written,
           end - start, end - moved);
    return 0;
}

/* ---- the page cache ---- */

static long long resident(int file, const char *name) {
    off_t size = size_of(file, name);
    if (size == 0) return 0;
    size_t page = sysconf(_SC_PAGESIZE), pages = (size + page - 1) / page;
    void *map = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
    unsigned char *present = malloc(pages);
    if (map == MAP_FAILED || !present) fail("map", name);
    if (mincore(map, size, present)) fail("mincore", name);
    long long found = 0;
    for (size_t i = 0; i < pages; i++) found += present[i] & 1;
    munmap(map, size);
    free(present);
    long long bytes = found * (long long)page;
    return bytes > size ? size : bytes;
}

static void warm(int file, const char *name) {
    size_t bytes = 8 << 20;
    char *into = malloc(bytes);
    if (!into) fail("malloc", name);
    posix_fadvise(file, 0, 0, POSIX_FADV_SEQUENTIAL);
    ssize_t n;
    for (off_t at = 0; (n = pread(file, into, bytes, at)) > 0;) at += n;
    if (n < 0) fail("read", name);
    free(into);
}

static void evict(int file, const char *name) {
    if (fsync(file)) fail("fsync", name); /* dirty pages stay */
    int error = posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    if (error) errno = error, fail("fadvise", name);
}

static int command_cache(const char *what, int count, char **names) {
    long long size = 0, present = 0;
    for (int i = 0; i < count; i++) {
        int file = open_input(names[i], 0);
        if (!strcmp(what, "warm")) warm(file, names[i]);
        if (!strcmp(what, "evict")) evict(file, names[i]);
        size += size_of(file, names[i]);
        present += resident(file, names[i]);
        close(file);
    }
    printf("{\"bytes\": %lld, \"resident\": %lld}\n", size, present);
    return 0;
}

static int threads_from(const char *text) {
    int n = atoi(text);
    if (n < 1 || n > MAX_THREADS) usage();
    return n;
}

int main(int count, char **words) {
    if (count == 5 && !strcmp(words[1], "copy") && atol(words[2]) > 0 && atoi(words[4]) > 0)
        return command_copy(atol(words[2]), threads_from(words[3]), atoi(words[4]));
    if (count > 7 && count - 7 <= MAX_INPUTS && !strcmp(words[1], "pass"))
        return command_pass(words[2], words[3], words[4], atol(words[5]), threads_from(words[6]), count - 7, words + 7);
    if (count > 2 && (!strcmp(words[1], "warm") || !strcmp(words[1], "evict") || !strcmp(words[1], "resident")))
        return command_cache(words[1], count - 2, words + 2);
    usage();
}
