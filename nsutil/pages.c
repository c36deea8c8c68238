/* Which pages this process has made its own so far, and which pages of files it has mapped.
 *
 * In C, so that looking makes few more of them. linux/Documentation/admin-guide/mm/pagemap.rst,
 * proc_pid_maps(5).
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pages.h"

#define PRESENT (1ULL << 63)
#define OF_A_FILE (1ULL << 61)
#define ALONE (1ULL << 56)
#define LARGEST (1ULL << 34) /* bytes of a mapping that is looked at: more is reserved, not used */
#define MOST 65536           /* ranges */
#define GAP 8                /* pages of a file that are mapped along, so that there are fewer ranges */

struct ranges {
    size_t count;
    uint64_t at[MOST][2]; /* addresses */
};

static void add(struct ranges *to, uint64_t page, uint64_t size, uint64_t begin, unsigned gap) {
    uint64_t *last = to->count ? to->at[to->count - 1] : NULL;
    if (last && last[0] >= begin && page - last[1] <= gap * size) {
        last[1] = page + size;
    } else if (to->count < MOST) {
        to->at[to->count][0] = page;
        to->at[to->count++][1] = page + size;
    }
}

static void look(int pagemap, uint64_t begin, uint64_t end, bool writable, struct ranges *own, struct ranges *mapped) {
    static uint64_t entries[8192];
    uint64_t size = (uint64_t)sysconf(_SC_PAGESIZE);
    for (uint64_t at = begin; at < end;) {
        uint64_t wanted = (end - at) / size;
        if (wanted > sizeof entries / sizeof *entries) wanted = sizeof entries / sizeof *entries;
        ssize_t got = pread(pagemap, entries, wanted * sizeof *entries, (off_t)(at / size * sizeof *entries));
        if (got < (ssize_t)sizeof *entries) return;
        for (size_t n = 0; n < (size_t)got / sizeof *entries; n++, at += size) {
            if (!(entries[n] & PRESENT)) continue;
            if (!writable)
                add(mapped, at, size, begin, GAP);
            else if (entries[n] & ALONE && !(entries[n] & OF_A_FILE))
                add(own, at, size, begin, 0);
        }
    }
}

static void write_all(int fd, const void *data, size_t size) {
    for (const char *at = data; size;) {
        ssize_t wrote = write(fd, at, size);
        if (wrote <= 0) return;
        at += wrote;
        size -= (size_t)wrote;
    }
}

/* Not by sscanf, whose symbol of glibc 2.38 those before it lack. */
static const char *number(const char *at, uint64_t *value) {
    *value = 0;
    for (; isxdigit((unsigned char)*at); at++) *value = *value << 4 | (uint64_t)(*at <= '9' ? *at - '0' : (*at | 32) - 'a' + 10);
    return *at ? at + 1 : at;
}

static const char *next_field(const char *at) {
    at += strcspn(at, " ");
    return at + strspn(at, " ");
}

/* Write what is found to `fd`: how many ranges are its own, how many are mapped of files, and both, each a beginning
 * and an end, in the order of addresses; all unsigned, of 64 bits. Nothing where it cannot be seen. */
void pages_note(int fd) {
    struct ranges *found = calloc(2, sizeof *found);
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    FILE *maps = fopen("/proc/self/maps", "re");
    char *line = NULL;
    size_t room = 0;
    if (found && pagemap >= 0 && maps) {
        while (getline(&line, &room, maps) > 0) {
            uint64_t begin, end;
            const char *rights = number(number(line, &begin), &end), *name = rights; /* 7f00-7f80 rw-p 00000000 08:01 12  /usr/... */
            for (int field = 0; field < 4; field++) name = next_field(name);
            bool of_kernel = !strncmp(name, "[v", 2); /* vdso, vvar, vsyscall */
            bool writable = rights[1] == 'w';
            if (of_kernel || end - begin > LARGEST || rights[3] != 'p' || (!writable && rights[0] != 'r')) continue;
            if (writable || *name == '/') look(pagemap, begin, end, writable, &found[0], &found[1]);
        }
        uint64_t counts[2] = {found[0].count, found[1].count};
        write_all(fd, counts, sizeof counts);
        for (int n = 0; n < 2; n++) write_all(fd, found[n].at, found[n].count * sizeof *found[n].at);
    }
    free(line);
    free(found);
    if (maps) fclose(maps);
    if (pagemap >= 0) close(pagemap);
}
