/* HCCL between processes of one host, over shared memory: a piece at a time, with a barrier around each.
 *
 * A rank that does not come within HCCL_EXEC_TIMEOUT seconds (HCCL_CONNECT_TIMEOUT when the group is made) is an error of the
 * stream and of the group, as on a card.
 */
#define _GNU_SOURCE
#include "device.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, INTERNAL = 4, UNSUPPORTED = 5, TIMEOUT = 9 };
enum { SUM, PRODUCT, MAXIMUM, MINIMUM };
enum { INT8 = 0, INT32 = 2, FP16 = 3, FP32 = 4, INT64 = 5, UINT8 = 7, FP64 = 10, BF16 = 11 };
enum { ROOT_INFO_BYTES = 4108, NAME_BYTES = 128, PIECE = 4 << 20 };

typedef struct {
    atomic_uint arrived, round;
    char padding[56];
    char pieces[];
} Shared;

typedef struct {
    Shared *shared;
    uint32_t ranks, rank;
    int error;
    char name[NAME_BYTES];
} Comm;

static int bytes_of(int type) {
    static const int sizes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};
    return type >= 0 && type < 12 ? sizes[type] : 0;
}

static char *piece(Comm *comm, uint32_t rank) { return comm->shared->pieces + (size_t)rank * PIECE; }

static int seconds_of(const char *variable, int otherwise) {
    const char *text = getenv(variable);
    return text && atoi(text) > 0 ? atoi(text) : otherwise;
}

/* Spins briefly, then sleeps: ranks share few cores. */
static int meet(Comm *comm, int seconds) {
    Shared *shared = comm->shared;
    unsigned round = shared->round;
    if (atomic_fetch_add(&shared->arrived, 1) + 1 == comm->ranks) {
        shared->arrived = 0;
        atomic_fetch_add(&shared->round, 1);
        return SUCCESS;
    }
    time_t end = time(NULL) + seconds;
    for (int turn = 0; shared->round == round; turn++) {
        if (turn < 200) continue;
        nanosleep(&(struct timespec){.tv_nsec = 30000}, NULL);
        if (time(NULL) > end) {
            tell("EI0002: rank %u of %u waited %d s for the others", comm->rank, comm->ranks, seconds);
            return comm->error = TIMEOUT;
        }
    }
    return SUCCESS;
}

