/* Settings of a real device that change nothing here: taken, and some given back. */
#include "device.h"

#include <acl/acl_op_compiler.h>

aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) {
    (void)mode;
    return ACL_SUCCESS;
}

aclError aclrtSetOpExecuteTimeOut(uint32_t timeout) {
    (void)timeout;
    return ACL_SUCCESS;
}

aclError aclrtSetOpWaitTimeout(uint32_t timeout) {
    (void)timeout;
    return ACL_SUCCESS;
}

aclError aclSetCompileopt(aclCompileOpt option, const char *value) {
    (void)option, (void)value;
    return ACL_SUCCESS;
}

enum { OPTIONS = 64 };
static int64_t options[OPTIONS];

aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
    options[(unsigned)option % OPTIONS] = value;
    return ACL_SUCCESS;
}

aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return aclrtSetSysParamOpt(option, value); }

aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) {
    *value = options[(unsigned)option % OPTIONS];
    return ACL_SUCCESS;
}

aclError aclrtSetStreamAttribute(aclrtStream stream, aclrtStreamAttr attribute, aclrtStreamAttrValue *value) {
    (void)stream, (void)attribute, (void)value;
    return ACL_SUCCESS;
}

aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) {
    (void)stream, (void)mode;
    return ACL_SUCCESS;
}

aclError aclrtSetStreamOverflowSwitch(aclrtStream stream, uint32_t flag) {
    (void)stream, (void)flag;
    return ACL_SUCCESS;
}

aclError aclrtGetStreamOverflowSwitch(aclrtStream stream, uint32_t *flag) {
    (void)stream;
    *flag = 0;
    return ACL_SUCCESS;
}
