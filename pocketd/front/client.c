#define _GNU_SOURCE
#include "client.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MAX_FDS 32
#define SLOW 250 /* milliseconds without an answer */
#define MAX_INLINE (32 * 1024)
#define MAX_BODY (16 * 1024 * 1024)
#define SEALS (F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

enum { INLINE, MEMFD }; /* a datagram's first byte */

/* ---- Messages --------------------------------------------------------------------------------------------------- */

static int sealed(const struct writer *body) {
    int fd = memfd_create("message", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    size_t done = 0;
    while (fd >= 0 && done < body->size) {
        ssize_t size = write(fd, body->data + done, body->size - done);
        if (size < 0 && errno == EINTR) continue;
        if (size < 0) goto failed;
        done += (size_t)size;
    }
    if (fd < 0 || !fcntl(fd, F_ADD_SEALS, SEALS)) return fd;
failed:;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

bool send_message(int sock, const struct writer *body, const int *fds, int count) {
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int) * MAX_FDS)];
    } control;
    unsigned char kind = body->size > MAX_INLINE ? MEMFD : INLINE;
    struct iovec parts[] = {{&kind, 1}, {body->data, body->size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = kind == MEMFD ? 1 : 2};
    int sent[MAX_FDS], memfd = -1;

    if (body->size > MAX_BODY || count < 0 || count > SENT_FDS) {
        errno = EMSGSIZE;
        return false;
    }
    if (count) memcpy(sent, fds, sizeof(int) * (size_t)count);
    if (kind == MEMFD) {
        if ((memfd = sealed(body)) < 0) return false;
        sent[count++] = memfd;
    }
    if (count) {
        memset(&control, 0, sizeof control);
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof(int) * (size_t)count);
        memcpy(CMSG_DATA(&control.header), sent, sizeof(int) * (size_t)count);
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * (size_t)count);
    }
    ssize_t size;
    do size = sendmsg(sock, &message, MSG_NOSIGNAL);
    while (size < 0 && errno == EINTR);
    int error = errno;
    if (memfd >= 0) close(memfd);
    errno = error;
    return size >= 0;
}

static struct part mapped; /* the last message's body, where it came by memfd */

/* A body in a memfd, mapped once the kernel has said that it can never change (memfd_create(2), "File sealing"). */
static bool map(int fd, struct part *body, const char **why) {
    struct stat status;
    int seals = fcntl(fd, F_GET_SEALS);
    *why = "the descriptor is not a sealed memfd";
    if (seals < 0 || (seals & SEALS) != SEALS || fstat(fd, &status) || !S_ISREG(status.st_mode)) return false;
    *why = "a memfd that is empty, or more than a message may be";
    if (status.st_size <= 0 || status.st_size > MAX_BODY) return false;
    void *at = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    *why = "the memfd cannot be mapped";
    if (at == MAP_FAILED) return false;
    *body = mapped = (struct part){at, (size_t)status.st_size};
    return true;
}

/* Close what came along, but for the last one. */
static int last_of(struct msghdr *message) {
    int last = -1;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
        for (size_t at = 0; at + sizeof(int) <= c->cmsg_len - CMSG_LEN(0); at += sizeof(int)) {
            if (last >= 0) close(last);
            memcpy(&last, CMSG_DATA(c) + at, sizeof last);
        }
    }
    return last;
}

enum received receive_message(int sock, int flags, struct part *body, const char **why) {
    static unsigned char data[MAX_INLINE + 1];
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int) * MAX_FDS)];
    } control;
    struct iovec part = {data, sizeof data};
    struct msghdr message;
    ssize_t size;

    if (mapped.at) munmap((void *)mapped.at, mapped.size);
    mapped = (struct part){NULL, 0};
    for (int resets = 0;;) {
        message = (struct msghdr){.msg_iov = &part, .msg_iovlen = 1};
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
        size = recvmsg(sock, &message, flags | MSG_CMSG_CLOEXEC);
        if (size >= 0) break;
        /* A peer that closed without having read all makes this come once, ahead of its last words (messages.py). */
        if (errno == ECONNRESET && !resets++) continue;
        if (errno != EINTR) return FAILED;
    }
    int last = last_of(&message);
    enum received result = NONSENSE;
    *why = "a datagram that was cut";
    if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
        /* of no use */
    } else if (!size) {
        result = CLOSED;
    } else if (data[0] == INLINE) {
        *body = (struct part){data + 1, (size_t)size - 1};
        if (check(*body, why)) result = MESSAGE;
    } else if (data[0] == MEMFD && size == 1 && last >= 0) {
        if (map(last, body, why) && check(*body, why)) result = MESSAGE;
    } else {
        *why = "a datagram that is neither a body nor a body in a memfd";
    }
    if (last >= 0) close(last);
    return result;
}

