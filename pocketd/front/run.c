#define _GNU_SOURCE
#include "front.h"

#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

/* Options up to the program; everything behind it is the program's own. */
bool parse(struct words *w, char **rest) {
    static const char *const valued[] = {"--service", "--dir", "--mount", "--runtime-dir", NULL};
    for (; *rest; rest++) {
        char *word = *rest, *equals = strchr(word, '=');
        const char *value = NULL;
        if (!strcmp(word, "--cold")) {
            w->cold = true;
            continue;
        }
        if (!strcmp(word, "--trace")) {
            w->trace = true;
            continue;
        }
        if (!strcmp(word, "--") || !strcmp(word, "-m") || !strcmp(word, "-c") || !strcmp(word, "-p")) {
            if (!rest[1]) return false;
            w->arguments = rest + 2;
            if (word[1] == 'p') {
                w->pocket = true;
                w->name = rest[1];
                return *w->name;
            }
            w->program = rest[1];
            if (word[1] != '-') w->kind = word[1] == 'm' ? "module" : "code";
            return true;
        }
        if (word[0] != '-' || !word[1]) {
            w->program = word;
            w->arguments = rest + 1;
            return true;
        }
        size_t size = equals ? (size_t)(equals - word) : strlen(word);
        const char *const *option = valued;
        while (*option && (strlen(*option) != size || strncmp(*option, word, size))) option++;
        if (!*option || !(value = equals ? equals + 1 : *++rest)) return false;
        switch (option - valued) {
        case 0: w->name = value; break;
        case 1: w->directory = value; break;
        case 2:
            if (w->mounts == SENT_FDS - 3) return false;
            w->mount[w->mounts++] = value;
            break;
        case 3: w->runtime_dir = value; break;
        }
    }
    return false;
}

/* Which of 0, 1 and 2 are open. The others are held with /dev/null, so that no socket of ours gets their number. */
static int standard_streams(int *present) {
    struct stat status;
    int count = 0, fd;
    for (int n = 0; n < 3; n++)
        if (!fstat(n, &status)) present[count++] = n;
    while ((fd = open("/dev/null", O_RDWR | O_CLOEXEC)) >= 0 && fd < 3) {
    }
    if (fd < 0) return -1;
    close(fd);
    return count;
}

static void put_bytes_of(struct writer *w, const char *key, const char *text) {
    put_text(w, key);
    put_bytes(w, text, strlen(text));
}

/* One variable, of "NAME=VALUE". */
static void put_variable(struct writer *w, const char *entry) {
    const char *equals = strchr(entry, '=');
    put_array(w, 2);
    put_bytes(w, entry, (size_t)(equals - entry));
    put_bytes(w, equals + 1, strlen(equals + 1));
}

static bool passed_on(const char *entry) {
    static const char own[] = "POCKETD_RUNTIME_DIR="; /* it says where pocketd is, for this process */
    const char *equals = strchr(entry, '=');
    return equals && equals != entry && strncmp(entry, own, sizeof own - 1);
}

/* The environment with what a pocket's definition adds; of one name's two values the last holds. */
static bool put_environment(struct writer *w, struct part added) {
    uint32_t count = 0, pairs = 0;
    struct part inside = {NULL, 0}, name, value, text;
    if (added.size && !as_map(added, &pairs, &inside)) return false;
    for (char **entry = environ; *entry; entry++) count += passed_on(*entry);
    put_text(w, "environment");
    put_array(w, count + pairs);
    for (char **entry = environ; *entry; entry++)
        if (passed_on(*entry)) put_variable(w, *entry);
    while (pairs--) {
        if (!next(&inside, &name) || !next(&inside, &value)) return false;
        put_array(w, 2);
        if (!as_text(name, &text) || is_text(name, "POCKETD_RUNTIME_DIR")) return false;
        put_bytes(w, text.at, text.size);
        if (!as_text(value, &text)) return false;
        put_bytes(w, text.at, text.size);
    }
    return true;
}

/* Signals that this process was started with as ignored (nohup) or as blocked. That SIGPIPE and SIGXFSZ are ignored
 * means nothing: Python does so, and what it starts has it so. */