static double get(const char *from, int type, uint64_t index) {
    switch (type) {
    case FP32: return ((const float *)from)[index];
    case FP64: return ((const double *)from)[index];
    case FP16: return (double)((const _Float16 *)from)[index];
    case INT8: return ((const int8_t *)from)[index];
    case UINT8: return ((const uint8_t *)from)[index];
    case INT32: return ((const int32_t *)from)[index];
    default: {
        uint32_t bits = (uint32_t)((const uint16_t *)from)[index] << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    }
}

static void put(char *into, int type, uint64_t index, double value) {
    switch (type) {
    case FP32: ((float *)into)[index] = (float)value; break;
    case FP64: ((double *)into)[index] = value; break;
    case FP16: ((_Float16 *)into)[index] = (_Float16)value; break;
    case INT8: ((int8_t *)into)[index] = (int8_t)value; break;
    case UINT8: ((uint8_t *)into)[index] = (uint8_t)value; break;
    case INT32: ((int32_t *)into)[index] = (int32_t)value; break;
    default: {
        float narrow = (float)value;
        uint32_t bits;
        memcpy(&bits, &narrow, 4);
        ((uint16_t *)into)[index] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
    }
}

#define COMBINE(a, b) (how == SUM ? (a) + (b) : how == PRODUCT ? (a) * (b) : how == MAXIMUM ? ((b) > (a) ? (b) : (a)) : ((b) < (a) ? (b) : (a)))

static void reduce(Comm *comm, char *into, uint64_t count, int type, int how) {
    for (uint64_t i = 0; i < count; i++) {
        if (type == INT64) {
            int64_t total = ((int64_t *)piece(comm, 0))[i];
            for (uint32_t r = 1; r < comm->ranks; r++) total = COMBINE(total, ((int64_t *)piece(comm, r))[i]);
            ((int64_t *)into)[i] = total;
        } else {
            double total = get(piece(comm, 0), type, i);
            for (uint32_t r = 1; r < comm->ranks; r++) total = COMBINE(total, get(piece(comm, r), type, i));
            put(into, type, i, total);
        }
    }
}

/* Walks over `count` elements in pieces; `before` fills this rank's piece, `after` reads all of them. */
typedef void (*Part)(Comm *, Collective *, uint64_t start, uint64_t count, uint32_t turn);

static Outcome walk(Collective *call, uint32_t turns, Part before, Part after) {
    Comm *comm = call->comm;
    int seconds = seconds_of("HCCL_EXEC_TIMEOUT", 1836);
    uint64_t most = PIECE / bytes_of(call->type);
    for (uint32_t turn = 0; turn < turns; turn++) {
        for (uint64_t start = 0; start < call->count; start += most) {
            uint64_t count = call->count - start < most ? call->count - start : most;
            before(comm, call, start, count, turn);
            if (meet(comm, seconds)) return FAILED;
            after(comm, call, start, count, turn);
            if (meet(comm, seconds)) return FAILED;
        }
    }
    return FINISHED;
}

static void give(Comm *comm, Collective *call, uint64_t start, uint64_t count, uint32_t turn) {
    int size = bytes_of(call->type);
    memcpy(piece(comm, comm->rank), (char *)call->from + (turn * call->count + start) * size, count * size);
}

static void take_sum(Comm *comm, Collective *call, uint64_t start, uint64_t count, uint32_t turn) {
    (void)turn;
    reduce(comm, (char *)call->into + start * bytes_of(call->type), count, call->type, call->operation);
}

static void take_own_sum(Comm *comm, Collective *call, uint64_t start, uint64_t count, uint32_t turn) {
    if (turn == comm->rank) take_sum(comm, call, start, count, turn);
}

static void take_all(Comm *comm, Collective *call, uint64_t start, uint64_t count, uint32_t turn) {
    (void)turn;
    int size = bytes_of(call->type);
    for (uint32_t r = 0; r < comm->ranks; r++)
        memcpy((char *)call->into + (r * call->count + start) * size, piece(comm, r), count * size);
}

static void take_root(Comm *comm, Collective *call, uint64_t start, uint64_t count, uint32_t turn) {
    (void)turn;
    int size = bytes_of(call->type);
    memcpy((char *)call->into + start * size, piece(comm, call->root), count * size);
}

static Outcome all_reduce(Task *task) { return walk(&task->collective, 1, give, take_sum); }
static Outcome all_gather(Task *task) { return walk(&task->collective, 1, give, take_all); }
static Outcome broadcast(Task *task) { return walk(&task->collective, 1, give, take_root); }
static Outcome reduce_scatter(Task *task) {
    return walk(&task->collective, ((Comm *)task->collective.comm)->ranks, give, take_own_sum);
}
static Outcome barrier(Task *task) {
    return meet(task->collective.comm, seconds_of("HCCL_EXEC_TIMEOUT", 1836)) ? FAILED : FINISHED;
}

static int start(Outcome (*run)(Task *), Collective call, void *stream) {
    if (!bytes_of(call.type)) return UNSUPPORTED;
    Task *task = new_task(run);
    task->collective = call;
    submit(stream, task);
    return SUCCESS;
}

int HcclAllReduce(void *from, void *into, uint64_t count, int type, int how, void *comm, void *stream) {
    return start(all_reduce, (Collective){.comm = comm, .from = from, .into = into, .count = count, .type = type, .operation = how}, stream);
}

int HcclReduceScatter(void *from, void *into, uint64_t count, int type, int how, void *comm, void *stream) {
    return start(reduce_scatter, (Collective){.comm = comm, .from = from, .into = into, .count = count, .type = type, .operation = how}, stream);
}

int HcclAllGather(void *from, void *into, uint64_t count, int type, void *comm, void *stream) {
    return start(all_gather, (Collective){.comm = comm, .from = from, .into = into, .count = count, .type = type}, stream);
}

int HcclBroadcast(void *buffer, uint64_t count, int type, uint32_t root, void *comm, void *stream) {
    return start(broadcast, (Collective){.comm = comm, .from = buffer, .into = buffer, .count = count, .type = type, .root = root}, stream);
}

int HcclBarrier(void *comm, void *stream) { return start(barrier, (Collective){.comm = comm}, stream); }

int HcclGetRootInfo(void *info) {
    static atomic_int made;
    memset(info, 0, ROOT_INFO_BYTES);
    snprintf(info, NAME_BYTES, "/nanovllm-standin-%d-%d-%ld", getpid(), made++, (long)time(NULL));
    return SUCCESS;
}

int HcclCommInitRootInfoConfig(uint32_t ranks, const void *info, uint32_t rank, const void *config, void **into) {
    (void)config;
    Comm *comm = calloc(1, sizeof *comm);
    comm->ranks = ranks;
    comm->rank = rank;
    memcpy(comm->name, info, NAME_BYTES - 1);
    size_t size = sizeof(Shared) + (size_t)ranks * PIECE;
    int file = shm_open(comm->name, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, (off_t)size)) return INTERNAL;
    comm->shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (comm->shared == MAP_FAILED) return INTERNAL;
    int error = meet(comm, seconds_of("HCCL_CONNECT_TIMEOUT", 120));
    if (rank == 0 || error) shm_unlink(comm->name);
    *into = comm;
    return error;
}

int HcclCommInitRootInfo(uint32_t ranks, const void *info, uint32_t rank, void **into) {
    return HcclCommInitRootInfoConfig(ranks, info, rank, NULL, into);
}

int HcclCommDestroy(void *of) {
    Comm *comm = of;
    munmap(comm->shared, sizeof(Shared) + (size_t)comm->ranks * PIECE);
    free(comm);
    return SUCCESS;
}

int HcclGetCommName(void *comm, char *name) {
    snprintf(name, NAME_BYTES, "%s", ((Comm *)comm)->name + 1);
    return SUCCESS;
}

int HcclGetCommAsyncError(void *comm, int *error) {
    *error = ((Comm *)comm)->error;
    return SUCCESS;
}

uint32_t HcclGetCommConfigCapability(void) { return 0; }
