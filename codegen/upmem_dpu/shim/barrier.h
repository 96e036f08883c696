/* Emulated barrier of a fixed number of tasklets. */
#ifndef SHIM_BARRIER_H
#define SHIM_BARRIER_H

typedef struct {
    unsigned int expected;
    unsigned int waiting;
    unsigned int generation;
} barrier_t;

#define BARRIER_INIT(name, counter) barrier_t name = { (counter), 0, 0 }

void barrier_wait(barrier_t *barrier);

#endif