static void put_signals(struct writer *w) {
    sigset_t valid, blocked;
    struct sigaction action;
    uint32_t ignored = 0, held = 0;
    bool is_ignored[65] = {false}, is_held[65] = {false};
    sigfillset(&valid);
    sigprocmask(SIG_BLOCK, NULL, &blocked);
    for (int n = 1; n <= 64; n++) {
        bool caught = n != SIGPIPE && n != SIGXFSZ && n != SIGCHLD && n != SIGKILL && n != SIGSTOP;
        if (sigismember(&valid, n) != 1) continue;
        is_ignored[n] = caught && !sigaction(n, NULL, &action) && action.sa_handler == SIG_IGN;
        is_held[n] = sigismember(&blocked, n) == 1;
        ignored += is_ignored[n];
        held += is_held[n];
    }
    put_text(w, "ignored");
    put_array(w, ignored);
    for (int n = 1; n <= 64; n++)
        if (is_ignored[n]) put_int(w, n);
    put_text(w, "blocked");
    put_array(w, held);
    for (int n = 1; n <= 64; n++)
        if (is_held[n]) put_int(w, n);
}

static void put_limits(struct writer *w) {
    static const struct {
        const char *name;
        int number;
    } limits[] = {
        {"RLIMIT_CORE", RLIMIT_CORE},   {"RLIMIT_NOFILE", RLIMIT_NOFILE},
        {"RLIMIT_STACK", RLIMIT_STACK}, {"RLIMIT_FSIZE", RLIMIT_FSIZE},
        {"RLIMIT_AS", RLIMIT_AS},       {"RLIMIT_CPU", RLIMIT_CPU},
        {"RLIMIT_DATA", RLIMIT_DATA},
    };
    const size_t count = sizeof limits / sizeof *limits;
    put_text(w, "limits");
    put_map(w, (uint32_t)count);
    for (size_t i = 0; i < count; i++) {
        struct rlimit limit = {RLIM_INFINITY, RLIM_INFINITY};
        getrlimit(limits[i].number, &limit);
        put_text(w, limits[i].name);
        put_int(w, (int64_t)limit.rlim_cur); /* infinity is -1, as Python has it */
    }
}

/* A text of a reply as C has it; NULL where it is none, or is empty. */
static char *text_in(struct part map, const char *key) {
    struct part value, text;
    if (!get(map, key, &value) || !as_text(value, &text) || !text.size || memchr(text.at, 0, text.size)) return NULL;
    return strndup((const char *)text.at, text.size);
}

/* What the caller's worker is to do. False where Python is to say what is wrong. */
static bool put_start(struct writer *w, const struct words *words, const int *present, int count, struct part about) {
    char *directory = getcwd(NULL, 0), *program = NULL, *packages = NULL;
    struct part added = {NULL, 0}, kind;
    if (!directory) return false;
    if (words->pocket) {
        char *place = text_in(about, "directory"), *file = text_in(about, "program");
        char *inside = text_in(about, "packages");
        if (!get(about, "kind", &kind) || !is_text(kind, "pocket") || !place || !file) return false;
        if (!get(about, "environment", &added)) return false;
        program = joined(place, file);
        if (inside && !(packages = joined(place, inside))) return false;
    } else {
        program = strdup(words->program);
    }
    if (!program) return false;
    mode_t mask = umask(0);
    umask(mask);
    begin(w, "start", 12 + (packages ? 1u : 0u) + (words->trace ? 1u : 0u));
    put_text(w, "mode");
    put_text(w, "program");
    put_text(w, "kind");
    put_text(w, words->kind);
    put_bytes_of(w, "program", program);
    uint32_t arguments = 0;
    while (words->arguments[arguments]) arguments++;
    put_text(w, "arguments");
    put_array(w, arguments);
    for (char **word = words->arguments; *word; word++) put_bytes(w, *word, strlen(*word));
    if (!put_environment(w, added)) return false;
    put_bytes_of(w, "directory", directory);
    put_text(w, "umask");
    put_int(w, mask);
    put_signals(w);
    put_limits(w);
    put_text(w, "cold");
    put_bool(w, words->cold);
    put_text(w, "stdio");
    put_array(w, (uint32_t)count);
    for (int i = 0; i < count; i++) put_int(w, present[i]);
    if (words->trace) { /* where the time went since now, on the program's standard error */
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        put_text(w, "trace");
        put_real(w, (double)now.tv_sec + (double)now.tv_nsec / 1e9);
    }
    if (packages) {
        put_text(w, "packages");
        put_text(w, packages);
    }
    free(directory);
    free(program);
    free(packages);
    return true;
}

