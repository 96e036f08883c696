/* Emulated WRAM heap: one bump allocator for all tasklets, bounded like the DPU's 64 KB. */
#ifndef SHIM_ALLOC_H
#define SHIM_ALLOC_H

#include <stddef.h>

void *mem_alloc(size_t size);
void *mem_reset(void);

#endif
