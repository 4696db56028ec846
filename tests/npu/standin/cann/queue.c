/* The order of work: streams, what they hold, and running it. */
#include "device.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t progress = PTHREAD_COND_INITIALIZER;
static Stream *streams;
static int created;
static char message[512] = "no error";
static int failed;

int standin_deferring;
/* Hold all work back until somebody waits for it. */
static int holding;

void tell(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
}

const char *aclGetRecentErrMsg(void) { return message; }

Task *new_task(Outcome (*run)(Task *)) {
    Task *task = calloc(1, sizeof *task);
    task->run = run;
    return task;
}

void append(Tasks *tasks, Task *task) {
    *(tasks->first ? &tasks->last->next : &tasks->first) = task;
    tasks->last = task;
    tasks->length++;
}

static void forget(Task *task) {
    if (task->forget) task->forget(task);
    free(task);
}

void forget_all(Tasks *tasks) {
    for (Task *task = tasks->first, *next; task; task = next) {
        next = task->next;
        forget(task);
    }
    *tasks = (Tasks){0};
}

Outcome run_tasks(Tasks *tasks, Task **at) {
    for (Task *task = *at ? *at : tasks->first; task; task = task->next) {
        Outcome outcome = task->run(task);
        *at = task;
        if (outcome != FINISHED) return outcome;
    }
    *at = NULL;
    return FINISHED;
}

static int deferred(Stream *stream) {
    return stream->queue.first || stream->running || stream->capturing || stream->updating || holding;
}

static void count_deferring(void) {
    int count = holding;
    for (Stream *stream = streams; stream; stream = stream->next) count += deferred(stream);
    standin_deferring = count;
}

/* One step of one stream, with the lock held, which is let go while the task runs. */
static int advance(Stream *stream) {
    Task *task = stream->queue.first;
    if (!task || stream->running) return 0;
    stream->running = 1;
    pthread_mutex_unlock(&lock);
    Outcome outcome = task->run(task);
    pthread_mutex_lock(&lock);
    stream->running = 0;
    if (outcome == WAITING) return 0;
    if (outcome == FAILED) failed = 1;
    if (!(stream->queue.first = task->next)) stream->queue.last = NULL;
    stream->queue.length--;
    forget(task);
    return 1;
}

static void run_what_can_run(void) {
    for (int moved = 1; moved;) {
        moved = 0;
        for (Stream *stream = streams; stream; stream = stream->next)
            while (advance(stream)) moved = 1;
    }
    count_deferring();
    pthread_cond_broadcast(&progress);
}

void submit(Stream *stream, Task *task) {
    pthread_mutex_lock(&lock);
    Model *model = stream->capturing;
    if (model) {
        append(model->open ? &model->open->tasks : &model->tasks, task);
    } else if (stream->updating) {
        append(&stream->update, task);
    } else {
        append(&stream->queue, task);
        if (!holding) run_what_can_run();
    }
    count_deferring();
    pthread_mutex_unlock(&lock);
}

static int any_runs(void) {
    Stream *stream = streams;
    while (stream && !stream->running) stream = stream->next;
    return stream != NULL;
}

/* Waits until a stream is empty; an event that nobody signals makes that an error.
 * What went wrong on any stream is told once, to whoever waits first. */
aclError finish(Stream *stream, int milliseconds) {
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += milliseconds / 1000;
    pthread_mutex_lock(&lock);
    aclError error = stream->capturing ? ACL_ERROR_RT_STREAM_CAPTURED : ACL_SUCCESS;
    if (error) tell("a stream that is being captured cannot be waited for");
    run_what_can_run();
    while (!error && stream->queue.first) {
        if (pthread_cond_timedwait(&progress, &lock, &end) == ETIMEDOUT && !any_runs()) {
            tell("stream %d waits for an event that nobody records", stream->id);
            error = ACL_ERROR_RT_STREAM_SYNC_TIMEOUT;
        }
    }
    if (!error) {
        error = failed ? ACL_ERROR_RT_INTERNAL_ERROR : ACL_SUCCESS;
        failed = 0;
    }
    pthread_mutex_unlock(&lock);
    return error;
}

Stream *stream_of_capture(uint64_t capture) {
    Stream *stream = streams;
    while (stream && !(stream->capturing && stream->capturing->id == capture)) stream = stream->next;
    return stream;
}

/* For the caller's kernels: is work on this stream to be submitted, or may it be done at once? */
int standin_is_deferred(Stream *stream) {
    pthread_mutex_lock(&lock);
    int answer = deferred(stream);
    pthread_mutex_unlock(&lock);
    return answer;
}

void standin_hold(int hold) {
    pthread_mutex_lock(&lock);
    holding = hold;
    if (!hold) run_what_can_run();
    count_deferring();
    pthread_mutex_unlock(&lock);
}

static Outcome (*run_caller)(int64_t);
static int (*forget_caller)(int64_t);

void standin_set_callbacks(Outcome (*run)(int64_t), int (*forget)(int64_t)) {
    run_caller = run;
    forget_caller = forget;
}

void standin_tell(const char *what) { tell("%s", what); }

static Outcome run_number(Task *task) { return run_caller(task->number); }
static void forget_number(Task *task) { forget_caller(task->number); }

/* Submits a task that the caller knows by number. */
void standin_submit(Stream *stream, int64_t number) {
    Task *task = new_task(run_number);
    task->number = number;
    task->forget = forget_number;
    submit(stream, task);
}

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flag) {
    (void)priority, (void)flag;
    Stream *made = calloc(1, sizeof *made);
    pthread_mutex_lock(&lock);
    made->id = ++created;
    made->next = streams;
    streams = made;
    pthread_mutex_unlock(&lock);
    *stream = made;
    return ACL_SUCCESS;
}

aclError aclrtCreateStream(aclrtStream *stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }

aclError aclrtDestroyStreamForce(aclrtStream stream) {
    pthread_mutex_lock(&lock);
    Stream **place = &streams;
    while (*place && *place != stream) place = &(*place)->next;
    if (*place) *place = (*place)->next;
    count_deferring();
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

aclError aclrtDestroyStream(aclrtStream stream) { return aclrtDestroyStreamForce(stream); }

aclError aclrtStreamGetId(aclrtStream stream, int32_t *id) {
    *id = ((Stream *)stream)->id;
    return ACL_SUCCESS;
}

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
    pthread_mutex_lock(&lock);
    run_what_can_run();
    *status = ((Stream *)stream)->queue.first ? ACL_STREAM_STATUS_NOT_READY : ACL_STREAM_STATUS_COMPLETE;
    pthread_mutex_unlock(&lock);
    return ACL_SUCCESS;
}

enum { PATIENCE_MS = 3000 };

aclError aclrtSynchronizeStream(aclrtStream stream) { return finish(stream, PATIENCE_MS); }

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) {
    return finish(stream, timeout > 0 ? timeout : PATIENCE_MS);
}

aclError aclrtSynchronizeDevice(void) {
    aclError error = ACL_SUCCESS;
    for (Stream *stream = streams; stream && !error; stream = stream->next) error = finish(stream, PATIENCE_MS);
    return error;
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
    (void)timeout;
    return aclrtSynchronizeDevice();
}
