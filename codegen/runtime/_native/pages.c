/* Page files and caches of tiered tables.
 *
 * A page starts with a header of 16 bytes: a checksum (uint32), a spare word, and the epoch (uint64) in which it
 * was written. The checksum covers everything after itself and the page's number: the high half of
 * sum_i key[i] * word[i] + key[0] * (number + 1) modulo 2^64 over 32-bit words (multilinear hashing: Lemire and
 * Kaser, "Strongly universal string hashing is fast", Computer Journal 57(11), 2014).
 *
 * A device serves many requests at once. On Linux they are handed over with io_submit: one thread keeps many in
 * flight, where as many threads would each have to be scheduled, which takes longer than a read. Elsewhere, and
 * where the kernel has no such queue, pages are moved one after the other.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

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
} job_t;

/* What became of page i, of which `got` bytes were moved: 0, or -errno, or i + 1 when it is cut or damaged. */
static int64_t verdict(const job_t *job, int64_t i, int64_t got) {
    if (got < 0) return got;
    if (got != job->bytes) return job->writing ? -EIO : i + 1;
    if (job->writing) return 0;
    return whole(job->buffer + i * job->bytes, job->bytes, job->number[i], job->key, job->epoch) ? 0 : i + 1;
}

static int64_t one_by_one(const job_t *job) {
    for (int64_t i = 0; i < job->n; i++) {
        uint8_t *page = job->buffer + i * job->bytes;
        ssize_t got;
        if (job->writing) stamp(page, job->bytes, job->number[i], job->key, job->epoch);
        do got = job->writing ? pwrite(job->fd, page, job->bytes, job->offset[i])
                              : pread(job->fd, page, job->bytes, job->offset[i]);
        while (got < 0 && errno == EINTR);
        int64_t fault = verdict(job, i, got < 0 ? -errno : got);
        if (fault) return fault;
    }
    return 0;
}

#ifdef __linux__
#include <linux/aio_abi.h>
#include <sys/syscall.h>

enum {
    DEPTH = 64, /* requests in flight: NVMe drives reach their rate at 16 to 64 */
    WAKE = 16   /* answers to sleep for: waking up for each would take longer than some reads */
};

/* A queue for asynchronous requests of one thread at a time, or 0. */
uint64_t queue_open(void) {
    aio_context_t queue = 0;
    return syscall(SYS_io_setup, DEPTH, &queue) ? 0 : (uint64_t)queue;
}

void queue_close(uint64_t queue) {
    if (queue) syscall(SYS_io_destroy, (aio_context_t)queue);
}

/* All pages of a job, many at a time; checksums are computed while others are on their way. */
static int64_t many_at_once(const job_t *job, aio_context_t queue) {
    struct iocb block[DEPTH], *ready[DEPTH];
    struct io_event event[DEPTH];
    int idle[DEPTH], idles = DEPTH;
    int64_t next = 0, done = 0, fault = 0;
    for (int k = 0; k < DEPTH; k++) idle[k] = k;
    while (done < next || (next < job->n && !fault)) {
        int made = 0;
        while (idles && next < job->n && !fault) {
            struct iocb *request = &block[idle[--idles]];
            uint8_t *page = job->buffer + next * job->bytes;
            if (job->writing) stamp(page, job->bytes, job->number[next], job->key, job->epoch);
            memset(request, 0, sizeof *request);
            request->aio_data = (uint64_t)next;
            request->aio_lio_opcode = job->writing ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
            request->aio_fildes = (uint32_t)job->fd;
            request->aio_buf = (uint64_t)(uintptr_t)page;
            request->aio_nbytes = (uint64_t)job->bytes;
            request->aio_offset = job->offset[next++];
            ready[made++] = request;
        }
        for (int sent = 0; sent < made;) {
            long took = syscall(SYS_io_submit, queue, (long)(made - sent), ready + sent);
            if (took > 0) { sent += (int)took; continue; }
            if (took < 0 && (errno == EINTR || errno == EAGAIN)) continue;
            fault = took < 0 ? -errno : -EIO;
            done += made - sent; /* these were never sent */
            break;
        }
        if (done == next) continue;
        long wanted = next - done < WAKE ? (long)(next - done) : WAKE;
        long came = syscall(SYS_io_getevents, queue, wanted, (long)DEPTH, event, NULL);
        if (came < 0 && errno != EINTR) return -errno;
        for (long k = 0; k < came; k++, done++) {
            int64_t bad = verdict(job, (int64_t)event[k].data, (int64_t)event[k].res);
            if (bad && !fault) fault = bad;
            idle[idles++] = (int)((struct iocb *)(uintptr_t)event[k].obj - block);
        }
    }
    return fault;
}
#else
uint64_t queue_open(void) { return 0; }
void queue_close(uint64_t queue) { (void)queue; }
#endif

/* Reads and verifies, or stamps and writes, n pages; `queue` 0 moves one page at a time. */
int64_t move_pages(int fd, int writing, const int64_t *offset, const int64_t *number, int64_t n, int64_t bytes,
                   uint8_t *buffer, const uint64_t *key, uint64_t epoch, uint64_t queue) {
    job_t job = {fd, writing, offset, number, n, bytes, buffer, key, epoch};
#ifdef __linux__
    if (queue && n > 1) return many_at_once(&job, (aio_context_t)queue);
#endif
    (void)queue;
    return one_by_one(&job);
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
