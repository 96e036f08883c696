/* Emulated MRAM: the calls of the UPMEM SDK's header that the kernel uses, with the DMA's rules checked. */
#ifndef SHIM_MRAM_H
#define SHIM_MRAM_H

#include "defs.h"
#include <stdint.h>

#define __mram_ptr
#define __dma_aligned __attribute__((aligned(8)))
#define DPU_MRAM_HEAP_POINTER ((void *)shim_mram_heap())

uint8_t *shim_mram_heap(void);
void mram_read(const __mram_ptr void *from, void *to, unsigned int nb_of_bytes);
void mram_write(const void *from, __mram_ptr void *to, unsigned int nb_of_bytes);

#endif
