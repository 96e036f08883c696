/*
 * Sum-pooled embedding lookup of one table tile on one UPMEM DPU.
 *
 * The MRAM heap holds, at offsets that the header gives (all multiples of 8):
 *
 *   header | bag bounds | ids | sums | rows
 *
 * bag bounds  bags + 1 uint32: ids of bag b are ids[bounds[b]] .. ids[bounds[b + 1] - 1]
 * ids         uint32 offsets of entries in `rows`, in bytes: a DPU has no fast 32-bit multiplication
 * sums        `bags` results of `stride` bytes, written by this kernel
 * rows        entries of `stride` bytes: the tile's rows, then its stored partial sums
 *
 * The first three are written by one transfer a batch, the rows once.
 *
 * Each tasklet takes a range of neighbouring bags, so that it reads their ids in sequence. A bag's entries are added in the order of its ids, to an
 * accumulator that starts at zero: the result does not depend on the number of tasklets. int32 sums wrap
 * around (two's complement); fp32 sums round to nearest after each addition.
 *
 * Build: dpu-upmem-dpurte-clang -DNR_TASKLETS=16 -DSTACK_SIZE_DEFAULT=1024 -O2 -o embedding_dpu embedding_dpu.c
 */
#include <alloc.h>
#include <barrier.h>
#include <defs.h>
#include <mram.h>
#include <stdint.h>

#define MAGIC 0x454d4231u /* "EMB1" */
#define FP32 1u
#define ID_BLOCK 256u /* bytes of ids in one read; a multiple of 8 */
#define IDS_PER_BLOCK (ID_BLOCK / sizeof(uint32_t))

/* 64 bytes; codegen/upmem.py writes the same fields in the same order. */
struct header {
    uint32_t magic;
    uint32_t element; /* 0 int32, 1 fp32 */
    uint32_t columns; /* elements of an entry in use */
    uint32_t stride;  /* bytes of an entry: a multiple of 8, at most 2048 */
    uint32_t rows_bytes; /* of all entries */
    uint32_t bags;
    uint32_t ids;
    uint32_t rows_at; /* offsets in bytes from the start of the heap */
    uint32_t bounds_at;
    uint32_t ids_at;
    uint32_t sums_at;
    uint32_t status; /* 0; the kernel sets 1 when it refuses the header, 2 on an id out of range */
    uint32_t reserved[4];
};

union element {
    uint32_t word;
    float real;
};

BARRIER_INIT(ready, NR_TASKLETS);
__dma_aligned struct header header;

static __mram_ptr uint8_t *
at(uint32_t offset)
{
    return (__mram_ptr uint8_t *)DPU_MRAM_HEAP_POINTER + offset;
}

/* Any tasklet may report; they all write the same kind of word, so the last one to write wins. */
static void
report(uint32_t status)
{
    header.status = status;
    mram_write(&header, at(0), sizeof(header));
}

static void
add(union element *sum, const union element *entry, uint32_t columns, uint32_t kind)
{
    uint32_t c;

    if (kind == FP32) {
        for (c = 0; c < columns; c++)
            sum[c].real += entry[c].real;
    } else {
        for (c = 0; c < columns; c++)
            sum[c].word += entry[c].word;
    }
}

int
main(void)
{
    union element *sum, *entry;
    uint32_t *block, *bounds;
    uint32_t bag, last, share, held = UINT32_MAX;

    if (me() == 0) {
        mem_reset();
        mram_read(at(0), &header, sizeof(header));
    }
    barrier_wait(&ready);

    if (header.magic != MAGIC || header.element > FP32 || header.stride < 8 || header.stride > 2048
        || header.stride % 8 != 0 || header.columns * sizeof(uint32_t) > header.stride) {
        if (me() == 0)
            report(1);
        return 1;
    }

    sum = mem_alloc(header.stride);
    entry = mem_alloc(header.stride);
    block = mem_alloc(ID_BLOCK);
    bounds = mem_alloc(4 * sizeof(uint32_t));

    /* An even number of bags, so that two share a read of four aligned bounds. */
    share = ((header.bags + NR_TASKLETS - 1) / NR_TASKLETS + 1) & ~1u;
    bag = share * me();
    last = bag + share < header.bags ? bag + share : header.bags;

    for (; bag < last; bag++) {
        uint32_t next, end, c;

        if ((bag & 1u) == 0)
            mram_read(at(header.bounds_at + bag * sizeof(uint32_t)), bounds, 4 * sizeof(uint32_t));
        next = bounds[bag & 1u];
        end = bounds[(bag & 1u) + 1];

        for (c = 0; c < header.stride / sizeof(uint32_t); c++)
            sum[c].word = 0;

        for (; next < end; next++) {
            uint32_t offset;

            if (next / IDS_PER_BLOCK != held) {
                held = next / IDS_PER_BLOCK;
                mram_read(at(header.ids_at + held * ID_BLOCK), block, ID_BLOCK);
            }
            offset = block[next % IDS_PER_BLOCK];
            if (offset >= header.rows_bytes) {
                report(2);
                return 2;
            }
            mram_read(at(header.rows_at + offset), entry, header.stride);
            add(sum, entry, header.columns, header.element);
        }
        mram_write(sum, at(header.sums_at + bag * header.stride), header.stride);
    }
    return 0;
}
