/* Memory: the device's is the host's, up to a limit, and copies between them are tasks of a stream. */
#define _GNU_SOURCE
#include "device.h"

#include <malloc.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static atomic_size_t held;

static size_t capacity(void) {
    const char *bytes = getenv("NANOVLLM_NPU_SIMULATION_MEMORY");
    return bytes ? strtoull(bytes, NULL, 10) : (size_t)2 << 30;
}

aclError aclrtMalloc(void **memory, size_t size, aclrtMemMallocPolicy policy) {
    (void)policy;
    if (held + size > capacity()) {
        tell("%zu bytes of %zu of the simulated device are taken: no %zu more", (size_t)held, capacity(), size);
        return ACL_ERROR_RT_MEMORY_ALLOCATION;
    }
    if (posix_memalign(memory, 512, size ? size : 512)) return ACL_ERROR_RT_MEMORY_ALLOCATION;
    held += malloc_usable_size(*memory);
    return ACL_SUCCESS;
}

aclError aclrtMallocAlign32(void **memory, size_t size, aclrtMemMallocPolicy policy) {
    return aclrtMalloc(memory, size, policy);
}

aclError aclrtFree(void *memory) {
    held -= malloc_usable_size(memory);
    free(memory);
    return ACL_SUCCESS;
}

aclError aclrtMallocHost(void **memory, size_t size) {
    return posix_memalign(memory, 64, size ? size : 64) ? ACL_ERROR_RT_MEMORY_ALLOCATION : ACL_SUCCESS;
}

aclError aclrtMallocHostWithCfg(void **memory, uint64_t size, aclrtMallocConfig *config) {
    (void)config;
    return aclrtMallocHost(memory, size);
}

aclError aclrtFreeHost(void *memory) {
    free(memory);
    return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr kind, size_t *unused, size_t *total) {
    (void)kind;
    *total = capacity();
    *unused = held < *total ? *total - held : 0;
    return ACL_SUCCESS;
}

static Outcome copy(Task *task) {
    memmove(task->into, task->from, task->size);
    return FINISHED;
}

static Outcome fill(Task *task) {
    memset(task->into, (int)task->number, task->size);
    return FINISHED;
}

aclError aclrtMemcpyAsync(void *into, size_t room, const void *from, size_t size, aclrtMemcpyKind kind, aclrtStream stream) {
    (void)kind;
    if (size > room) return ACL_ERROR_RT_PARAM_INVALID;
    Task *task = new_task(copy);
    task->into = into;
    task->from = from;
    task->size = size;
    submit(stream, task);
    return ACL_SUCCESS;
}

aclError aclrtMemcpy(void *into, size_t room, const void *from, size_t size, aclrtMemcpyKind kind) {
    (void)kind;
    if (size > room) return ACL_ERROR_RT_PARAM_INVALID;
    memmove(into, from, size);
    return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void *into, size_t room, int32_t value, size_t size, aclrtStream stream) {
    if (size > room) return ACL_ERROR_RT_PARAM_INVALID;
    Task *task = new_task(fill);
    task->into = into;
    task->number = value;
    task->size = size;
    submit(stream, task);
    return ACL_SUCCESS;
}

aclError aclrtMemset(void *into, size_t room, int32_t value, size_t size) {
    if (size > room) return ACL_ERROR_RT_PARAM_INVALID;
    memset(into, value, size);
    return ACL_SUCCESS;
}

static Outcome call(Task *task) {
    task->function(task->into);
    return FINISHED;
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void *argument) {
    Task *task = new_task(call);
    task->function = function;
    task->into = argument;
    submit(stream, task);
    return ACL_SUCCESS;
}
