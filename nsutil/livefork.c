/* Live fork: clone this process whole, with its running threads.
 *
 *   park     a signal to every other thread; its handler notes what the kernel keeps for that thread and waits
 *   clone    clone3 without CLONE_VM, while nothing in the address space moves
 *   revive   in the child, whenever it likes: each parked thread is made again at its old thread pointer and tid
 *            address, on its own stack, and leaves the handler by the rt_sigreturn that its original left by
 *
 * The original threads go on in the parent at once. No fork handler runs and none is needed: nothing was lost.
 *
 * A plain shared library for ctypes (clone.py) and C tests. x86-64 and aarch64, any page size. It uses no thread-local
 * variable, no errno and, while threads are parked, nothing that allocates: any of them may hold malloc's lock. It asks
 * of libc only what every glibc since 2.17 has; __rseq_offset (2.35) is handed in by the caller.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/sched.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include "livefork.h"

/* linux/sched.h, linux/prctl.h, linux/close_range.h: newer than some headers this is built with */
#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000
#endif
#ifndef CLONE_INTO_CGROUP
#define CLONE_INTO_CGROUP 0x200000000ULL
#endif
#ifndef SYS_clone3
#define SYS_clone3 435
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_rseq
#if defined __x86_64__
#define SYS_rseq 334
#else
#define SYS_rseq 293
#endif
#endif
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424
#endif
#define KERNEL_SIGSET 8 /* bytes: what rt_sigprocmask wants, not glibc's 128 */

