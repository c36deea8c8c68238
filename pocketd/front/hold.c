#define _GNU_SOURCE
#include "front.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SI_KERNEL
#define SI_KERNEL 0x80 /* asm-generic/siginfo.h: from the kernel, as a terminal's ^C is */
#endif

/* Nobody can catch two of those that are left out; the kernel sends SIGCHLD for children, of which there are none. */
static sigset_t forwarded(void) {
    sigset_t set;
    sigfillset(&set);
    sigdelset(&set, SIGKILL);
    sigdelset(&set, SIGSTOP);
    sigdelset(&set, SIGCHLD);
    return set;
}

static sigset_t blocked_by_caller;

void block_signals(void) {
    sigset_t set = forwarded();
    sigprocmask(SIG_BLOCK, &set, &blocked_by_caller);
}

void unblock_ends(void) {
    static const int ends[] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};
    sigset_t set;
    sigemptyset(&set);
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        if (!sigismember(&blocked_by_caller, ends[i])) sigaddset(&set, ends[i]);
    sigprocmask(SIG_UNBLOCK, &set, NULL);
}

/* What goes to a whole group, from a terminal, or SIGCONT from a shell's fg, goes to the worker's group. */
static void forward(int sock, const struct signalfd_siginfo *received) {
    struct writer w = {NULL, 0, 0};
    begin(&w, "signal", 2);
    put_text(&w, "signal");
    put_int(&w, received->ssi_signo);
    put_text(&w, "group");
    put_bool(&w, received->ssi_code == SI_KERNEL || received->ssi_signo == SIGCONT);
    send_message(sock, &w, NULL, 0); /* where it fails the worker has ended; its status is what comes next */
    free(w.data);
}

/* End by the same signal, with no core file of this process. */
static void __attribute__((noreturn)) die_by(int number) {
    struct rlimit none = {0, 0};
    sigset_t one;
    setrlimit(RLIMIT_CORE, &none);
    if (number != SIGKILL && number != SIGSTOP) signal(number, SIG_DFL);
    sigemptyset(&one);
    sigaddset(&one, number);
    sigprocmask(SIG_UNBLOCK, &one, NULL);
    kill(getpid(), number);
    _exit(128 + number);
}

static bool is_op(struct part message, const char *op) {
    struct part value;
    return get(message, "op", &value) && is_text(value, op);
}

static void __attribute__((noreturn)) end(const struct login *login, struct part message) {
    struct failure f;
    struct part value;
    const char *why;
    int64_t status = 0;
    bool known = get(message, "status", &value) && as_int(value, &status) && status >= INT_MIN && status <= INT_MAX;
    bool failed = error_in(message, &f);
    if (!failed) /* what the worker said when it could not come to the program's first line */
        failed = receive_message(login->session, MSG_DONTWAIT, &message, &why) == MESSAGE && is_op(message, "failed") &&
                 error_in(message, &f);
    if (failed) say("pocket: ", f.message);
    if (!known) _exit(REFUSED_STATUS);
    if (WIFSIGNALED((int)status)) die_by(WTERMSIG((int)status));
    _exit(WEXITSTATUS((int)status));
}

void hold(const struct login *login) {
    sigset_t set = forwarded();
    struct failure f;
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_DFL); /* ignored ones do not reach the descriptor; what Python starts may have these two so */
    signal(SIGXFSZ, SIG_DFL);
    struct pollfd polled[] = {{signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK), POLLIN, 0}, {login->hold, POLLIN, 0}};
    if (polled[0].fd < 0) {
        fail(&f, "failed", "[Errno %d] %s", errno, strerror(errno));
        say("pocket: ", f.message);
        _exit(REFUSED_STATUS);
    }
    for (;;) {
        if (poll(polled, 2, -1) < 0) continue; /* EINTR */
        if (polled[0].revents) {
            struct signalfd_siginfo received[32];
            ssize_t size = read(polled[0].fd, received, sizeof received);
            for (ssize_t i = 0; i < size / (ssize_t)sizeof *received; i++) forward(login->hold, &received[i]);
        }
        if (polled[1].revents) {
            struct part message;
            const char *why;
            if (receive_message(login->hold, 0, &message, &why) != MESSAGE) {
                fail(&f, "service", "the service ended");
                say("pocket: ", f.message);
                _exit(REFUSED_STATUS);
            }
            if (is_op(message, "exit")) end(login, message);
            if (is_op(message, "stopped")) kill(getpid(), SIGSTOP); /* the shell sees it; its SIGCONT is passed on */
        }
    }
}
