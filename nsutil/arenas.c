/* Python's objects on huge pages: where its allocator gets its arenas from (PyObject_SetArenaAllocator).
 *
 * A fork copies one page table entry for 2 MiB then, and not 512; with what an import of TensorFlow makes that is half of
 * what a fork costs. Python takes its arenas (256 KiB or 1 MiB, obmalloc.c) one by one, wherever the kernel has room,
 * so that few of them ever fill a huge page; here they follow one another. What else it asks for, and gives back, is
 * left to mmap(2) and munmap(2), as is what came from there before.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#include "arenas.h"

#define HUGE_PAGE (2UL << 20)
#define ROOM (64UL << 20) /* addresses that are reserved at once */
#define ROOMS 256
#define UNUSED 4096

static atomic_flag busy = ATOMIC_FLAG_INIT; /* an interpreter may have a lock (GIL) of its own */
static size_t arena;                        /* bytes of each; 0 before the first */
static char *room[ROOMS];                   /* the beginnings of what is reserved */
static unsigned rooms;
static char *next, *ready; /* in the last of them: the first byte not given out, and the first that nobody may touch */
static void *unused[UNUSED];
static unsigned count;

static void *map(size_t size, int protection) {
    void *p = mmap(NULL, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | (protection ? 0 : MAP_NORESERVE), -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static char *reserve(void) {
    char *p = rooms < ROOMS ? map(ROOM + HUGE_PAGE, PROT_NONE) : NULL;
    if (!p) return NULL;
    char *first = (char *)(((uintptr_t)p + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
    if (first > p) munmap(p, (size_t)(first - p));
    if (first < p + HUGE_PAGE) munmap(first + ROOM, (size_t)(p + HUGE_PAGE - first));
    madvise(first, ROOM, MADV_HUGEPAGE); /* a kernel without: small pages, in one place all the same */
    return room[rooms++] = next = ready = first;
}

static void *take(void) {
    if (count) return unused[--count];
    if ((!rooms || next == room[rooms - 1] + ROOM) && !reserve()) return NULL;
    if (next == ready) {
        if (mprotect(ready, HUGE_PAGE, PROT_READ | PROT_WRITE)) return NULL;
        ready += HUGE_PAGE;
    }
    next += arena;
    return next - arena;
}

static int is_ours(const char *p) {
    for (unsigned i = 0; i < rooms; i++)
        if (p >= room[i] && p < room[i] + ROOM) return 1;
    return 0;
}

void *arenas_alloc(void *context, size_t size) {
    (void)context;
    void *p = NULL;
    while (atomic_flag_test_and_set(&busy)) sched_yield();
    if (!arena && size >= HUGE_PAGE / 8 && HUGE_PAGE % size == 0) arena = size;
    if (arena && size == arena) p = take();
    atomic_flag_clear(&busy);
    return p ? p : map(size, PROT_READ | PROT_WRITE);
}

void arenas_free(void *context, void *p, size_t size) {
    (void)context;
    while (atomic_flag_test_and_set(&busy)) sched_yield();
    int ours = is_ours(p);
    if (ours) {
        madvise(p, size, MADV_DONTNEED);
        if (count < UNUSED) unused[count++] = p;
    }
    atomic_flag_clear(&busy);
    if (!ours) munmap(p, size);
}