/* clone3's argument, CLONE_ARGS_SIZE_VER2 (5.7): with set_tid and cgroup. */
struct clone_arguments {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

/* linux/sched/types.h, SCHED_ATTR_SIZE_VER0: policy, nice and real-time priority of a thread in one call. */
struct schedule {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
};

/* ---- The two machines ------------------------------------------------------------------------------------------- */

#if defined __x86_64__

#define RSEQ_SIGNATURE 0x53053053 /* glibc's sysdeps/unix/sysv/linux/x86/bits/rseq.h */

static inline long raw(long number, long a, long b, long c, long d, long e, long f) {
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static inline void *thread_pointer(void) {
    void *tp;
    __asm__("mov %%fs:0, %0" : "=r"(tp)); /* the x86-64 TLS ABI: the first word points to itself */
    return tp;
}

/* Is the interrupted thread asleep in a system call? Either it returned EINTR, or it is to be made again: then the
 * program counter is on the instruction. On it may also be a thread about to enter: as good as asleep, unless the call
 * is one that an allocator makes under its lock (those are never interrupted, so this is no sleeper). So is a thread whose
 * wait has just timed out, which no allocator's does: those who wait for Python's lock are woken so all the time. */
static int asleep(const ucontext_t *context) {
    const greg_t *r = context->uc_mcontext.gregs;
    const unsigned char *pc = (const unsigned char *)r[REG_RIP];
    if (pc[0] == 0x0f && pc[1] == 0x05) switch (r[REG_RAX]) {
            case SYS_mmap: case SYS_munmap: case SYS_mremap: case SYS_mprotect: case SYS_madvise: case SYS_brk: return 0;
            default: return 1;
        }
    return pc[-2] == 0x0f && pc[-1] == 0x05 && (r[REG_RAX] == -EINTR || r[REG_RAX] == -ETIMEDOUT);
}

/* struct rt_sigframe is {return address, ucontext, siginfo}; the kernel looks for it at sp - 8. */
static inline char *frame_of(void *context) { return (char *)context - 8; }

static void __attribute__((noreturn)) leave_handler(void *context) {
    __asm__ volatile("mov %0, %%rsp\n\tmov %1, %%eax\n\tsyscall\n\tud2" : : "r"(context), "i"(SYS_rt_sigreturn) : "memory");
    __builtin_unreachable();
}

/* clone(2) of a thread that starts in entry(argument), on `stack`. The older call: container filters let it pass. */
static long clone_thread(unsigned long flags, char *stack, int *tid_address, void *tls, void *entry, void *argument) {
    register long rax __asm__("rax") = SYS_clone;
    register long rdi __asm__("rdi") = (long)flags;
    register char *rsi __asm__("rsi") = stack;
    register long rdx __asm__("rdx") = 0;
    register int *r10 __asm__("r10") = tid_address;
    register void *r8 __asm__("r8") = tls;
    register void *r12 __asm__("r12") = argument;
    register void *r13 __asm__("r13") = entry;
    __asm__ volatile("syscall\n\ttest %%rax, %%rax\n\tjnz 1f\n\txor %%ebp, %%ebp\n\tmov %%r12, %%rdi\n\tcall *%%r13\n\tud2\n1:"
                     : "+r"(rax)
                     : "r"(rdi), "r"(rsi), "r"(rdx), "r"(r10), "r"(r8), "r"(r12), "r"(r13)
                     : "rcx", "r11", "memory");
    return rax;
}

static long clone_process(unsigned long flags, int *pidfd, int *tid_address) {
    return raw(SYS_clone, (long)flags, 0, (long)pidfd, (long)tid_address, 0, 0);
}

/* A thread that has used AMX has a larger signal frame; kernels such as 6.1 drop its vector state when a new thread
 * restores it (check_xstate_in_sigframe). Inside a system call the calling convention keeps none, so being asleep is
 * enough. A process may use AMX only after it asked (ARCH_REQ_XCOMP_PERM). */
static int needs_quiet(void) {
    uint64_t permitted = 0;
    return raw(SYS_arch_prctl, 0x1022 /* ARCH_GET_XCOMP_PERM */, (long)&permitted, 0, 0, 0, 0) == 0 && permitted >> 18 & 1;
}

#elif defined __aarch64__

#define RSEQ_SIGNATURE 0xd428bc00 /* glibc's sysdeps/unix/sysv/linux/aarch64/bits/rseq.h, little-endian code */

static inline long raw(long number, long a, long b, long c, long d, long e, long f) {
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;
    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
}

static inline void *thread_pointer(void) { return __builtin_thread_pointer(); }

static int asleep(const ucontext_t *context) { /* see above */
    const mcontext_t *r = &context->uc_mcontext;
    const uint32_t *pc = (const uint32_t *)r->pc;
    if (pc[0] == 0xd4000001) switch (r->regs[8]) {
            case SYS_mmap: case SYS_munmap: case SYS_mremap: case SYS_mprotect: case SYS_madvise: case SYS_brk: return 0;
            default: return 1;
        }
    return pc[-1] == 0xd4000001 && ((long)r->regs[0] == -EINTR || (long)r->regs[0] == -ETIMEDOUT);
}

/* struct rt_sigframe is {siginfo, ucontext}; the kernel looks for it at sp. */
static inline char *frame_of(void *context) { return (char *)context - 128; }

static void __attribute__((noreturn)) leave_handler(void *context) {
    __asm__ volatile("mov sp, %0\n\tmov x8, %1\n\tsvc #0\n\tbrk #1" : : "r"(frame_of(context)), "i"(SYS_rt_sigreturn) : "memory");
    __builtin_unreachable();
}

static long clone_thread(unsigned long flags, char *stack, int *tid_address, void *tls, void *entry, void *argument) {
    register long x8 __asm__("x8") = SYS_clone;
    register long x0 __asm__("x0") = (long)flags;
    register char *x1 __asm__("x1") = stack;
    register long x2 __asm__("x2") = 0;
    register void *x3 __asm__("x3") = tls;
    register int *x4 __asm__("x4") = tid_address;
    register void *x19 __asm__("x19") = argument;
    register void *x20 __asm__("x20") = entry;
    __asm__ volatile("svc #0\n\tcbnz x0, 1f\n\tmov x29, xzr\n\tmov x30, xzr\n\tmov x0, x19\n\tbr x20\n1:"
                     : "+r"(x0)
                     : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x19), "r"(x20)
                     : "memory");
    return x0;
}

static long clone_process(unsigned long flags, int *pidfd, int *tid_address) {
    return raw(SYS_clone, (long)flags, 0, (long)pidfd, 0, (long)tid_address, 0);
}

static int needs_quiet(void) { return 0; }

#else
#error "live fork runs on x86-64 and aarch64"
#endif

/* ---- Waiting, and saying what went wrong ------------------------------------------------------------------------- */

static int64_t now(void) {
    struct timespec t;
    raw(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&t, 0, 0, 0, 0);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void doze(int64_t ns) {
    struct timespec t = {ns / 1000000000, ns % 1000000000};
    while (raw(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, (long)&t, (long)&t, 0, 0) == -EINTR);
}

static void wait_on(_Atomic uint32_t *word, uint32_t value, int64_t ns) {
    struct timespec t = {ns / 1000000000, ns % 1000000000};
    raw(SYS_futex, (long)word, FUTEX_WAIT_PRIVATE, value, ns < 0 ? 0 : (long)&t, 0, 0);
}

static void wake_all(_Atomic uint32_t *word) { raw(SYS_futex, (long)word, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0); }

static char *put(char *to, const char *from) {
    while (*from) *to++ = *from++;
    *to = 0;
    return to;
}

static char *put_number(char *to, long value) {
    char digits[24], *d = digits + sizeof digits - 1;
    *d = 0;
    do *--d = (char)('0' + value % 10);
    while (value /= 10);
    return put(to, d);
}

/* Which signals a thread blocks, from the kernel: the usual reason why it cannot be parked. */
static void describe_thread(struct livefork_failure *f, int tid) {
    char path[64], text[4096];
    f->tid = tid;
    put(put_number(put(path, "/proc/self/task/"), tid), "/status");
    long fd = raw(SYS_openat, AT_FDCWD, (long)path, O_RDONLY | O_CLOEXEC, 0, 0, 0);
    if (fd < 0) return;
    long n = raw(SYS_read, fd, (long)text, sizeof text - 1, 0, 0, 0);
    raw(SYS_close, fd, 0, 0, 0, 0, 0);
    text[n > 0 ? n : 0] = 0;
    const char *name = strstr(text, "Name:\t"), *blocked = strstr(text, "SigBlk:\t");
    if (name)
        for (size_t i = 0; i < sizeof f->thread - 1 && name[6 + i] && name[6 + i] != '\n'; i++) f->thread[i] = name[6 + i];
    if (blocked)
        for (const char *c = blocked + 8; *c && *c != '\n'; c++)
            f->blocked = f->blocked << 4 | (uint64_t)(*c <= '9' ? *c - '0' : (*c | 32) - 'a' + 10);
}

static int fail(struct livefork_failure *f, const char *stage, long error) {
    memset(f, 0, sizeof *f);
    put(f->stage, stage);
    f->error = (int32_t)(error < 0 ? -error : error);
    return -1;
}

/* ---- Parking ---------------------------------------------------------------------------------------------------- */

struct parked {
    _Atomic uint64_t phase; /* epoch << 2 | one of the below; 0 when the slot is empty or was given up */
    int32_t tid;            /* as it was when parked */
    int32_t revived;        /* what it is since it was made again here */
    int32_t quiet;          /* asleep in a system call: it holds no lock of an allocator */
    int32_t affinity_size;  /* 0 on machines with more cpus than fit: such a mask is left to be the forking thread's */
    void *context;          /* the handler's ucontext, on the thread's own (or alternate) stack */
    void *tls;
    int *tid_address;       /* glibc's tid field, which pthread_join waits on */
    void *robust;
    size_t robust_size;
    struct schedule schedule;
    char name[16];
    unsigned char affinity[128];
};
enum { SENT = 1, TAKEN = 2, ARRIVED = 3 };

ptrdiff_t livefork_rseq_offset;
uint32_t livefork_rseq_size;

static struct parked *_Atomic table; /* never unmapped: a signal that comes late may still look into an old one */
static _Atomic uint32_t capacity;
static uint32_t used;              /* slots of this epoch */
static _Atomic uint32_t epoch;     /* odd: threads park; even: they run. They wait for it to change. */
static _Atomic uint32_t arrived;
static _Atomic uint32_t come_back; /* revived threads that are ready to go on */
static _Atomic uint32_t gate;      /* ... and what they wait for */
static uint32_t held;              /* in a child: threads that are not back yet, */
static uint32_t back;              /* and those that are */
static int park_signal;
static uint64_t caller_mask;
static struct parked caller;       /* the forking thread's own part of this */
static struct livefork_lock *lock, waited_for; /* in a child: the interpreter's, and what its waiters had left in it */

static void note_thread(struct parked *p) {
    p->tls = thread_pointer();
    raw(SYS_prctl, PR_GET_TID_ADDRESS, (long)&p->tid_address, 0, 0, 0, 0);
    raw(SYS_get_robust_list, 0, (long)&p->robust, (long)&p->robust_size, 0, 0, 0);
    raw(SYS_prctl, PR_GET_NAME, (long)p->name, 0, 0, 0, 0);
    long n = raw(SYS_sched_getaffinity, 0, sizeof p->affinity, (long)p->affinity, 0, 0, 0);
    p->affinity_size = n > 0 ? (int32_t)n : 0;
    if (raw(SYS_sched_getattr, 0, (long)&p->schedule, sizeof p->schedule, 0, 0, 0) < 0) p->schedule.size = 0;
}

static void on_park(int number, siginfo_t *info, void *context) {
    (void)number;
    uint64_t ticket = (uint64_t)(uintptr_t)info->si_value.sival_ptr;
    uint32_t mine = (uint32_t)(ticket >> 32), index = (uint32_t)ticket;
    /* Late (the park was given up) or somebody else's signal: nothing to do. */
    if (info->si_code != SI_QUEUE || !(mine & 1) || atomic_load(&epoch) != mine || index >= atomic_load(&capacity)) return;
    struct parked *p = atomic_load(&table) + index;
    uint64_t expected = (uint64_t)mine << 2 | SENT;
    if (!atomic_compare_exchange_strong(&p->phase, &expected, (uint64_t)mine << 2 | TAKEN)) return;
    note_thread(p);
    p->context = context;
    p->quiet = asleep(context);
    atomic_store(&p->phase, (uint64_t)mine << 2 | ARRIVED);
    atomic_fetch_add(&arrived, 1);
    wake_all(&arrived);
    while (atomic_load(&epoch) == mine) wait_on(&epoch, mine, -1);
    /* Only the original thread gets here. Its copy in the child leaves from revived_thread(), over this very stack. */
}

/* A real-time signal that nobody uses. Asked again each time: if the process has taken it since, sending it would end
 * the process. */
static int choose_signal(struct livefork_failure *f) {
    struct sigaction action;
    if (park_signal && sigaction(park_signal, NULL, &action) == 0 && action.sa_sigaction == on_park) return 0;
    for (int s = SIGRTMAX; s >= SIGRTMIN; s--) {
        if (sigaction(s, NULL, &action) || action.sa_handler != SIG_DFL) continue;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = on_park;
        /* ONSTACK: some runtimes' own stacks have no room for a signal frame, and they set an alternate one. */
        action.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
        sigfillset(&action.sa_mask);
        if (sigaction(s, &action, NULL) == 0) return park_signal = s, 0;
    }
    return fail(f, "choose a signal", EBUSY);
}

static int reserve(uint32_t threads, struct livefork_failure *f) {
    if (threads <= atomic_load(&capacity)) return 0;
    uint32_t wanted = threads * 2 + 62;
    long at = raw(SYS_mmap, 0, (long)(wanted * sizeof(struct parked)), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at < 0 && at > -4096) return fail(f, "mmap", at);
    atomic_store(&table, (struct parked *)at);
    atomic_store(&capacity, wanted);
    return 0;
}

struct directory_entry {
    uint64_t inode;
    int64_t offset;
    uint16_t length;
    uint8_t type;
    char name[];
};

/* Call `visit` with the tid of every other thread, while it returns 0. 0, or a negative errno. */
static long each_thread(long (*visit)(int tid)) {
    static char entries[16384] __attribute__((aligned(8)));
    long me = raw(SYS_gettid, 0, 0, 0, 0, 0, 0), n;
    long fd = raw(SYS_openat, AT_FDCWD, (long)"/proc/self/task", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0, 0, 0);
    if (fd < 0) return fd;
    while ((n = raw(SYS_getdents64, fd, (long)entries, sizeof entries, 0, 0, 0)) > 0) {
        long r = 0;
        for (long at = 0; at < n && r == 0;) {
            const struct directory_entry *e = (const void *)(entries + at);
            at += e->length;
            int tid = 0;
            for (const char *c = e->name; *c >= '0' && *c <= '9'; c++) tid = tid * 10 + (*c - '0');
            if (tid && tid != me) r = visit(tid);
        }
        if ((n = r) < 0) break;
    }
    raw(SYS_close, fd, 0, 0, 0, 0, 0);
    return n;
}

static uint32_t sent;       /* signals of this epoch whose threads are there, or are still to come */
static uint32_t found_new;  /* by the pass over /proc/self/task that goes on */
static int refused;         /* the thread that could not be signalled */
static const int32_t *only; /* to be parked, and no others, if not NULL */
static uint64_t only_size;

static long send_ticket(int tid) {
    struct parked *p = atomic_load(&table);
    for (uint64_t i = 0; only && i < only_size && only[i] != tid; i++)
        if (i + 1 == only_size) return 0;
    for (uint32_t i = 0; i < used; i++)
        if (p[i].tid == tid && atomic_load(&p[i].phase)) return 0;
    if (used == atomic_load(&capacity)) return -ENOBUFS;
    p += used;
    p->tid = tid;
    atomic_store(&p->phase, (uint64_t)atomic_load(&epoch) << 2 | SENT);
    siginfo_t info;
    memset(&info, 0, sizeof info);
    info.si_signo = park_signal;
    info.si_code = SI_QUEUE;
    info.si_value.sival_ptr = (void *)(uintptr_t)((uint64_t)atomic_load(&epoch) << 32 | used);
    long r = raw(SYS_rt_tgsigqueueinfo, raw(SYS_getpid, 0, 0, 0, 0, 0, 0), tid, park_signal, (long)&info, 0, 0);
    if (r < 0) {
        atomic_store(&p->phase, 0);
        if (r == -ESRCH) return 0; /* it has just ended */
        refused = tid;             /* EAGAIN: RLIMIT_SIGPENDING */
        return r;
    }
    used++, sent++, found_new++;
    return 0;
}

/* Give up the slots whose threads never came. One that has begun to fill its slot is waited for: it is running. */
static int give_up_missing(int only_ended) {
    struct parked *p = atomic_load(&table);
    uint32_t e = atomic_load(&epoch);
    int first = 0;
    for (uint32_t i = 0; i < used; i++) {
        uint64_t expected = (uint64_t)e << 2 | SENT;
        if (atomic_load(&p[i].phase) != expected) continue;
        if (only_ended && raw(SYS_tgkill, raw(SYS_getpid, 0, 0, 0, 0, 0, 0), p[i].tid, 0, 0, 0, 0) != -ESRCH) continue;
        if (!atomic_compare_exchange_strong(&p[i].phase, &expected, 0)) continue;
        sent--;
        if (!first) first = p[i].tid;
    }
    return first;
}

static void release(void) {
    atomic_fetch_add(&epoch, 1);
    wake_all(&epoch);
}

/* Park every other thread, or none. One that blocks the signal is named. */
static int park(int64_t deadline, int quiet, struct livefork_failure *f) {
    if (choose_signal(f) || reserve(1, f)) return -1;
    for (long r;;) {
        used = sent = 0;
        atomic_store(&arrived, 0);
        atomic_fetch_add(&epoch, 1);
        int missing = 0;
        do {
            found_new = 0;
            r = each_thread(send_ticket);
            for (uint32_t n; (n = atomic_load(&arrived)) < sent;) {
                int64_t left = deadline - now();
                if (left <= 0 && (missing = give_up_missing(0))) break;
                wait_on(&arrived, n, left > 2000000 || left <= 0 ? 2000000 : left);
                if (atomic_load(&arrived) == n) give_up_missing(1); /* threads may end before the signal reaches them */
            }
        } while (r >= 0 && found_new && !missing);
        if (r == -ENOBUFS) { /* more threads than the table has room for: let all go, make room, again */
            give_up_missing(0);
            for (uint32_t n; (n = atomic_load(&arrived)) < sent;) wait_on(&arrived, n, 2000000);
            release();
            if (reserve(atomic_load(&capacity) + 1, f)) return -1;
            continue;
        }
        if (missing || r < 0) {
            give_up_missing(0);
            for (uint32_t n; (n = atomic_load(&arrived)) < sent;) wait_on(&arrived, n, 2000000);
            release();
            fail(f, r < 0 ? (refused ? "rt_tgsigqueueinfo" : "list threads") : "park", r < 0 ? r : ETIMEDOUT);
            if (missing || refused) describe_thread(f, missing ? missing : refused);
            refused = 0;
            return -1;
        }
        break;
    }
    if (quiet) {
        struct parked *p = atomic_load(&table);
        for (uint32_t i = 0; i < used; i++)
            if (atomic_load(&p[i].phase) && !p[i].quiet) {
                int busy = p[i].tid;
                release();
                fail(f, "quiet", EAGAIN);
                describe_thread(f, busy);
                return -1;
            }
    }
    return 0;
}

/* ---- Reviving --------------------------------------------------------------------------------------------------- */

static void register_rseq(struct parked *p) {
    if (!livefork_rseq_size) return;
    char *area = (char *)p->tls + livefork_rseq_offset;
    /* glibc registers at least the original 32 bytes; since 2.41 the size that the kernel asked for, rounded up. */
    for (uint32_t size = livefork_rseq_size <= 32 ? 32 : (livefork_rseq_size + 31) / 32 * 32; size <= 256; size += 32)
        if (raw(SYS_rseq, (long)area, size, 0, RSEQ_SIGNATURE, 0, 0) == 0) return;
    ((volatile int32_t *)area)[1] = -2; /* RSEQ_CPU_ID_REGISTRATION_FAILED, so that nobody believes the old cpu number */
}

/* The first and only code of a thread made again: on its own stack, just below the signal frame that it leaves by. */
static void __attribute__((noreturn)) revived_thread(struct parked *p) {
    raw(SYS_set_robust_list, (long)p->robust, (long)p->robust_size, 0, 0, 0, 0);
    register_rseq(p);
    raw(SYS_prctl, PR_SET_NAME, (long)p->name, 0, 0, 0, 0);
    /* Set only what differs from what clone has just inherited. A mask with no cpu in this cgroup's cpuset is EINVAL:
     * the cgroup then decides. A nice value that this user may not have any more is EPERM: likewise. */
    if (p->affinity_size && memcmp(p->affinity, caller.affinity, sizeof p->affinity))
        raw(SYS_sched_setaffinity, 0, p->affinity_size, (long)p->affinity, 0, 0, 0);
    if (p->schedule.size && memcmp(&p->schedule, &caller.schedule, sizeof p->schedule))
        raw(SYS_sched_setattr, 0, (long)&p->schedule, 0, 0, 0, 0);
    atomic_fetch_add(&come_back, 1);
    wake_all(&come_back);
    while (!atomic_load(&gate)) wait_on(&gate, 0, -1);
    leave_handler(p->context); /* restores registers, signal mask and alternate stack */
}

static int bring_back(int64_t deadline, struct livefork_failure *f) {
    const unsigned long flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS |
                                CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID;
    struct parked *p = atomic_load(&table);
    uint32_t made = 0;
    atomic_store(&come_back, 0);
    atomic_store(&gate, 0);
    for (uint32_t i = 0; i < used; i++) {
        if (!atomic_load(&p[i].phase)) continue;
        char *stack = (char *)((uintptr_t)frame_of(p[i].context) & ~(uintptr_t)15);
        long r = clone_thread(flags, stack, p[i].tid_address, p[i].tls, (void *)revived_thread, &p[i]);
        if (r < 0) { /* the threads made so far stay at the gate; none has run a line of the program */
            fail(f, "clone a thread", r);
            f->tid = p[i].tid;
            memcpy(f->thread, p[i].name, sizeof f->thread);
            f->done = made, f->wanted = held;
            return -1;
        }
        p[i].revived = (int32_t)r;
        made++;
    }
    for (uint32_t n; (n = atomic_load(&come_back)) < made;) {
        int64_t left = deadline - now();
        if (left <= 0) {
            fail(f, "revive", ETIMEDOUT);
            f->done = n, f->wanted = made;
            return -1;
        }
        wait_on(&come_back, n, left);
    }
    if (lock) *lock = waited_for, lock = NULL;
    atomic_store(&gate, 1);
    wake_all(&gate);
    held = 0;
    back = made;
    return 0;
}

/* ---- Cloning ---------------------------------------------------------------------------------------------------- */

static int may_use_plain_clone(const struct livefork_request *q, long error) {
    /* Seccomp filters of containers answer clone3 with ENOSYS (so that glibc falls back) or EPERM: they cannot see its
     * flags. The low byte of clone's flags is the exit signal. */
    return (error == -ENOSYS || error == -EPERM) && q->cgroup < 0 && !q->set_tid_size && !(q->flags & ~0xffffff00ULL);
}

static long clone_now(struct livefork_request *q, struct livefork_failure *f) {
    int *tid_address = NULL;
    raw(SYS_prctl, PR_GET_TID_ADDRESS, (long)&tid_address, 0, 0, 0, 0);
    struct clone_arguments a = {
        .flags = q->flags | CLONE_PIDFD | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | (q->cgroup >= 0 ? CLONE_INTO_CGROUP : 0),
        .pidfd = (uintptr_t)&q->pidfd, .child_tid = (uintptr_t)tid_address,
        /* CLONE_PARENT takes the exit signal of the forker itself; asking for one is EINVAL (clone(2)). */
        .exit_signal = q->flags & CLONE_PARENT ? 0 : SIGCHLD,
        .set_tid = (uintptr_t)q->set_tid, .set_tid_size = q->set_tid_size, .cgroup = q->cgroup >= 0 ? (uint64_t)q->cgroup : 0};
    q->pidfd = -1;
    if (q->pid_namespace >= 0) {
        long r = raw(SYS_setns, q->pid_namespace, CLONE_NEWPID, 0, 0, 0, 0);
        if (r < 0) return fail(f, "setns", r);
    }
    long pid = raw(SYS_clone3, (long)&a, sizeof a, 0, 0, 0, 0);
    if (may_use_plain_clone(q, pid)) {
        long second = clone_process((unsigned long)(a.flags | a.exit_signal), &q->pidfd, tid_address);
        if (second >= 0) pid = second; /* else the answer of clone3 says more */
    }
    if (pid == 0) return 0;
    if (q->pid_namespace >= 0) {
        long r = raw(SYS_setns, q->own_pid_namespace, CLONE_NEWPID, 0, 0, 0, 0);
        if (r < 0) { /* this process could never make a thread again: say so, and leave no child behind */
            if (pid > 0) {
                raw(SYS_pidfd_send_signal, q->pidfd, SIGKILL, 0, 0, 0, 0);
                raw(SYS_close, q->pidfd, 0, 0, 0, 0, 0);
                q->pidfd = -1;
            }
            return fail(f, "setns back", r);
        }
    }
    return pid < 0 ? fail(f, "clone3", pid) : pid;
}

/* Until threads come back nobody waits here, so nothing can be lost. Their waits go on in what is put back then. */
static void set_lock_aside(struct livefork_lock *of_python) {
    static const struct livefork_lock fresh = {PTHREAD_COND_INITIALIZER, PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER,
                                               PTHREAD_MUTEX_INITIALIZER};
    lock = of_python;
    if (!lock) return;
    waited_for = *lock;
    *lock = fresh;
}

long livefork_fork(struct livefork_request *q, struct livefork_failure *f) {
    static const uint64_t every_signal = ~0ULL;
    int64_t deadline = now() + q->timeout_ns;
    if (held) return fail(f, "revive", EBUSY);
    raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&every_signal, (long)&caller_mask, KERNEL_SIGSET, 0, 0);
    note_thread(&caller);
    if (q->hold_ns > 0) doze(q->hold_ns);
    if (park(deadline, q->quiet || needs_quiet(), f)) {
        raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&caller_mask, 0, KERNEL_SIGSET, 0, 0);
        return -1;
    }
    q->parked_ns = now() - (deadline - q->timeout_ns);
    struct parked *p = atomic_load(&table);
    uint32_t threads = 0;
    for (uint32_t i = 0; i < used; i++) threads += atomic_load(&p[i].phase) != 0;
    long pid = clone_now(q, f);
    if (pid) {
        release();
        raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&caller_mask, 0, KERNEL_SIGSET, 0, 0);
        return pid;
    }
    atomic_fetch_add(&epoch, 1); /* even again: tickets still on their way are void here too */
    held = threads;
    back = 0;
    raw(SYS_set_robust_list, (long)caller.robust, (long)caller.robust_size, 0, 0, 0, 0); /* a fork drops it */
    if (q->lock_request) atomic_fetch_and((_Atomic uint32_t *)q->lock_request, ~1U);
    if (!q->revive_at_once && held) set_lock_aside(q->lock);
    if (q->revive_at_once && bring_back(now() + q->timeout_ns, f) < 0) {
        /* One of the threads left at the gate may hold malloc's lock: no more can be said than this. */
        char text[160];
        char *end = put(put(put(put_number(put(text, "live fork: errno "), f->error), " at "), f->stage), "\n");
        raw(SYS_write, 2, (long)text, end - text, 0, 0, 0);
        raw(SYS_exit_group, LIVEFORK_NOT_REVIVED, 0, 0, 0, 0, 0);
    }
    return 0;
}

