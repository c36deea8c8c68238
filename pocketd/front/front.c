/* `pocket`: what apps are started by, `pocket run` and `pocket NAME`, is done here, without what an interpreter's start
 * costs; all else by the command in Python (pocketd/command), which this process becomes.
 *
 * What is rare is Python's too, by one rule: until pocketd has been asked for a worker nothing was changed, so whatever
 * is not plain (an option, a service manager's variables, a file that cannot be opened) is left to Python, which begins
 * anew and has the words for it. Beyond that point both do the same; tests/launch runs on both.
 */
#define _GNU_SOURCE
#include "front.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *const verbs[] = {VERBS NULL}; /* those of pocketd/command/main.py, by setup.py */

void say(const char *prefix, struct part text) {
    struct iovec parts[] = {{(char *)prefix, strlen(prefix)}, {(void *)text.at, text.size}, {"\n", 1}};
    void (*before)(int) = signal(SIGPIPE, SIG_IGN);
    if (writev(2, parts, 3) < 0) errno = 0; /* nobody is left to be told */
    signal(SIGPIPE, before);
}

char *home(void) {
    char path[PATH_MAX];
    ssize_t size = readlink("/proc/self/exe", path, sizeof path - 1);
    if (size <= 0) return NULL;
    path[size] = 0;
    char *slash = strrchr(path, '/');
    if (!slash) return NULL;
    *slash = 0;
    return strdup(path);
}

static void __attribute__((noreturn)) python(char **argv) {
    struct failure f;
    char *directory = home(), *command = directory ? joined(directory, "pocket-py") : NULL;
    if (command) {
        argv[0] = command;
        execv(command, argv);
        fail(&f, "failed", "%s cannot be run: %s", command, strerror(errno));
    } else {
        fail(&f, "failed", "/proc/self/exe does not say where the rest of this command is");
    }
    say("pocket: ", f.message);
    exit(REFUSED_STATUS);
}

/* Is a pocket meant? `pocket NAME on` may be for a service, and a word with a hyphen is an option. */
static bool is_name(char **words) {
    if (!*words[0] || words[0][0] == '-' || !strcmp(words[0], "help")) return false;
    for (const char *const *verb = verbs; *verb; verb++)
        if (!strcmp(words[0], *verb)) return false;
    return !words[1] || (strcmp(words[1], "on") && strcmp(words[1], "off"));
}

/* Did a service manager start this (sd_notify(3), sd_listen_fds(3), systemd.exec(5))? */
static bool supervised(void) {
    static const char *const variables[] = {"NOTIFY_SOCKET", "WATCHDOG_PID", "LISTEN_PID", "CREDENTIALS_DIRECTORY"};
    for (size_t i = 0; i < sizeof variables / sizeof *variables; i++)
        if (getenv(variables[i])) return true;
    return false;
}

int main(int argc, char **argv) {
    struct words words = {.kind = "file"};
    if (argc > 1 && !supervised()) {
        if (!strcmp(argv[1], "run")) {
            if (parse(&words, argv + 2)) run(&words);
        } else if (is_name(argv + 1)) {
            words.name = argv[1];
            words.pocket = true;
            words.arguments = argv + 2;
            run(&words);
        }
    }
    if (argc < 1) exit(REFUSED_STATUS);
    python(argv);
}
