/* Live fork in C, without Python: linked with nsutil/livefork.c. `threads FORKS [busy]`.
 *
 * Workers wait on a queue; each child's must answer, with their own thread-local value, name, signal mask, nice value,
 * alternate stack, robust list and rseq area as before, and can be joined. `busy`: three more threads allocate all the
 * time, so parking finds them anywhere, also inside malloc; the children then revive at once. Every 50th child forks
 * itself, and its child once more.
 * Also the /try of the aarch64 test: static, under an init of a few lines (init.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include "livefork.h"

#if defined __GLIBC__ && __GLIBC_PREREQ(2, 35)
#include <sys/rseq.h>
#endif

enum { WORKERS = 6 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t asked = PTHREAD_COND_INITIALIZER, answered = PTHREAD_COND_INITIALIZER;
static int todo, done, busy, wrong, over;
static pthread_t workers[WORKERS];
static __thread long mine;
static __thread void *robust;
static char stacks[WORKERS][65536];

static void same(int yes, const char *what) {
    if (!yes) wrong = 1, fprintf(stderr, "thread %ld: %s differs\n", mine, what);
}

static void check(long number) {
    char name[16], expected[16];
    sigset_t mask;
    stack_t alternate;
    prctl(PR_GET_NAME, name);
    snprintf(expected, sizeof expected, "worker %ld", number);
    same(mine == number, "thread-local value");
    same(!strcmp(name, expected), "name");
    pthread_sigmask(SIG_BLOCK, NULL, &mask);
    same(sigismember(&mask, SIGUSR1) == (number & 1) && !sigismember(&mask, SIGUSR2), "signal mask");
    sigaltstack(NULL, &alternate);
    same(alternate.ss_sp == stacks[number] && !alternate.ss_flags, "alternate stack");
    errno = 0;
    same(getpriority(PRIO_PROCESS, 0) == number && !errno, "nice value");
    void *head = NULL;
    size_t size;
    syscall(SYS_get_robust_list, 0, &head, &size);
    same(head && head == robust, "robust list");
#if defined __GLIBC__ && __GLIBC_PREREQ(2, 35)
    if (__rseq_size) {
        /* The kernel keeps it up to date: it says where the thread was sent to. */
        const volatile uint32_t *cpu = &((struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset))->cpu_id;
        cpu_set_t all, one;
        sched_getaffinity(0, sizeof all, &all);
        for (int i = 0; i < CPU_SETSIZE; i++) {
            if (!CPU_ISSET(i, &all)) continue;
            CPU_ZERO(&one);
            CPU_SET(i, &one);
            sched_setaffinity(0, sizeof one, &one);
            same((int)*cpu == i, "rseq");
        }
        sched_setaffinity(0, sizeof all, &all);
    }
#endif
}

static void *work(void *argument) {
    long number = mine = (long)argument;
    size_t size;
    syscall(SYS_get_robust_list, 0, &robust, &size);
    char name[16];
    snprintf(name, sizeof name, "worker %ld", number);
    prctl(PR_SET_NAME, name);
    setpriority(PRIO_PROCESS, 0, (int)number);
    sigaltstack(&(stack_t){.ss_sp = stacks[number], .ss_size = sizeof stacks[number]}, NULL);
    sigset_t one;
    sigemptyset(&one);
    sigaddset(&one, SIGUSR1);
    if (number & 1) pthread_sigmask(SIG_BLOCK, &one, NULL);
    for (;;) {
        pthread_mutex_lock(&lock);
        while (!todo && !over) pthread_cond_wait(&asked, &lock);
        if (over) break;
        todo--;
        check(number);
        done++;
        pthread_cond_signal(&answered);
        pthread_mutex_unlock(&lock);
        free(malloc(1000));
    }
    pthread_mutex_unlock(&lock);
    return (void *)(mine + 100);
}

/* End the workers. pthread_join waits for what the kernel clears at a thread's end, where its tid stood. */
static void join(void) {
    pthread_mutex_lock(&lock);
    over = 1;
    pthread_cond_broadcast(&asked);
    pthread_mutex_unlock(&lock);
    for (long i = 0; i < WORKERS; i++) {
        void *said = NULL;
        same(pthread_join(workers[i], &said) == 0 && said == (void *)(i + 100), "pthread_join");
    }
}

static void *allocate(void *argument) {
    (void)argument;
    void *held[64] = {0};
    for (unsigned n = 1;; n = n * 1103515245 + 12345) {
        void **slot = &held[n >> 8 & 63];
        free(*slot);
        *slot = malloc(n >> 16 & 4095);
    }
    return NULL;
}

static void *end_at_once(void *argument) { return argument; }

static int ask(int n) {
    pthread_mutex_lock(&lock);
    done = 0, todo = n;
    pthread_cond_broadcast(&asked);
    while (done < n) pthread_cond_wait(&answered, &lock);
    pthread_mutex_unlock(&lock);
    return !wrong;
}

static long live_fork(void) {
    for (int tries = 0;; tries++) {
        struct livefork_request q = {.timeout_ns = 5000000000, .quiet = !busy, .revive_at_once = busy,
                                     .cgroup = -1, .pid_namespace = -1, .own_pid_namespace = -1};
        struct livefork_failure f;
        long pid = livefork_fork(&q, &f);
        if (pid > 0) close(q.pidfd);
        if (pid == 0 && livefork_revive(5000000000, &f) < 0) {
            fprintf(stderr, "revive: %s: %s (%s)\n", f.stage, strerror(f.error), f.thread);
            _exit(3);
        }
        if (pid >= 0) return pid;
        if (strcmp(f.stage, "quiet") || tries > 1000) {
            fprintf(stderr, "%s: %s: thread %d (%s), SigBlk %llx\n", f.stage, strerror(f.error), f.tid, f.thread,
                    (unsigned long long)f.blocked);
            exit(2);
        }
        usleep(1000);
    }
}

static int generation(int deeper) {
    long pid = live_fork();
    if (pid == 0) {
        alarm(30);
        if (!ask(50)) _exit(1);
        free(malloc(100000));
        /* Threads may end and begin there as anywhere. */
        pthread_t t;
        if (pthread_create(&t, NULL, end_at_once, NULL) || pthread_join(t, NULL)) _exit(4);
        if (deeper) _exit(generation(deeper - 1));
        join();
        _exit(wrong);
    }
    int status;
    if (waitpid((pid_t)pid, &status, 0) != pid) return 5;
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

int main(int count, char **arguments) {
#if defined __GLIBC__ && __GLIBC_PREREQ(2, 35)
    livefork_rseq_offset = __rseq_offset, livefork_rseq_size = __rseq_size;
#endif
    int forks = count > 1 ? atoi(arguments[1]) : 1;
    busy = count > 2;
    pthread_t t;
    for (long i = 0; i < WORKERS; i++) pthread_create(&workers[i], NULL, work, (void *)i);
    for (int i = 0; busy && i < 3; i++) pthread_create(&t, NULL, allocate, NULL);
    if (!ask(100)) return 1;
    for (int k = 0; k < forks; k++) {
        int status = generation(k % 50 == 49 ? 2 : 0);
        if (status) return fprintf(stderr, "fork %d of %d: status %d\n", k, forks, status), 1;
        if (!ask(10)) return 1;
    }
    printf("%d forks, all threads answered\n", forks);
    return 0;
}
