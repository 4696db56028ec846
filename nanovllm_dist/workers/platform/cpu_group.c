/* What the ranks of one host tell each other through memory that they share: sums in rank order, gathers, broadcasts.

   A meeting: every rank writes its part, says with the meeting's number (`turn`) that it is there, waits until all
   others have said so, and reads. Parts lie in two halves, used in turn. That is enough: a rank says that it is at
   meeting n + 1 when all its threads have read the parts of meeting n, and nobody writes that half again before
   having seen all ranks at n + 1. What is longer than a part takes several meetings.

   A rank that dies, or is not there within `patience`, is remembered in `lost`. From then on this rank does not wait,
   what comes out of it means nothing, and it writes no part and comes to no meeting, so that one that was only late
   does not take such a part for a right one. cpu_step.c includes it; it knows nothing of layers. */

#include <poll.h>
#include <sched.h>
#include <time.h>

#define APART 16          /* numbers of turns, in words of 8 bytes: two cache lines, which processors fetch in pairs */
#define LOOKS_AWAKE 2000  /* looks at another's number before the core is offered to others: some 50 us */
#define LOOKS_YIELDING 20000 /* and before this one sleeps between looks */
#define LOOKS_PER_CHECK 500
#define NAP_NS 50000
#define SUM_BLOCK 64

typedef struct {
    uint64_t *arrived;        /* [ranks, APART] */
    uint8_t *parts;           /* [2, ranks, part_bytes] */
    const int32_t *processes; /* [ranks], a descriptor that is readable once that rank's process has ended */
    int64_t part_bytes;
    uint64_t turn; /* meetings so far */
    int32_t rank, ranks;
    int32_t patience; /* seconds */
    int32_t lost;     /* 0, or 1 + a rank that has ended, or -1 - one that did not come in time */
} group;

static inline void relax(void) {
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline uint8_t *part_of(const group *with, int rank, uint64_t turn) {
    return with->parts + ((int64_t)(turn & 1) * with->ranks + rank) * with->part_bytes;
}

static inline int is_there(const group *with, int rank, uint64_t turn) {
    return __atomic_load_n(with->arrived + (int64_t)rank * APART, __ATOMIC_ACQUIRE) >= turn;
}

static inline int is_lost(const group *with) { return __atomic_load_n(&with->lost, __ATOMIC_RELAXED) != 0; }

static int64_t seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec;
}

static void await_rank(group *with, int rank, uint64_t turn) {
    int64_t since = 0;
    for (int64_t looks = 1; !is_there(with, rank, turn); looks++) {
        if (looks < LOOKS_AWAKE) {
            relax();
            continue;
        }
        if (looks < LOOKS_YIELDING) sched_yield();
        else nanosleep(&(struct timespec){0, NAP_NS}, 0);
        if (looks % LOOKS_PER_CHECK) continue;
        if (is_lost(with)) return;
        if (!since) since = seconds_now();
        struct pollfd process = {with->processes[rank], POLLIN, 0};
        const int ended = poll(&process, 1, 0) > 0, late = seconds_now() - since > with->patience;
        if ((ended || late) && !is_there(with, rank, turn)) /* it may have come, and then ended */
            __atomic_store_n(&with->lost, ended ? 1 + rank : -1 - rank, __ATOMIC_RELAXED);
    }
}

/* By every thread of this rank, all of which have written what they had to and passed a barrier. */
static void meet(group *with, uint64_t turn, int thread) {
    if (thread == 0 && !is_lost(with))
        __atomic_store_n(with->arrived + (int64_t)with->rank * APART, turn, __ATOMIC_RELEASE);
    for (int rank = 0; rank < with->ranks; rank++)
        if (rank != with->rank) await_rank(with, rank, turn);
}

#define SUMS(NAME, T, LOAD, STORE)                                                                         \
    /* Elements [from, to) of what all parts of a meeting add up to, each sum rounded once. */             \
    static void NAME##_parts(const group *with, uint64_t turn, int from, int to, T *output) {              \
        for (int first = from; first < to; first += SUM_BLOCK) {                                           \
            const int count = to - first < SUM_BLOCK ? to - first : SUM_BLOCK;                             \
            float sum[SUM_BLOCK] = {0};                                                                    \
            for (int rank = 0; rank < with->ranks; rank++) {                                               \
                const T *part = (const T *)part_of(with, rank, turn) + first;                              \
                for (int i = 0; i < count; i++) sum[i] += LOAD(part[i]);                                   \
            }                                                                                              \
            for (int i = 0; i < count; i++) output[first + i] = STORE(sum[i]);                             \
        }                                                                                                  \
    }                                                                                                      \
    /* data [count] += the others' data, by all threads of a region. They need not meet before, but after. \
       Returns the last turn. */                                                                           \
    static uint64_t NAME(group *with, T *data, int64_t count, uint64_t turn, int thread, int threads) {    \
        const int64_t most = with->part_bytes / (int64_t)sizeof *data;                                     \
        for (; count > 0; data += most, count -= most) {                                                   \
            const int64_t now = count < most ? count : most;                                               \
            const int from = FROM(now), to = TO(now);                                                      \
            turn++;                                                                                        \
            T *part = (T *)part_of(with, with->rank, turn);                                                \
            if (!is_lost(with)) memcpy(part + from, data + from, (to - from) * sizeof *data);              \
            _Pragma("omp barrier") meet(with, turn, thread);                                               \
            NAME##_parts(with, turn, from, to, data);                                                      \
        }                                                                                                  \
        return turn;                                                                                       \
    }

#define SAME(VALUE) (VALUE)
SUMS(sum_bf16, uint16_t, from_bf16, to_bf16)
SUMS(sum_float, float, SAME, SAME)

/* data [count] of bfloat16, or of float, += the others'. Returns `lost`, as all of these do. */
int group_sum(group *with, void *data, int64_t count, int is_bf16) {
    uint64_t turn = 0;
#pragma omp parallel if (count > 4 * SERIAL)
    {
        const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const uint64_t first = with->turn;
        const uint64_t last = is_bf16 ? sum_bf16(with, data, count, first, thread, threads)
                                      : sum_float(with, data, count, first, thread, threads);
        if (thread == 0) turn = last;
    }
    with->turn = turn;
    return with->lost;
}

/* own [bytes] of every rank -> all [ranks, bytes] where `all` is not null. */
int group_gather(group *with, const uint8_t *own, uint8_t *all, int64_t bytes) {
    for (int64_t done = 0; done < bytes; done += with->part_bytes) {
        const int64_t now = bytes - done < with->part_bytes ? bytes - done : with->part_bytes;
        with->turn++;
        if (!is_lost(with)) memcpy(part_of(with, with->rank, with->turn), own + done, now);
        meet(with, with->turn, 0);
        for (int rank = 0; all && rank < with->ranks; rank++)
            memcpy(all + rank * bytes + done, part_of(with, rank, with->turn), now);
    }
    return with->lost;
}

/* data [bytes] of rank 0 -> every rank's. */
int group_broadcast(group *with, uint8_t *data, int64_t bytes) {
    for (int64_t done = 0; done < bytes; done += with->part_bytes) {
        const int64_t now = bytes - done < with->part_bytes ? bytes - done : with->part_bytes;
        with->turn++;
        if (with->rank == 0 && !is_lost(with)) memcpy(part_of(with, 0, with->turn), data + done, now);
        meet(with, with->turn, 0);
        if (with->rank != 0) memcpy(data + done, part_of(with, 0, with->turn), now);
    }
    return with->lost;
}
