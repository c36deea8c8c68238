#define _GNU_SOURCE
#include "front.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

char *joined(const char *directory, const char *path) {
    size_t size = strlen(directory), more = strlen(path);
    bool slash = size && directory[size - 1] != '/';
    if (path[0] == '/') return strdup(path);
    char *whole = malloc(size + slash + more + 1);
    if (!whole) return NULL;
    memcpy(whole, directory, size);
    if (slash) whole[size] = '/';
    memcpy(whole + size + slash, path, more + 1);
    return whole;
}

/* As Python's os.path.abspath has it: POSIX leaves to each system what two slashes at the beginning mean. */
char *absolute(const char *path) {
    char *directory = path[0] == '/' ? strdup("/") : getcwd(NULL, 0);
    char *whole = directory ? joined(directory, path) : NULL;
    free(directory);
    if (!whole) return NULL;
    size_t root = whole[0] == '/' && whole[1] == '/' && whole[2] != '/' ? 2 : 1;
    char *end = whole + root; /* of what is done; it never overtakes what is read */
    for (char *at = end; *at;) {
        char *stop = strchrnul(at, '/');
        size_t size = (size_t)(stop - at);
        if (size == 2 && at[0] == '.' && at[1] == '.') {
            while (end > whole + root && *--end != '/') {
            }
        } else if (size && !(size == 1 && at[0] == '.')) {
            if (end > whole + root) *end++ = '/';
            memmove(end, at, size);
            end += size;
        }
        at = *stop ? stop + 1 : stop;
    }
    *end = 0;
    return whole;
}

/* Is it `top`, or beneath it? */
static bool within(const char *path, const char *top) {
    size_t size = strlen(top);
    return !strncmp(path, top, size) && (!path[size] || path[size] == '/');
}

static bool seen(const char *path, const char *const *tops) {
    static const char *const system[] = {
        "/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev", NULL,
    };
    if (!path[strspn(path, "/")] || within(tops[0], path)) return true; /* as far as it leads to the directory */
    for (const char *const *top = system; *top; top++)
        if (within(path, *top)) return true;
    for (const char *const *top = tops; *top; top++)
        if (within(path, *top)) return true;
    return false;
}

/* The paths that were said, so that each is said once. */
struct said {
    char *path;
    struct said *before;
};

static void look(const char *text, const char *const *tops, struct said **said) {
    struct stat status;
    char *path = stat(text, &status) ? NULL : absolute(text), *line;
    if (!path || seen(path, tops)) {
        free(path);
        return;
    }
    struct said *one = *said;
    while (one && strcmp(one->path, path)) one = one->before;
    if (one || !(one = malloc(sizeof *one))) {
        free(path);
        return;
    }
    *one = (struct said){path, *said};
    *said = one;
    int size = asprintf(&line, "pocket: the program does not see %s; add --mount %s", path, path);
    if (size < 0) return;
    say("", (struct part){(unsigned char *)line, (size_t)size});
    free(line);
}

static void look_at_both(const char *word, const char *const *tops, struct said **said) {
    const char *equals = strchr(word, '=');
    look(word, tops, said);
    if (equals) look(equals + 1, tops, said);
}

void hint(const struct words *w, const char *const *tops) {
    struct said *said = NULL;
    if (!strcmp(w->kind, "file")) look_at_both(w->program, tops, &said);
    for (char **word = w->arguments; *word; word++) look_at_both(*word, tops, &said);
    while (said) {
        struct said *one = said;
        said = one->before;
        free(one->path);
        free(one);
    }
}
