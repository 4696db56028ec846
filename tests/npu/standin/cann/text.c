/* The bounded string functions that CANN's libraries export and torch_npu calls. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

int vsnprintf_s(char *into, size_t size, size_t count, const char *format, va_list values) {
    (void)count;
    return vsnprintf(into, size, format, values);
}

int snprintf_s(char *into, size_t size, size_t count, const char *format, ...) {
    va_list values;
    va_start(values, format);
    int length = vsnprintf_s(into, size, count, format, values);
    va_end(values);
    return length;
}

int strcpy_s(char *into, size_t size, const char *text) {
    if (strlen(text) >= size) return 1;
    strcpy(into, text);
    return 0;
}
