/* What clone.py and the C tests see of livefork.c. clone.py repeats these structures for ctypes. */
#pragma once
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* What failed. Filled by every function below that returns a negative number. */
struct livefork_failure {
    char stage[32];   /* what was tried: a system call, or "park", "quiet", "revive" */
    char thread[16];  /* the thread it was tried on, if any: its name, */
    int32_t tid;      /* its tid */
    int32_t error;    /* errno */
    uint64_t blocked; /* and its SigBlk, as in /proc/PID/status */
    uint32_t done, wanted; /* threads made before a revive failed, and how many there were to be */
};

/* What CPython's interpreter lock (GIL) is made of: internal/pycore_gil.h. Nobody holds a mutex while it sleeps. */
struct livefork_lock {
    pthread_cond_t condition;
    pthread_mutex_t mutex;
    pthread_cond_t switched;
    pthread_mutex_t switch_mutex;
};

struct livefork_request {
    uint64_t flags;        /* CLONE_NEW*, CLONE_PARENT. PIDFD, INTO_CGROUP and the tid flags are added here. */
    int64_t timeout_ns;    /* for parking; and for reviving when at once */
    int64_t hold_ns;       /* wait this long before parking */
    int64_t parked_ns;     /* out: how long until every thread was parked */
    const pid_t *set_tid;  /* innermost pid namespace first, as clone3 wants them */
    uint64_t set_tid_size;
    uint32_t *lock_request;     /* in the child, before returning: clear bit 0 of this (clone.py says why); or NULL */
    struct livefork_lock *lock; /* ... and put fresh ones here, until the threads come back; or NULL */
    const int32_t *only;        /* livefork_stop: the threads that are meant, */
    uint64_t only_size;         /* and how many they are */
    int32_t cgroup;            /* a directory of cgroup2, or -1 */
    int32_t pid_namespace;     /* a descriptor for setns, or -1 */
    int32_t own_pid_namespace; /* ... and the way back */
    int32_t quiet;             /* demand that each thread sleeps in a system call; else stage "quiet", EAGAIN */
    int32_t revive_at_once;    /* in the child, before returning: for parents that are not quiet */
    int32_t pidfd;             /* out, in the parent: O_CLOEXEC, the caller's */
};

struct livefork_range {
    uint64_t start, end;
    int32_t protection, unused;
};

/* glibc's __rseq_offset and __rseq_size (2.35+), to be set before the first fork; size 0: no thread has one. */
extern ptrdiff_t livefork_rseq_offset;
extern uint32_t livefork_rseq_size;

/* One try to fork this process with all its threads. The pid in the parent; 0 in the child, which has one thread (all, when
 * reviving at once) and all signals blocked until livefork_revive; -1 and *f. To be called on the main thread.
 * A child that should revive at once and cannot writes a line to descriptor 2 and ends with this status: */
#define LIVEFORK_NOT_REVIVED 120
long livefork_fork(struct livefork_request *, struct livefork_failure *f);

/* In the child: bring the threads back and restore the signal mask. How many, or -1: then the process must end. */
int livefork_revive(int64_t timeout_ns, struct livefork_failure *f);

/* Stop some threads for good, each asleep in a system call, and put fresh ones in the place of the interpreter's lock, for
 * which they may be waiting. 0, or -1 and *f: then all go on. */
int livefork_stop(struct livefork_request *, struct livefork_failure *f);

/* In the child: take away the handler by which threads were stopped. The next fork installs one again. */
void livefork_forget(void);

/* The thread ids of the threads of the last park: as they were, and as they are in this child. */
int livefork_revived(int32_t *before, int32_t *after, uint32_t room);

/* Clone a process that has one thread; as fork(2). */
long livefork_clone(struct livefork_request *, struct livefork_failure *f);

/* Clone a process that waits for ever, for a pid namespace's first process. Never 0. */
long livefork_pause(struct livefork_request *, struct livefork_failure *f);

/* Bring up `lo` in the present network namespace, unless it is up. netdevice(7). 0, or minus errno. */
int livefork_raise_loopback(void);

/* Replace mappings by private copies at the same place, while every other thread is parked. 0 or -1. */
int livefork_privatize(const struct livefork_range *, uint32_t count, int64_t timeout_ns, struct livefork_failure *f);
