/* What pages.c writes is read by runtime/workingset.py. */
#pragma once

void pages_note(int fd);
