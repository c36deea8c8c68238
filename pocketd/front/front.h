/* `pocket run` and `pocket NAME` without an interpreter's start. See front.c. */
#ifndef POCKET_FRONT_H
#define POCKET_FRONT_H

#include "client.h"

#define REFUSED_STATUS 125 /* as podman's */
#define NOT_FOUND_STATUS 127

struct words {
    const char *name; /* of a service, or of a pocket that has a definition */
    bool pocket, cold, trace;
    const char *directory, *runtime_dir;
    int mounts;
    const char *mount[SENT_FDS];
    const char *kind, *program;
    char **arguments;
};

/* run.c: what stands behind `pocket run`; false where Python is to read it. */
bool parse(struct words *, char **rest);

/* run.c: run a program and end as it ends. Returns where Python is to do it: all is then as it was. */
void run(struct words *);

/* hold.c: block what is passed on to a worker, from before it is asked for. */
void block_signals(void);

/* hold.c: until `hold`, what ends or stops a command from a terminal does so to this one. */
void unblock_ends(void);

/* hold.c: pass signals on until the worker has ended, then end in the same way. */
void hold(const struct login *) __attribute__((noreturn));

/* paths.c: a path without ., .. and double slashes, from the working directory; links are kept. The caller's to free,
 * as all that these return. NULL: errno says why. */
char *absolute(const char *path);
char *joined(const char *directory, const char *path);

/* paths.c: one line for each argument that names a file which the program will not see. `tops`, which ends with NULL:
 * what it sees besides the system's own. */
void hint(const struct words *, const char *const *tops);

/* front.c: the directory that this program's file is in; NULL where /proc does not tell. */
char *home(void);

/* front.c: a line of ours on standard error. */
void say(const char *prefix, struct part text);

#endif
