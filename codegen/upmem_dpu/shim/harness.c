/*
 * Runs a DPU kernel on this machine: one thread a tasklet, one DPU after the other.
 *
 *   harness IMAGES RESULTS DPUS BYTES
 *
 * IMAGES holds DPUS images of BYTES bytes, each the start of one DPU's MRAM heap; RESULTS receives them
 * back after the kernel has run. The kernel is compiled with -Dmain=dpu_main.
 *
 * An access that the hardware would refuse, or that the layout does not own, ends the run: a DMA that is not
 * 8 to 2,048 bytes in multiples of 8, an address that is not a multiple of 8, MRAM outside the image, WRAM
 * outside what was allocated.  Exit status: 0 done, 1 usage or files, 3 an illegal access.
 */
#define _GNU_SOURCE
#include "alloc.h"
#include "barrier.h"
#include "defs.h"
#include "mram.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MRAM_BYTES (64ul * 1024 * 1024)
#define WRAM_BYTES (64ul * 1024)
#define STACK_BYTES 1024ul /* STACK_SIZE_DEFAULT of the build, a tasklet */
#define STATIC_BYTES 64ul  /* the kernel's header */
#define RUNTIME_BYTES 2048ul /* left to the SDK's runtime: barriers, locks, stack table (an allowance) */
#define HEAP_BYTES (WRAM_BYTES - RUNTIME_BYTES - STATIC_BYTES - NR_TASKLETS * STACK_BYTES)
#define ILLEGAL 3

extern int dpu_main(void);
extern char header[]; /* the kernel's only static that DMA may touch */

static uint8_t mram[MRAM_BYTES] __attribute__((aligned(8)));
static uint8_t heap[WRAM_BYTES] __attribute__((aligned(8)));
static size_t mram_owned;
static size_t heap_used;
static unsigned int dpu;
static __thread unsigned int tasklet;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t released = PTHREAD_COND_INITIALIZER;

static void
refuse(const char *call, const char *why, unsigned long value)
{
    fprintf(stderr, "DPU %u, tasklet %u: %s: %s (%lu)\n", dpu, tasklet, call, why, value);
    fflush(stderr);
    _Exit(ILLEGAL);
}

static void
check(const char *call, const void *in_mram, const void *in_wram, unsigned int bytes)
{
    uintptr_t m = (uintptr_t)in_mram, w = (uintptr_t)in_wram;
    uintptr_t base = (uintptr_t)mram, low = (uintptr_t)heap, fixed = (uintptr_t)header;
    int in_heap, in_fixed;

    if (bytes < 8 || bytes > 2048 || bytes % 8 != 0)
        refuse(call, "size must be 8 to 2048 bytes in multiples of 8", bytes);
    if (m % 8 != 0)
        refuse(call, "MRAM address is not a multiple of 8", m - base);
    if (w % 8 != 0)
        refuse(call, "WRAM address is not a multiple of 8", w);
    if (m < base || m - base > mram_owned || bytes > mram_owned - (m - base))
        refuse(call, "MRAM address outside the image", m - base);
    pthread_mutex_lock(&lock);
    in_heap = w >= low && w - low <= heap_used && bytes <= heap_used - (w - low);
    pthread_mutex_unlock(&lock);
    in_fixed = w >= fixed && w - fixed <= STATIC_BYTES && bytes <= STATIC_BYTES - (w - fixed);
    if (!in_heap && !in_fixed)
        refuse(call, "WRAM address outside the allocations", bytes);
}

uint8_t *
shim_mram_heap(void)
{
    return mram;
}

void
mram_read(const void *from, void *to, unsigned int nb_of_bytes)
{
    check("mram_read", from, to, nb_of_bytes);
    memcpy(to, from, nb_of_bytes);
}

void
mram_write(const void *from, void *to, unsigned int nb_of_bytes)
{
    check("mram_write", to, from, nb_of_bytes);
    memcpy(to, from, nb_of_bytes);
}

sysname_t
me(void)
{
    return tasklet;
}

void *
mem_reset(void)
{
    pthread_mutex_lock(&lock);
    heap_used = 0;
    pthread_mutex_unlock(&lock);
    return heap;
}

void *
mem_alloc(size_t size)
{
    void *start;

    size = (size + 7) / 8 * 8;
    pthread_mutex_lock(&lock);
    if (heap_used > HEAP_BYTES || size > HEAP_BYTES - heap_used)
        refuse("mem_alloc", "the 64 KB of WRAM are used up", size);
    start = heap + heap_used;
    heap_used += size;
    pthread_mutex_unlock(&lock);
    return start;
}

void
barrier_wait(barrier_t *barrier)
{
    unsigned int generation;

    pthread_mutex_lock(&lock);
    generation = barrier->generation;
    if (++barrier->waiting == barrier->expected) {
        barrier->waiting = 0;
        barrier->generation++;
        pthread_cond_broadcast(&released);
    } else {
        while (generation == barrier->generation)
            pthread_cond_wait(&released, &lock);
    }
    pthread_mutex_unlock(&lock);
}

static void *
run(void *argument)
{
    tasklet = (unsigned int)(uintptr_t)argument;
    dpu_main();
    return NULL;
}

static void
launch(void)
{
    pthread_t threads[NR_TASKLETS];
    uintptr_t k;

    for (k = 0; k < NR_TASKLETS; k++)
        if (pthread_create(&threads[k], NULL, run, (void *)k) != 0) {
            fprintf(stderr, "cannot start a thread for tasklet %u\n", (unsigned int)k);
            exit(1);
        }
    for (k = 0; k < NR_TASKLETS; k++)
        pthread_join(threads[k], NULL);
}

int
main(int argc, char **argv)
{
    FILE *images, *results;
    unsigned long dpus;

    if (argc != 5) {
        fprintf(stderr, "usage: %s IMAGES RESULTS DPUS BYTES\n", argv[0]);
        return 1;
    }
    dpus = strtoul(argv[3], NULL, 10);
    mram_owned = strtoul(argv[4], NULL, 10);
    if (mram_owned > MRAM_BYTES) {
        fprintf(stderr, "an image of %lu bytes does not fit in 64 MB of MRAM\n", (unsigned long)mram_owned);
        return ILLEGAL;
    }
    images = fopen(argv[1], "rb");
    results = fopen(argv[2], "wb");
    if (images == NULL || results == NULL) {
        perror(images == NULL ? argv[1] : argv[2]);
        return 1;
    }
    for (dpu = 0; dpu < dpus; dpu++) {
        if (fread(mram, 1, mram_owned, images) != mram_owned) {
            fprintf(stderr, "%s is shorter than %lu images of %lu bytes\n", argv[1], dpus,
                (unsigned long)mram_owned);
            return 1;
        }
        heap_used = sizeof(heap); /* whatever a tasklet allocates before mem_reset must fail */
        memset(heap, 0xa5, sizeof(heap)); /* WRAM is not cleared by a launch */
        launch();
        if (fwrite(mram, 1, mram_owned, results) != mram_owned) {
            perror(argv[2]);
            return 1;
        }
    }
    fclose(images);
    return fclose(results) == 0 ? 0 : 1;
}