int livefork_revive(int64_t timeout_ns, struct livefork_failure *f) {
    if (held && bring_back(now() + timeout_ns, f) < 0) return -1;
    raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&caller_mask, 0, KERNEL_SIGSET, 0, 0);
    return (int)back;
}

int livefork_stop(struct livefork_request *q, struct livefork_failure *f) {
    int64_t deadline = now() + q->timeout_ns;
    if (held) return fail(f, "revive", EBUSY);
    if (!q->only_size) return 0;
    if (q->hold_ns > 0) doze(q->hold_ns);
    only = q->only, only_size = q->only_size;
    int failed = park(deadline, 1, f);
    only = NULL;
    if (failed) return -1;
    if (q->lock_request) atomic_fetch_and((_Atomic uint32_t *)q->lock_request, ~1U);
    set_lock_aside(q->lock);
    return 0;
}

void livefork_forget(void) {
    struct sigaction action;
    if (!park_signal || sigaction(park_signal, NULL, &action) || action.sa_sigaction != on_park) return;
    memset(&action, 0, sizeof action);
    action.sa_handler = SIG_DFL;
    sigaction(park_signal, &action, NULL);
}

int livefork_revived(int32_t *before, int32_t *after, uint32_t room) {
    struct parked *p = atomic_load(&table);
    uint32_t n = 0;
    for (uint32_t i = 0; i < used && n < room; i++)
        if (atomic_load(&p[i].phase)) before[n] = p[i].tid, after[n] = p[i].revived, n++;
    return (int)n;
}

