/* A call of Python's with no frame beneath it (runtime/frames.py): in C, since what traces looks for the frame in which
 * the next line of Python is. */
#include "frames.h"

/* `current`: where the thread's state has its frame. `call`: PyObject_CallNoArgs. The GIL is held. */
void *frames_call(void **current, void *(*call)(void *), void *callable) {
    void *frame = *current;
    *current = 0;
    void *result = call(callable);
    *current = frame;
    return result;
}
