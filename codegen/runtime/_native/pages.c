/* Page files and caches of tiered tables.
 *
 * A page starts with a header of 16 bytes: a checksum (uint32), a spare word, and the epoch (uint64) in which it
 * was written. The checksum covers everything after itself and the page's number: the high half of
 * sum_i key[i] * word[i] + key[0] * (number + 1) modulo 2^64 over 32-bit words (multilinear hashing: Lemire and
 * Kaser, "Strongly universal string hashing is fast", Computer Journal 57(11), 2014).
 *
 * Reads and writes of many pages are shared by threads, each of which waits for one page at a time: a
 * device serves several requests at once, and this needs no interface beyond pread and pwrite.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

enum { MAX_THREADS = 64 };

static uint32_t check_of(const uint8_t *page, int64_t bytes, int64_t number, const uint64_t *key) {
    const uint32_t *word = (const uint32_t *)page;
    uint64_t sum = key[0] * (uint64_t)(number + 1);
    for (int64_t i = 1; i < bytes / 4; i++) sum += key[i] * word[i];
    return (uint32_t)(sum >> 32);
}

static void stamp(uint8_t *page, int64_t bytes, int64_t number, const uint64_t *key, uint64_t epoch) {
    const uint32_t spare = 0;
    memcpy(page + 4, &spare, 4);
    memcpy(page + 8, &epoch, 8);
    uint32_t check = check_of(page, bytes, number, key);
    memcpy(page, &check, 4);
}

/* 1 if the page is whole and was written in an epoch up to `epoch`. */
static int whole(const uint8_t *page, int64_t bytes, int64_t number, const uint64_t *key, uint64_t epoch) {
    uint32_t check;
    uint64_t written;
    memcpy(&check, page, 4);
    memcpy(&written, page + 8, 8);
    return check == check_of(page, bytes, number, key) && written <= epoch;
}

typedef struct {
    int fd, writing;
    const int64_t *offset, *number;
    int64_t n, bytes;
    uint8_t *buffer;
    const uint64_t *key;
    uint64_t epoch;
    atomic_llong next, fault;
} job_t;

/* Moves one page; 0, or -errno, or i + 1 when page i is damaged. */
static int64_t move(job_t *job, int64_t i) {
    uint8_t *page = job->buffer + i * job->bytes;
    if (job->writing) stamp(page, job->bytes, job->number[i], job->key, job->epoch);
    for (int64_t done = 0; done < job->bytes;) {
        ssize_t got = job->writing ? pwrite(job->fd, page + done, job->bytes - done, job->offset[i] + done)
                                   : pread(job->fd, page + done, job->bytes - done, job->offset[i] + done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -errno;
        if (got == 0) return i + 1;
        done += got;
    }
    return job->writing || whole(page, job->bytes, job->number[i], job->key, job->epoch) ? 0 : i + 1;
}

static void *work(void *argument) {
    job_t *job = argument;
    for (;;) {
        int64_t i = atomic_fetch_add(&job->next, 1);
        if (i >= job->n || atomic_load(&job->fault)) return NULL;
        int64_t fault = move(job, i);
        if (fault) atomic_store(&job->fault, fault);
    }
}

int64_t move_pages(int fd, int writing, const int64_t *offset, const int64_t *number, int64_t n, int64_t bytes,
                   uint8_t *buffer, const uint64_t *key, uint64_t epoch, int threads) {
    job_t job = {fd, writing, offset, number, n, bytes, buffer, key, epoch, 0, 0};
    pthread_t started[MAX_THREADS];
    int others = 0;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    while (others + 1 < threads && others + 1 < n) {
        if (pthread_create(&started[others], NULL, work, &job)) break;
        others++;
    }
    work(&job);
    for (int t = 0; t < others; t++) pthread_join(started[t], NULL);
    return atomic_load(&job.fault);
}

/* Stamps (writing) or verifies pages that lie in memory; page i is at base + offset[i]. */
int64_t check_pages(int writing, uint8_t *base, const int64_t *offset, const int64_t *number, int64_t n,
                    int64_t bytes, const uint64_t *key, uint64_t epoch) {
    for (int64_t i = 0; i < n; i++) {
        if (writing) stamp(base + offset[i], bytes, number[i], key, epoch);
        else if (!whole(base + offset[i], bytes, number[i], key, epoch)) return i + 1;
    }
    return 0;
}

/* --- cache: slots that no batch needs lie in a binary heap, the next victim on top --- */

typedef struct {
    int64_t *heap;   /* slots, smallest key first */
    int64_t *place;  /* slot -> index in heap, -1 when a batch needs it */
    uint64_t *key;   /* slot -> order of eviction; no two are equal */
    int32_t *pins;   /* slot -> batches that need it */
    int64_t *size;   /* slots in the heap */
} cache_t;

static void put(cache_t *c, int64_t i, int64_t slot) { c->heap[i] = slot; c->place[slot] = i; }

static void sink(cache_t *c, int64_t i, int64_t slot) {
    int64_t n = *c->size;
    for (int64_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && c->key[c->heap[child + 1]] < c->key[c->heap[child]]) child++;
        if (c->key[slot] <= c->key[c->heap[child]]) break;
        put(c, i, c->heap[child]);
    }
    put(c, i, slot);
}

static void rise(cache_t *c, int64_t i, int64_t slot) {
    for (int64_t parent; i > 0 && c->key[slot] < c->key[c->heap[parent = (i - 1) / 2]]; i = parent)
        put(c, i, c->heap[parent]);
    put(c, i, slot);
}

static void drop(cache_t *c, int64_t slot) {
    int64_t i = c->place[slot], last = c->heap[--*c->size];
    c->place[slot] = -1;
    if (last == slot) return;
    if (i > 0 && c->key[last] < c->key[c->heap[(i - 1) / 2]]) rise(c, i, last);
    else sink(c, i, last);
}

/* Pins the slots of rows that are cached; slot[i] = -1 for the others. */
void cache_take(cache_t *c, const int64_t *rows, int64_t n, const int32_t *slot_of, int64_t *slot) {
    for (int64_t i = 0; i < n; i++) {
        slot[i] = slot_of[rows[i]];
        if (slot[i] < 0) continue;
        if (c->pins[slot[i]]++ == 0) drop(c, slot[i]);
    }
}

/* Takes the n slots with the smallest keys out of the heap and pins them; the caller knows that there are n. */
void cache_victims(cache_t *c, int64_t n, int64_t *slot) {
    for (int64_t i = 0; i < n; i++) {
        slot[i] = c->heap[0];
        drop(c, slot[i]);
        c->pins[slot[i]] = 1;
    }
}

void cache_release(cache_t *c, const int64_t *slot, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (--c->pins[slot[i]] == 0) rise(c, (*c->size)++, slot[i]);
}