long livefork_clone(struct livefork_request *q, struct livefork_failure *f) {
    struct parked self;
    note_thread(&self);
    long pid = clone_now(q, f);
    if (pid == 0) raw(SYS_set_robust_list, (long)self.robust, (long)self.robust_size, 0, 0, 0, 0);
    return pid;
}

/* ---- A process that only stands there ---------------------------------------------------------------------------- */

int livefork_raise_loopback(void) {
    struct ifreq request = {.ifr_name = "lo"};
    long fd = raw(SYS_socket, AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0, 0, 0, 0), r = fd;
    if (fd < 0) return (int)r;
    r = raw(SYS_ioctl, fd, SIOCGIFFLAGS, (long)&request, 0, 0, 0);
    if (r == 0 && !(request.ifr_flags & IFF_UP)) { /* to set them waits for all who configure a network (RTNL) */
        request.ifr_flags |= IFF_UP;
        r = raw(SYS_ioctl, fd, SIOCSIFFLAGS, (long)&request, 0, 0, 0);
    }
    raw(SYS_close, fd, 0, 0, 0, 0, 0);
    return (int)r;
}

long livefork_pause(struct livefork_request *q, struct livefork_failure *f) {
    static const uint64_t every_signal = ~0ULL, no_signal = 0;
    static const uint32_t header[2] = {0x20080522 /* _LINUX_CAPABILITY_VERSION_3 */, 0}, none[6] = {0};
    uint64_t mask;
    raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&every_signal, (long)&mask, KERNEL_SIGSET, 0, 0);
    long pid = clone_now(q, f);
    if (pid) {
        raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&mask, 0, KERNEL_SIGSET, 0, 0);
        return pid;
    }
    if (q->flags & CLONE_NEWNET) livefork_raise_loopback(); /* where it fails, whoever joins says so */
    raw(SYS_close_range, 0, ~0U, 0, 0, 0, 0);
    raw(SYS_prctl, PR_SET_NAME, (long)"pause", 0, 0, 0, 0);
    /* No capability, so that one with more may join its pid namespace (PTRACE_MODE_READ, setns(2)) without CAP_SYS_PTRACE;
     * for that it stays dumpable too. It is root's, and no worker is. */
    raw(SYS_capset, (long)header, (long)none, 0, 0, 0, 0);
    raw(SYS_setsid, 0, 0, 0, 0, 0, 0); /* a worker's kill(0, ...) must not reach those who made it */
    raw(SYS_chdir, (long)"/", 0, 0, 0, 0, 0);
    for (int s = 1; s <= 64; s++) {
        /* struct kernel_sigaction {handler, flags, restorer, mask}. As init of its namespace it gets orphans: SIGCHLD
         * ignored means that the kernel reaps them (wait(2)). */
        uint64_t action[4] = {s == SIGCHLD ? 1 /* SIG_IGN */ : 0 /* SIG_DFL */, 0, 0, 0};
        raw(SYS_rt_sigaction, s, (long)action, 0, KERNEL_SIGSET, 0, 0);
    }
    raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&no_signal, 0, KERNEL_SIGSET, 0, 0);
    for (;;) raw(SYS_ppoll, 0, 0, 0, 0, 0, 0); /* aarch64 has no pause(2) */
}

