/* What PyObject_SetArenaAllocator takes (cpython/objimpl.h). `context` is not used. */
#pragma once
#include <stddef.h>

void *arenas_alloc(void *context, size_t size);
void arenas_free(void *context, void *p, size_t size);
