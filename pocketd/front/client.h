/* The caller's side of pocketd: a message with descriptors, the control socket, a login. What nsutil/messages.py,
 * pocketd/client/control.py and handshake.py are in Python; the same words where something fails.
 *
 * Single-threaded. Descriptors are close-on-exec, and stay the caller's where they are sent.
 */
#ifndef POCKET_CLIENT_H
#define POCKET_CLIENT_H

#include "msgpack.h"

#define SENT_FDS 31 /* in one message: one less than are taken, for a body that goes by memfd */
#define RESTART 10000 /* milliseconds that a pocketd which ended in mid-call may take to come back */

/* An error for a person, and its code for programs. */
struct failure {
    struct part code, message;
};

struct control {
    int sock;
    int64_t last; /* the last request's id */
    char path[108]; /* unix(7), sun_path */
};

struct login {
    int session, hold; /* ours; closing `hold` ends the worker */
    int worker_end, init_end; /* to be sent */
};

/* What goes with a login. `roles` says what each of `fds` is, session and hold not among them. */
struct request {
    const char *mode, *name, *path; /* the last two may be NULL */
    int count, fds[SENT_FDS - 2];
    const char *roles[SENT_FDS - 2];
    struct writer fields; /* further pairs, packed */
    uint32_t pairs;
};

enum received { MESSAGE, CLOSED, FAILED, NONSENSE };

/* Send one message. False: errno says why, EMSGSIZE for one beyond 16 MiB. */
bool send_message(int sock, const struct writer *, const int *fds, int count);

/* Receive one message, which is checked and stays until the next one is received. Descriptors that come along are
 * closed: no message to a caller needs any. FAILED: errno says why; NONSENSE: `why` does. */
enum received receive_message(int sock, int flags, struct part *message, const char **why);

/* Begin a message of that many pairs besides "v". */
void begin(struct writer *, const char *op, uint32_t pairs);

/* Connect to pocketd in its runtime directory. False: errno says why. */
bool reach(struct control *, const char *directory);

/* One request without descriptors; the reply stays until the next message is received. */
bool describe(struct control *, const char *name, struct part *reply, struct failure *);

/* Make a login's sockets and queue its start message, with `fds`, on its session's. False: errno says why. */
bool make_login(struct login *, const struct writer *start, const int *fds, int count);

/* Ask for the login that was made. The same request goes to the next pocketd where one ends before it answered, and is
 * the same session there. Closes the ends that were sent. */
bool log_in(struct control *, struct login *, const struct request *, void (*progress)(struct part), struct failure *);

/* The error in a message; false where it has none. */
bool error_in(struct part message, struct failure *);

/* A failure in words of ours. */
void fail(struct failure *, const char *code, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
