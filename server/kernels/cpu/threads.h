/* A pool of threads for the kernels. The thread that calls run_parallel works too. */
#pragma once

#include <stdint.h>

/* Work on the items begin .. end - 1. */
typedef void (*Job)(const void *arguments, int64_t begin, int64_t end);

/* Run a job over count items, a piece of at most `grain` items at a time, on all threads; returns when all are done.
   While another thread's job is running, the caller does its own alone. */
void run_parallel(Job job, const void *arguments, int64_t count, int64_t grain);