void begin(struct writer *w, const char *op, uint32_t pairs) {
    w->size = 0;
    put_map(w, 2 + pairs);
    put_text(w, "v");
    put_int(w, OLDEST);
    put_text(w, "op");
    put_text(w, op);
}

/* ---- Errors ----------------------------------------------------------------------------------------------------- */

void fail(struct failure *f, const char *code, const char *format, ...) {
    static char text[1024];
    va_list arguments;
    va_start(arguments, format);
    int size = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    f->code = (struct part){(const unsigned char *)code, strlen(code)};
    if (size < 0) size = 0;
    if ((size_t)size >= sizeof text) size = sizeof text - 1;
    f->message = (struct part){(unsigned char *)text, (size_t)size};
}

bool error_in(struct part message, struct failure *f) {
    struct part error, inside, value;
    uint32_t pairs;
    if (!get(message, "error", &error) || is_nil(error)) return false;
    if (!as_map(error, &pairs, &inside)) {
        fail(f, "protocol", "the peer sent an error of an unknown form");
        return true;
    }
    *f = (struct failure){{NULL, 0}, {NULL, 0}};
    if (get(error, "code", &value)) as_text(value, &f->code);
    if (get(error, "message", &value)) as_text(value, &f->message);
    return true;
}

/* ---- The control socket ----------------------------------------------------------------------------------------- */

static int64_t milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* The queue of a pocketd that is busy may be full: connect(2) waits for a place in it, `wait` milliseconds or, with 0,
 * as long as it takes. */
static int connected(const char *path, int64_t wait) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval limit = {wait / 1000, wait % 1000 * 1000};
    int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (sock < 0) return -1;
    memcpy(address.sun_path, path, strlen(path) + 1);
    if (wait) setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    int result;
    do result = connect(sock, (struct sockaddr *)&address, sizeof address);
    while (result && errno == EINTR);
    if (!result) return sock;
    int error = errno;
    close(sock);
    errno = error;
    return -1;
}

bool reach(struct control *c, const char *directory) {
    size_t size = strlen(directory);
    const char *slash = size && directory[size - 1] != '/' ? "/" : "";
    int wanted = snprintf(c->path, sizeof c->path, "%s%spocketd.sock", directory, slash);
    c->last = 0;
    c->sock = -1;
    if (wanted < 0 || (size_t)wanted >= sizeof c->path) {
        errno = ENAMETOOLONG;
        return false;
    }
    c->sock = connected(c->path, 0);
    return c->sock >= 0;
}

/* Wait for the next pocketd. */
static bool reach_again(struct control *c, const char *op, struct failure *f) {
    int64_t until = milliseconds() + RESTART;
    close(c->sock);
    for (;;) {
        int64_t left = until - milliseconds();
        c->sock = connected(c->path, left > 10 ? left : 10);
        if (c->sock >= 0) return true;
        if (errno == EACCES || errno == EPERM) {
            fail(f, "refused", "pocketd's socket %s may not be used: %s", c->path, strerror(errno));
            return false;
        }
        if (errno == EAGAIN) {
            fail(f, "timeout", "pocketd does not accept connections at %s", c->path);
            return false;
        }
        if (milliseconds() + 50 > until) {
            fail(f, "not-running", "pocketd ended before it answered '%s' (socket %s)", op, c->path);
            return false;
        }
        usleep(50000); /* a socket that does not exist yet cannot be polled */
    }
}

static bool has_id(struct part message, int64_t wanted) {
    struct part value;
    int64_t id;
    return get(message, "id", &value) && as_int(value, &id) && id == wanted;
}

enum answer { ANSWERED, REFUSED, LOST };

