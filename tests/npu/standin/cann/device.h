/* Work of a simulated device: streams hold tasks in order, tasks may wait for events, captured tasks make a model.
 *
 * A task runs at once in the thread that submits it, unless its stream waits for something. Device memory is host memory.
 */
#pragma once

#include <acl/acl.h>
#include <stddef.h>
#include <stdint.h>

typedef struct Task Task;
typedef struct Stream Stream;
typedef struct Event Event;
typedef struct Model Model;
typedef struct Group Group;

typedef struct {
    Task *first, *last;
    int length;
} Tasks;

typedef enum { FINISHED, WAITING, FAILED } Outcome;

typedef struct {
    void *comm, *from, *into;
    uint64_t count;
    int type, operation;
    uint32_t root;
} Collective;

/* `run` reads whichever fields it needs; it is called again later where it answers WAITING. */
struct Task {
    Outcome (*run)(Task *);
    void (*forget)(Task *);
    Task *next;
    void *into;
    const void *from;
    size_t size;
    int64_t number;
    uint64_t generation;
    Event *event;
    Model *model;
    Group *group;
    Task *at;
    Tasks body;
    Collective collective;
    void (*function)(void *);
};

/* Tasks that an update can exchange for others. */
struct Group {
    Tasks tasks;
};

struct Model {
    uint64_t id;
    Stream *origin;
    Tasks tasks;
    Group *open;
};

struct Event {
    uint64_t requested, done, capture;
    double milliseconds;
};

struct Stream {
    int id;
    Tasks queue;
    int running;
    Model *capturing;
    Group *updating;
    Tasks update;
    Stream *next;
};

Task *new_task(Outcome (*run)(Task *));
void append(Tasks *tasks, Task *task);
void forget_all(Tasks *tasks);
/* Captures the task, or queues it and runs what can run. */
void submit(Stream *stream, Task *task);
aclError finish(Stream *stream, int milliseconds);
Stream *stream_of_capture(uint64_t capture);
Outcome run_tasks(Tasks *tasks, Task **at);
/* Streams on which work is not done at once: more than 0 while anything is captured, waited for or held. */
extern int standin_deferring;
/* What aclGetRecentErrMsg tells next. */
void tell(const char *format, ...) __attribute__((format(printf, 1, 2)));
