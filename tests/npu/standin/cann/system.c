/* What the machine says of itself: how many devices, of what kind, under which version; and which one a thread uses. */
#include "device.h"

#include <acl/acl_op_compiler.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_DEVICES = 64 };
static __thread int current = -1;
static char contexts[MOST_DEVICES];

aclError aclInit(const char *path) {
    (void)path;
    return ACL_SUCCESS;
}

aclError aclFinalize(void) { return ACL_SUCCESS; }

/* ASCEND_RT_VISIBLE_DEVICES counts up to the first number that is no device, as the real runtime has it. */
aclError aclrtGetDeviceCount(uint32_t *count) {
    const char *wanted = getenv("NANOVLLM_NPU_SIMULATION");
    uint32_t present = wanted ? (uint32_t)atoi(wanted) : 0;
    const char *visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
    *count = visible ? 0 : present;
    for (const char *at = visible; at && *at; *count += 1) {
        char *end;
        unsigned long number = strtoul(at, &end, 10);
        if (end == at || number >= present) break;
        at = *end == ',' ? end + 1 : "";
    }
    if (*count > MOST_DEVICES) *count = MOST_DEVICES;
    return ACL_SUCCESS;
}

const char *aclrtGetSocName(void) { return "Ascend910B4"; }

aclError aclrtSetDevice(int32_t device) {
    uint32_t count;
    aclrtGetDeviceCount(&count);
    if (device < 0 || (uint32_t)device >= count) {
        tell("there is no device %d: %u are simulated and visible", device, count);
        return ACL_ERROR_RT_PARAM_INVALID;
    }
    current = device;
    return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t *device) {
    if (current < 0) return ACL_ERROR_RT_CONTEXT_NULL;
    *device = current;
    return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(aclrtContext *context) {
    if (current < 0) return ACL_ERROR_RT_CONTEXT_NULL;
    *context = &contexts[current];
    return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
    current = (int)((char *)context - contexts);
    return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    (void)device;
    *flags = 0;
    *active = 1;
    return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
    *can = device != peer;
    return ACL_SUCCESS;
}

aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo kind, int64_t *value) {
    (void)device, (void)kind;
    *value = 0;
    return ACL_SUCCESS;
}

aclError aclsysGetVersionStr(char *package, char *version) {
    (void)package;
    strcpy(version, "9.0.0");
    return ACL_SUCCESS;
}

aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion *version) {
    (void)name;
    memset(version, 0, sizeof *version);
    strcpy(version->version, "9.0.0");
    return ACL_SUCCESS;
}

size_t aclGetCompileoptSize(aclCompileOpt option) {
    (void)option;
    return 16;
}

aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t size) {
    (void)option;
    snprintf(value, size, "disable");
    return ACL_SUCCESS;
}

/* Of operators compiled at run time there are none: what nobody emulates fails here. */
aclError aclopCompileAndExecute(const char *operator, int inputs, const aclTensorDesc *const input[],
                                const aclDataBuffer *const in[], int outputs, const aclTensorDesc *const output[],
                                aclDataBuffer *const out[], const aclopAttr *attributes, aclopEngineType engine,
                                aclopCompileType compile, const char *path, aclrtStream stream) {
    (void)inputs, (void)input, (void)in, (void)outputs, (void)output, (void)out, (void)attributes;
    (void)engine, (void)compile, (void)path, (void)stream;
    tell("the stand-in for CANN has no operator %s", operator);
    return ACL_ERROR_OP_NOT_FOUND;
}
