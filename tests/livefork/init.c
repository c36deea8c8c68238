/* PID 1 of the aarch64 test's machine: run /try with the kernel command line's arguments after "--", say how it ended,
 * power off. */
#include <stdio.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int count, char **arguments) {
    (void)count;
    mkdir("/proc", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    int status = -1, pid = fork();
    if (!pid) {
        arguments[0] = "/try";
        execv("/try", arguments);
        _exit(9);
    }
    waitpid(pid, &status, 0);
    printf("TRY ENDED %d\n", status);
    fflush(stdout);
    reboot(RB_POWER_OFF);
    return 0;
}
