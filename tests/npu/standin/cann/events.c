/* Events: points in a stream that others wait for; and waiting for a value in memory, which torch.npu.ExternalEvent is made of. */
#include "device.h"

#include <stdlib.h>
#include <time.h>

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

/* Never freed: a task that still waits may name it. */
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) {
    (void)flag;
    *event = calloc(1, sizeof(Event));
    return ACL_SUCCESS;
}

aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) { return aclrtCreateEventWithFlag(event, flag); }

aclError aclrtDestroyEvent(aclrtEvent event) {
    (void)event;
    return ACL_SUCCESS;
}

static Outcome mark(Task *task) {
    task->event->milliseconds = now();
    if (task->generation > task->event->done) task->event->done = task->generation;
    return FINISHED;
}

static Outcome await_record(Task *task) { return task->event->done >= task->generation ? FINISHED : WAITING; }

static void submit_for(Event *event, Stream *stream, Outcome (*run)(Task *)) {
    Task *task = new_task(run);
    task->event = event;
    task->generation = event->requested;
    submit(stream, task);
}

/* Within a capture the order of the tasks is what an event stands for. */
aclError aclrtRecordEvent(aclrtEvent of, aclrtStream on) {
    Event *event = of;
    Stream *stream = on;
    if (stream->capturing) {
        event->capture = stream->capturing->id;
    } else {
        event->requested++;
        submit_for(event, stream, mark);
    }
    return ACL_SUCCESS;
}

aclError aclrtStreamWaitEvent(aclrtStream on, aclrtEvent of) {
    Event *event = of;
    Stream *stream = on;
    Stream *captured = event->capture ? stream_of_capture(event->capture) : NULL;
    if (captured) {
        stream->capturing = captured->capturing;
        standin_deferring++;
    } else if (!stream->capturing && event->requested) {
        submit_for(event, stream, await_record);
    }
    return ACL_SUCCESS;
}

aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) {
    (void)event, (void)stream;
    return ACL_SUCCESS;
}

static Outcome write_value(Task *task) {
    *(volatile uint64_t *)task->into = (uint64_t)task->number;
    return FINISHED;
}

enum { AT_LEAST, EQUAL, ANY_BIT };

static Outcome await_value(Task *task) {
    uint64_t value = *(volatile uint64_t *)task->into, wanted = (uint64_t)task->number;
    int met = task->size == AT_LEAST ? value >= wanted : task->size == ANY_BIT ? (value & wanted) != 0 : value == wanted;
    return met ? FINISHED : WAITING;
}

static aclError submit_value(void *address, uint64_t value, uint32_t flag, Stream *stream, Outcome (*run)(Task *)) {
    Task *task = new_task(run);
    task->into = address;
    task->number = (int64_t)value;
    task->size = flag;
    submit(stream, task);
    return ACL_SUCCESS;
}

aclError aclrtValueWrite(void *address, uint64_t value, uint32_t flag, aclrtStream stream) {
    return submit_value(address, value, flag, stream, write_value);
}

aclError aclrtValueWait(void *address, uint64_t value, uint32_t flag, aclrtStream stream) {
    return submit_value(address, value, flag, stream, await_value);
}

static int recorded(Event *event) { return event->done >= event->requested; }

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    *status = recorded(event) ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
    return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
    *status = recorded(event) ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
    return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent event) { return recorded(event) ? ACL_SUCCESS : aclrtSynchronizeDevice(); }

aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent start, aclrtEvent end) {
    *milliseconds = (float)(((Event *)end)->milliseconds - ((Event *)start)->milliseconds);
    return ACL_SUCCESS;
}
