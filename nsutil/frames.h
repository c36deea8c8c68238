/* What frames.c does is asked for by runtime/frames.py. */
#pragma once

void *frames_call(void **current, void *(*call)(void *), void *callable);
