/* Captured models: what a stream would have done, kept and replayed; groups of tasks whose arguments can be exchanged. */
#include "device.h"

#include <stdlib.h>

static uint64_t captures;

aclError aclmdlRICaptureBegin(aclrtStream on, aclmdlRICaptureMode mode) {
    (void)mode;
    Stream *stream = on;
    if (stream->capturing) {
        tell("the stream is being captured already");
        return ACL_ERROR_RT_STREAM_CAPTURED;
    }
    Model *model = calloc(1, sizeof *model);
    model->id = ++captures;
    model->origin = stream;
    stream->capturing = model;
    standin_deferring++;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureGetInfo(aclrtStream on, aclmdlRICaptureStatus *status, aclmdlRI *model) {
    Stream *stream = on;
    *status = stream->capturing ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
    if (model) *model = stream->capturing;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureEnd(aclrtStream on, aclmdlRI *into) {
    Model *model = ((Stream *)on)->capturing;
    if (!model || model->origin != on) {
        tell("no capture began on this stream");
        return ACL_ERROR_RT_STREAM_NOT_CAPTURED;
    }
    for (Stream *stream; (stream = stream_of_capture(model->id));) stream->capturing = NULL;
    aclrtStreamStatus ignored;
    aclrtStreamQuery(on, &ignored);
    *into = model;
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode) {
    *mode = ACL_MODEL_RI_CAPTURE_MODE_RELAXED;
    return ACL_SUCCESS;
}

static Outcome replay(Task *task) { return run_tasks(&task->model->tasks, &task->at); }

aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream) {
    Task *task = new_task(replay);
    task->model = model;
    submit(stream, task);
    return ACL_SUCCESS;
}

aclError aclmdlRIDestroy(aclmdlRI of) {
    Model *model = of;
    forget_all(&model->tasks);
    free(model);
    return ACL_SUCCESS;
}

static Outcome run_group(Task *task) {
    Task *at = NULL;
    return run_tasks(&task->group->tasks, &at);
}

static void forget_group(Task *task) {
    forget_all(&task->group->tasks);
    free(task->group);
}

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream on) {
    Model *model = ((Stream *)on)->capturing;
    if (!model || model->open) {
        tell(model ? "a task group is open already" : "a task group is only possible during a capture");
        return ACL_ERROR_RT_STREAM_NOT_CAPTURED;
    }
    model->open = calloc(1, sizeof *model->open);
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream on, aclrtTaskGrp *handle) {
    Stream *stream = on;
    Model *model = stream->capturing;
    if (!model || !model->open) {
        tell("no task group is open");
        return ACL_ERROR_RT_STREAM_NOT_CAPTURED;
    }
    Task *task = new_task(run_group);
    task->forget = forget_group;
    task->group = *handle = model->open;
    model->open = NULL;
    submit(stream, task);
    return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream on, aclrtTaskGrp handle) {
    Stream *stream = on;
    if (stream->updating || stream->capturing) {
        tell("an update of a task group needs a stream that does nothing else");
        return ACL_ERROR_RT_STREAM_CAPTURED;
    }
    stream->updating = handle;
    standin_deferring++;
    return ACL_SUCCESS;
}

static Outcome exchange(Task *task) {
    Tasks old = task->group->tasks;
    task->group->tasks = task->body;
    task->body = (Tasks){0};
    forget_all(&old);
    return FINISHED;
}

static void forget_body(Task *task) { forget_all(&task->body); }

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream on) {
    Stream *stream = on;
    Group *group = stream->updating;
    if (!group) {
        tell("no update of a task group is open");
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    Task *task = new_task(exchange);
    task->forget = forget_body;
    task->group = group;
    task->body = stream->update;
    stream->update = (Tasks){0};
    stream->updating = NULL;
    if (task->body.length != group->tasks.length) {
        tell("a task group of %d tasks was updated with %d", group->tasks.length, task->body.length);
        forget_all(&task->body);
        free(task);
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    submit(stream, task);
    return ACL_SUCCESS;
}