static enum answer
call(struct control *c, const char *op, const struct writer *body, const int *fds, int count, int64_t id,
     void (*progress)(struct part), struct part *reply, struct failure *f) {
    const char *why = "";
    if (!send_message(c->sock, body, fds, count) && errno != EPIPE) { /* EPIPE: its last words may say why */
        fail(f, "failed", "[Errno %d] %s", errno, strerror(errno));
        return REFUSED;
    }
    struct pollfd polled = {c->sock, POLLIN, 0};
    if (progress && !poll(&polled, 1, SLOW)) progress((struct part){NULL, 0});
    for (;;) {
        struct part value, text;
        enum received what = receive_message(c->sock, 0, reply, &why);
        if (what == CLOSED || (what == FAILED && (errno == ECONNRESET || errno == EPIPE))) return LOST;
        if (what == FAILED) {
            fail(f, "failed", "[Errno %d] %s", errno, strerror(errno));
            return REFUSED;
        }
        if (what == NONSENSE) {
            fail(f, "protocol", "pocketd's answer to '%s' is not understood: %s", op, why);
            return REFUSED;
        }
        bool to_nobody = !get(*reply, "id", &value) || is_nil(value); /* pocketd will not hear any request now */
        if (to_nobody && error_in(*reply, f)) return REFUSED;
        if (!has_id(*reply, id)) continue;
        if (get(*reply, "progress", &value)) {
            if (progress && as_text(value, &text)) progress(text);
        } else {
            return error_in(*reply, f) ? REFUSED : ANSWERED;
        }
    }
}

/* A request that may be made twice: again on the next pocketd where one ends before its reply. */
static bool ask(struct control *c, const char *op, const struct writer *body, const int *fds, int count,
                void (*progress)(struct part), struct part *reply, struct failure *f) {
    for (;;) {
        enum answer answer = call(c, op, body, fds, count, c->last, progress, reply, f);
        if (answer != LOST) return answer == ANSWERED;
        if (progress) progress((struct part){NULL, 0});
        if (!reach_again(c, op, f)) return false;
    }
}

bool describe(struct control *c, const char *name, struct part *reply, struct failure *f) {
    struct writer w = {NULL, 0, 0};
    begin(&w, "describe", 2);
    put_text(&w, "id");
    put_int(&w, ++c->last);
    put_text(&w, "name");
    put_text(&w, name);
    bool done = ask(c, "describe", &w, NULL, 0, NULL, reply, f);
    free(w.data);
    return done;
}

/* ---- A login ---------------------------------------------------------------------------------------------------- */

bool make_login(struct login *l, const struct writer *start, const int *fds, int count) {
    int session[2], hold[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, session)) return false;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, hold)) return false;
    *l = (struct login){session[0], hold[0], session[1], hold[1]};
    return send_message(l->session, start, fds, count);
}

static bool put_session(struct writer *w) {
    unsigned char random[16];
    char name[2 * sizeof random + 1];
    if (getrandom(random, sizeof random, 0) != sizeof random) return false;
    for (size_t i = 0; i < sizeof random; i++) sprintf(name + 2 * i, "%02x", random[i]);
    put_text(w, "session");
    put_text(w, name);
    return true;
}

static void put_text_or_nil(struct writer *w, const char *key, const char *text) {
    put_text(w, key);
    if (text)
        put_text(w, text);
    else
        put_nil(w);
}

bool log_in(struct control *c, struct login *l, const struct request *r, void (*progress)(struct part),
            struct failure *f) {
    struct writer w = {NULL, 0, 0};
    struct part reply;
    int sent[SENT_FDS] = {l->worker_end, l->init_end};
    memcpy(sent + 2, r->fds, sizeof(int) * (size_t)r->count);
    begin(&w, "login", 6 + r->pairs);
    put_text(&w, "id");
    put_int(&w, ++c->last);
    if (!put_session(&w)) {
        fail(f, "failed", "[Errno %d] %s", errno, strerror(errno));
        return false;
    }
    put_text_or_nil(&w, "mode", r->mode);
    put_text_or_nil(&w, "name", r->name);
    put_text_or_nil(&w, "path", r->path);
    put_text(&w, "roles");
    put_array(&w, (uint32_t)r->count + 2);
    put_text(&w, "session");
    put_text(&w, "hold");
    for (int i = 0; i < r->count; i++) put_text(&w, r->roles[i]);
    put_packed(&w, &r->fields);
    bool done = ask(c, "login", &w, sent, r->count + 2, progress, &reply, f);
    free(w.data);
    close(l->worker_end);
    close(l->init_end);
    return done;
}