static void add(struct request *r, const char *role, int fd) {
    r->roles[r->count] = role;
    r->fds[r->count++] = fd;
}

/* SRC[:DST][:rw], relative to the working directory; gives its target. */
static char *add_mount(struct request *r, const char *text) {
    char *source = strdup(text), *parts[3] = {source, NULL, NULL};
    int count = 1;
    for (char *at = source; at && (at = strchr(at, ':'));) {
        if (count == 3) return NULL;
        *at++ = 0;
        parts[count++] = at;
    }
    bool writable = count > 1 && !strcmp(parts[count - 1], "rw");
    if (!source || !*source || count - writable > 2) return NULL;
    char *path = absolute(source), *target = count - writable == 2 ? absolute(parts[1]) : path;
    int fd = path ? open(path, O_PATH | O_CLOEXEC) : -1;
    if (!target || fd < 0) return NULL;
    add(r, "mount", fd);
    put_map(&r->fields, 2);
    put_bytes_of(&r->fields, "target", target);
    put_text(&r->fields, "writable");
    put_bool(&r->fields, writable);
    return target;
}

/* The directory, and what else is shown; `tops` are the places of both, for hint(). */
static bool add_files(struct request *r, const struct words *w, const char **tops) {
    char *directory = w->directory && *w->directory ? strdup(w->directory) : getcwd(NULL, 0), *bin = home();
    int count = 0;
    if (!directory) return false;
    if (!w->pocket) {
        int fd = open(directory, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (fd < 0 || !(r->path = absolute(directory)) || !(tops[count++] = realpath(directory, NULL))) return false;
        add(r, "dir", fd);
    }
    put_text(&r->fields, "mounts");
    put_array(&r->fields, (uint32_t)w->mounts);
    for (int i = 0; i < w->mounts; i++)
        if (!(tops[count++] = add_mount(r, w->mount[i]))) return false;
    r->pairs = 1;
    if (bin && strrchr(bin, '/')) { /* what is installed is beside the directory of this file: sys.prefix */
        *strrchr(bin, '/') = 0;
        tops[count++] = bin;
    }
    tops[count] = NULL;
    free(directory);
    return true;
}

static void __attribute__((noreturn)) refused(const struct failure *f) {
    static const char not_found[] = "not-found";
    bool found = f->code.size != sizeof not_found - 1 || memcmp(f->code.at, not_found, f->code.size);
    say("pocket: ", f->message);
    exit(found ? REFUSED_STATUS : NOT_FOUND_STATUS);
}

/* It takes a while, for which nobody who wants to end it should have to wait. */
static void progress(struct part text) {
    unblock_ends();
    if (text.size && isatty(2)) say("", text);
}

void run(struct words *w) {
    const char *directory = w->runtime_dir && *w->runtime_dir ? w->runtime_dir : getenv("POCKETD_RUNTIME_DIR");
    const char *tops[SENT_FDS + 2] = {NULL};
    struct request request = {.mode = "program", .name = w->name};
    struct writer start = {NULL, 0, 0};
    struct control control;
    struct login login;
    struct failure f;
    struct part about = {NULL, 0};
    int present[3], count = standard_streams(present);

    if (!directory || !*directory) directory = "/run/pocketd";
    if (count < 0 || !add_files(&request, w, tops) || !reach(&control, directory)) return;
    if (w->pocket && !describe(&control, w->name, &about, &f)) refused(&f);
    if (!put_start(&start, w, present, count, about) || !make_login(&login, &start, present, count)) return;
    free(start.data);
    if (!w->pocket) hint(w, tops);
    block_signals();
    if (!log_in(&control, &login, &request, progress, &f)) refused(&f);
    close(control.sock);
    for (int i = 0; i < request.count; i++) close(request.fds[i]);
    hold(&login);
}
