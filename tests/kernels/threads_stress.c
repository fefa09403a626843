/* Threads that run jobs and change how many workers there are: every item of every job is done once, by the time
   run_parallel returns. Argument: seconds. */
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int set_threads(int);

typedef struct {
    int *done;
} Arguments;

static atomic_long jobs, wrong;
static atomic_int stop;

static void count_items(const void *arguments, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) ((const Arguments *)arguments)->done[i]++;
}

static void *run_jobs(void *seed) {
    unsigned random = (unsigned)(size_t)seed;
    while (!atomic_load(&stop)) {
        int64_t count = rand_r(&random) % 200;
        Arguments arguments = {calloc(200, sizeof(int))};
        run_parallel(count_items, &arguments, count, 1 + rand_r(&random) % 8);
        for (int64_t i = 0; i < 200; i++)
            if (arguments.done[i] != (i < count)) atomic_fetch_add(&wrong, 1);
        free(arguments.done);
        atomic_fetch_add(&jobs, 1);
        int turn = rand_r(&random) % 2000;
        if (turn == 0) usleep(3000);           /* until the workers sleep */
        if (turn < 400) set_threads(turn % 4); /* while workers that are left out have not seen the last job */
    }
    return NULL;
}

int main(int count, char **arguments) {
    pthread_t callers[2];
    for (size_t i = 0; i < 2; i++) pthread_create(callers + i, NULL, run_jobs, (void *)(i + 1));
    sleep(count > 1 ? (unsigned)atoi(arguments[1]) : 1);
    atomic_store(&stop, 1);
    for (int i = 0; i < 2; i++) pthread_join(callers[i], NULL);
    printf("%ld jobs, %ld wrong\n", jobs, wrong);
    return wrong != 0 || jobs == 0;
}
