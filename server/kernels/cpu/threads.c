/* The pool of threads: workers spin for a moment after each job, since the next one follows within microseconds while a
   token is computed, and sleep after that. OpenMP would start a second pool beside torch's, and the two would fight. */
#include "threads.h"

#include "variant.h"

#include <stdatomic.h>

#ifdef _WIN32
#include <windows.h>
typedef SRWLOCK Lock;
typedef CONDITION_VARIABLE Condition;
#define LOCK_READY SRWLOCK_INIT
#define CONDITION_READY CONDITION_VARIABLE_INIT
static void lock(Lock *l) { AcquireSRWLockExclusive(l); }
static int try_lock(Lock *l) { return TryAcquireSRWLockExclusive(l); }
static void unlock(Lock *l) { ReleaseSRWLockExclusive(l); }
static void sleep_on(Condition *c, Lock *l) { SleepConditionVariableSRW(c, l, INFINITE, 0); }
static void wake_all(Condition *c) { WakeAllConditionVariable(c); }
static void give_way(void) { SwitchToThread(); }
#else
#include <pthread.h>
#include <sched.h>
typedef pthread_mutex_t Lock;
typedef pthread_cond_t Condition;
#define LOCK_READY PTHREAD_MUTEX_INITIALIZER
#define CONDITION_READY PTHREAD_COND_INITIALIZER
static void lock(Lock *l) { pthread_mutex_lock(l); }
static int try_lock(Lock *l) { return pthread_mutex_trylock(l) == 0; }
static void unlock(Lock *l) { pthread_mutex_unlock(l); }
static void sleep_on(Condition *c, Lock *l) { pthread_cond_wait(c, l); }
static void wake_all(Condition *c) { pthread_cond_broadcast(c); }
static void give_way(void) { sched_yield(); }
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() ((void)0)
#endif

enum { WORKER_BITS = 8, MOST_WORKERS = 255, SPINS = 20000 /* some 200 microseconds */ };

static struct {
    Job job;
    const void *arguments;
    int64_t grain;
    atomic_int busy; /* workers that have not finished this job */
    /* Number of the job, and in the low 8 bits how many workers take part in it. One word, since a worker that is late
       and goes by another job's count would join a job that does not wait for it. */
    atomic_uint ticket;
    atomic_int sleeping; /* workers */
    atomic_int wanted;   /* workers that take part in the next job */
    atomic_int started;
    Lock sleep_lock, caller_lock;
    Condition woken;
} pool = {.sleep_lock = LOCK_READY, .caller_lock = LOCK_READY, .woken = CONDITION_READY};

/* One thread's part of a job: neighbouring items, since what follows in memory is fetched in advance. */
static struct {
    _Alignas(64) _Atomic int64_t next; /* first item that nobody has taken */
    int64_t end;
} shares[MOST_WORKERS + 1];

static void share_out(int64_t count, int threads) {
    int64_t pieces = (count + pool.grain - 1) / pool.grain;
    for (int i = 0; i < threads; i++) {
        int64_t end = pieces * (i + 1) / threads * pool.grain;
        atomic_store(&shares[i].next, pieces * i / threads * pool.grain);
        shares[i].end = end < count ? end : count;
    }
}

/* Piece by piece of a thread's own share, then what the others have not come to. */
static void take_pieces(int own, int threads) {
    for (int i = 0; i < threads; i++) {
        int of = (own + i) % threads;
        for (;;) {
            int64_t begin = atomic_fetch_add(&shares[of].next, pool.grain), end = begin + pool.grain;
            if (begin >= shares[of].end) break;
            pool.job(pool.arguments, begin, end < shares[of].end ? end : shares[of].end);
        }
    }
}

static void await_job(unsigned seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&pool.ticket, memory_order_acquire) != seen) return;
        PAUSE();
    }
    lock(&pool.sleep_lock);
    atomic_fetch_add(&pool.sleeping, 1);
    while (atomic_load(&pool.ticket) == seen) sleep_on(&pool.woken, &pool.sleep_lock);
    atomic_fetch_sub(&pool.sleeping, 1);
    unlock(&pool.sleep_lock);
}

static void work(int number) {
    unsigned seen = atomic_load(&pool.ticket);
    atomic_fetch_add(&pool.started, 1); /* from here on it misses no job */
    for (;;) {
        await_job(seen);
        seen = atomic_load(&pool.ticket);
        int workers = (int)(seen & MOST_WORKERS);
        if (number < workers) {
            take_pieces(number + 1, workers + 1);
            atomic_fetch_sub(&pool.busy, 1);
        }
    }
}

#ifdef _WIN32
static DWORD WINAPI thread_main(LPVOID number) {
    work((int)(intptr_t)number);
    return 0;
}
static int start_thread(int number) {
    HANDLE thread = CreateThread(NULL, 0, thread_main, (LPVOID)(intptr_t)number, 0, NULL);
    return thread && CloseHandle(thread);
}
#else
static void *thread_main(void *number) {
    work((int)(intptr_t)number);
    return NULL;
}
static int start_thread(int number) {
    pthread_t thread;
    return pthread_create(&thread, NULL, thread_main, (void *)(intptr_t)number) == 0 && pthread_detach(thread) == 0;
}
#endif

/* How many threads work from now on, the caller's among them; returns how many there are. */
EXPORT int set_threads(int count) {
    lock(&pool.caller_lock);
    int wanted = count < 1 ? 0 : count - 1 < MOST_WORKERS ? count - 1 : MOST_WORKERS;
    int started = atomic_load(&pool.started);
    while (started < wanted && start_thread(started)) {
        while (atomic_load(&pool.started) == started) give_way();
        started++;
    }
    atomic_store(&pool.wanted, wanted < started ? wanted : started);
    unlock(&pool.caller_lock);
    return 1 + atomic_load(&pool.wanted);
}

void run_parallel(Job job, const void *arguments, int64_t count, int64_t grain) {
    if (atomic_load(&pool.wanted) == 0 || count <= grain || !try_lock(&pool.caller_lock)) {
        if (count > 0) job(arguments, 0, count);
        return;
    }
    int workers = atomic_load(&pool.wanted);
    pool.job = job, pool.arguments = arguments, pool.grain = grain;
    share_out(count, workers + 1);
    atomic_store(&pool.busy, workers);
    unsigned job_number = (atomic_load(&pool.ticket) >> WORKER_BITS) + 1;
    atomic_store(&pool.ticket, job_number << WORKER_BITS | (unsigned)workers);
    if (atomic_load(&pool.sleeping)) {
        lock(&pool.sleep_lock);
        wake_all(&pool.woken);
        unlock(&pool.sleep_lock);
    }
    take_pieces(0, workers + 1);
    for (int spins = 0; atomic_load_explicit(&pool.busy, memory_order_acquire);)
        if (spins < SPINS) spins++, PAUSE();
        else give_way();
    unlock(&pool.caller_lock);
}