/* ---- Shared mappings ---------------------------------------------------------------------------------------------- */

/* Copy within this process, by the kernel: a page beyond the end of a mapped file is EFAULT here, and SIGBUS for memcpy.
 * Through a memory file, since a filter may refuse process_vm_readv. Pages that cannot be read stay zero. */
static long copy_readable(long to, uint64_t from, long size, int memory) {
    long page = sysconf(_SC_PAGESIZE);
    for (long at = 0; at < size;) {
        long n = raw(SYS_pwrite64, memory, (long)from + at, size - at, 0, 0, 0);
        if (n > 0) n = raw(SYS_pread64, memory, to + at, n, 0, 0, 0);
        if (n < 0 && n != -EFAULT) return n;
        at += n > 0 ? n : page;
    }
    return 0;
}

int livefork_privatize(const struct livefork_range *ranges, uint32_t count, int64_t timeout_ns, struct livefork_failure *f) {
    static const uint64_t every_signal = ~0ULL;
    uint64_t mask;
    long result = 0, memory = raw(SYS_memfd_create, (long)"privatize", 1 /* MFD_CLOEXEC */, 0, 0, 0, 0);
    if (memory < 0) return fail(f, "memfd_create", memory);
    raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&every_signal, (long)&mask, KERNEL_SIGSET, 0, 0);
    if (park(now() + timeout_ns, 0, f)) result = -1;
    for (uint32_t i = 0; i < count && result == 0; i++) {
        long size = (long)(ranges[i].end - ranges[i].start);
        long copy = raw(SYS_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (copy < 0 && copy > -4096) {
            result = fail(f, "mmap", copy);
            break;
        }
        long r = copy_readable(copy, ranges[i].start, size, (int)memory);
        if (r < 0) result = fail(f, "copy", r);
        if (!result) r = raw(SYS_mprotect, copy, size, ranges[i].protection, 0, 0, 0);
        if (!result && r < 0) result = fail(f, "mprotect", r);
        if (!result) {
            r = raw(SYS_mremap, copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, (long)ranges[i].start, 0);
            if (r < 0 && r > -4096) result = fail(f, "mremap", r);
        }
        if (result) raw(SYS_munmap, copy, size, 0, 0, 0, 0);
        if (result) f->done = i;
    }
    if (atomic_load(&epoch) & 1) release();
    raw(SYS_rt_sigprocmask, SIG_SETMASK, (long)&mask, 0, KERNEL_SIGSET, 0, 0);
    raw(SYS_close, memory, 0, 0, 0, 0, 0);
    return (int)result;
}
