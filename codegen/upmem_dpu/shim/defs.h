/* Emulated tasklet identity. */
#ifndef SHIM_DEFS_H
#define SHIM_DEFS_H

#ifndef NR_TASKLETS
#error "define NR_TASKLETS, as the SDK's build does"
#endif

typedef unsigned int sysname_t;

sysname_t me(void);

#endif
