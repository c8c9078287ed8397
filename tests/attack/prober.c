/* Arguments, the runner of attack tables, result lines. See prober.h. */
#include "prober.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ATTACK_TIMEOUT_MS 8000

struct settings settings;

static const struct {
    const char *name;
    const struct attack *attacks;
} groups[] = {
    {"filesystem", filesystem_attacks}, {"proc", proc_attacks},       {"namespace", namespace_attacks},
    {"capability", capability_attacks}, {"keeper", keeper_attacks},   {"syscall", syscall_attacks},
    {"device", device_attacks},         {"network", network_attacks},
};

static size_t escape(char *out, size_t size, const char *text) {
    size_t used = 0;
    for (; *text && used + 8 < size; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') {
            out[used++] = '\\';
            out[used++] = (char)c;
        } else if (c < 0x20 || c >= 0x7f) {
            used += (size_t)snprintf(out + used, size - used, "\\u%04x", c);
        } else {
            out[used++] = (char)c;
        }
    }
    out[used] = 0;
    return used;
}

static const char *error_name(int error_number) {
    if (error_number == 0)
        return "";
    const char *name = strerrorname_np(error_number);
    return name ? name : "UNKNOWN";
}

void report(const char *id, const char *attack, enum verdict verdict, int error_number, const char *format, ...) {
    static const char *const names[] = {"held", "breached", "absent", "error"};
    char detail[1024], safe_detail[1536], safe_attack[512], line[3072];
    va_list list;
    va_start(list, format);
    vsnprintf(detail, sizeof detail, format, list);
    va_end(list);
    escape(safe_detail, sizeof safe_detail, detail);
    escape(safe_attack, sizeof safe_attack, attack);
    int length = snprintf(line, sizeof line,
                          "{\"id\":\"%s\",\"attack\":\"%s\",\"result\":\"%s\",\"errno\":\"%s\",\"detail\":\"%s\"}\n", id,
                          safe_attack, names[verdict], error_name(error_number), safe_detail);
    /* One write per line, so lines of parent and children never mix. */
    if (write(STDOUT_FILENO, line, (size_t)length) != length)
        _exit(3);
}

bool is_absence(int error_number) {
    switch (error_number) {
    case ENOSYS:
    case ENODEV:
    case ENOENT:
    case ENXIO:
    case EAFNOSUPPORT:
    case EPROTONOSUPPORT:
    case ESOCKTNOSUPPORT:
    case EOPNOTSUPP:
    case EADDRNOTAVAIL:
        return true;
    default:
        return false;
    }
}

void report_refusal(const char *id, const char *attack, long rc) {
    int error_number = errno;
    if (rc >= 0)
        report(id, attack, BREACHED, 0, "returned %ld", rc);
    else
        report(id, attack, settings.bare && is_absence(error_number) ? ABSENT : HELD, error_number, "refused");
}

void report_reach(const char *id, const char *attack, long rc, const int *proof) {
    int error_number = errno;
    for (; rc < 0 && *proof; proof++)
        if (error_number == *proof) {
            report(id, attack, BREACHED, error_number, "the call reached the kernel");
            return;
        }
    errno = error_number;
    report_refusal(id, attack, rc);
}

ssize_t read_small(const char *path, char *buffer, size_t size) {
    buffer[0] = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -1;
    size_t used = 0;
    ssize_t got = 0;
    while (used + 1 < size && (got = read(fd, buffer + used, size - 1 - used)) > 0)
        used += (size_t)got;
    int error_number = errno;
    close(fd);
    buffer[used] = 0;
    errno = error_number;
    return got < 0 && used == 0 ? -1 : (ssize_t)used;
}

long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void run_one(const struct attack *attack) {
    int ended[2];
    if (pipe2(ended, O_CLOEXEC) < 0) {
        report(attack->id, attack->what, FAILED, errno, "pipe");
        return;
    }
    pid_t child = fork();
    if (child < 0) {
        report(attack->id, attack->what, FAILED, errno, "fork");
    } else if (child == 0) {
        /* On the bare host every attack gets a mount namespace of its own, because some of them unmount /proc. */
        if (settings.bare && (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0))
            report(attack->id, attack->what, FAILED, errno, "mount namespace");
        else
            attack->run();
        /* The write end of the pipe is open in this child alone: its closing is the end of the attack. */
        _exit(0);
    }
    close(ended[1]);
    if (child > 0) {
        struct pollfd wait_for = {.fd = ended[0], .events = POLLIN};
        /* On the bare host the kernel looks for a module for every socket family and type, each by a process. */
        int limit_ms = settings.bare ? 10 * ATTACK_TIMEOUT_MS : ATTACK_TIMEOUT_MS;
        bool hung = poll(&wait_for, 1, limit_ms) == 0;
        if (hung)
            kill(child, SIGKILL);
        int status = 0;
        waitpid(child, &status, 0);
        if (hung)
            report(attack->id, attack->what, FAILED, ETIMEDOUT, "no end within %d ms", limit_ms);
        else if (WIFSIGNALED(status))
            report(attack->id, attack->what, WTERMSIG(status) == SIGSYS ? HELD : FAILED, 0, "killed by signal %d",
                   WTERMSIG(status));
    }
    close(ended[0]);
}

static int run_group(const char *wanted) {
    bool found = false;
    for (size_t g = 0; g < COUNT(groups); g++) {
        if (strcmp(wanted, "all") != 0 && strcmp(wanted, groups[g].name) != 0)
            continue;
        found = true;
        for (const struct attack *a = groups[g].attacks; a->run; a++)
            if (!(settings.bare && a->sandbox_only))
                run_one(a);
    }
    return found ? 0 : 2;
}

static int run_id(const char *id) {
    for (size_t g = 0; g <= COUNT(groups); g++)
        for (const struct attack *a = g < COUNT(groups) ? groups[g].attacks : landlock_attacks; a->run; a++)
            if (strcmp(a->id, id) == 0) {
                run_one(a);
                return 0;
            }
    return 2;
}

/*
 * The negative control: the same attacks where nothing holds them. Mounts, signals and names stay inside throw-away
 * namespaces so that the host survives a success. Process 1 of the new pid namespace and its first child stand in
 * for process 1 and the spawner of a sandbox; the attacks run beside them.
 */
static int run_bare(const char *wanted) {
    if (unshare(CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC) < 0) {
        report("bare", "unshare", FAILED, errno, "the control needs root");
        return 3;
    }
    pid_t first = fork();
    if (first == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
            mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
            _exit(3);
        pid_t second = fork();
        if (second == 0) {
            for (;;)
                pause();
        }
        pid_t worker = fork();
        if (worker == 0)
            _exit(run_group(wanted));
        for (;;) {
            int status;
            pid_t ended = wait(&status);
            if (ended == worker)
                _exit(WIFEXITED(status) ? WEXITSTATUS(status) : 3);
            if (ended < 0 && errno != EINTR)
                _exit(3);
        }
    }
    int status = 0;
    waitpid(first, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 3;
}

static void push(struct list *list, const char *value) {
    if (list->count < LIST_MAX)
        list->item[list->count++] = value;
}

static int usage(void) {
    dprintf(STDERR_FILENO,
            "usage: prober [--bare] [--external] [--file P] [--socket P] [--address A] [--string S] [--variable V]\n"
            "              [--token T] [--abstract N] [--port N] [--set-uid P] all|GROUP|only ID|table FIRST LAST|COMMAND ...\n");
    return 2;
}

int main(int argc, char **argv) {
    /* Rows from children must come out even when a reader has gone. */
    signal(SIGPIPE, SIG_IGN);
    settings.maker = getppid();
    int i = 1;
    for (; i < argc && strncmp(argv[i], "--", 2) == 0; i++) {
        const char *name = argv[i] + 2;
        if (strcmp(name, "bare") == 0) {
            settings.bare = true;
            continue;
        }
        if (strcmp(name, "external") == 0) {
            settings.external = true;
            continue;
        }
        if (++i >= argc)
            return usage();
        const char *value = argv[i];
        if (strcmp(name, "file") == 0)
            push(&settings.files, value);
        else if (strcmp(name, "socket") == 0)
            push(&settings.sockets, value);
        else if (strcmp(name, "address") == 0)
            push(&settings.addresses, value);
        else if (strcmp(name, "string") == 0)
            push(&settings.strings, value);
        else if (strcmp(name, "variable") == 0)
            push(&settings.variables, value);
        else if (strcmp(name, "token") == 0)
            settings.token = value;
        else if (strcmp(name, "abstract") == 0)
            settings.abstract_name = value;
        else if (strcmp(name, "set-uid") == 0)
            settings.set_uid = value;
        else if (strcmp(name, "port") == 0)
            settings.port = atoi(value);
        else
            return usage();
    }
    if (i >= argc)
        return usage();
    if (strcmp(argv[i], "only") == 0 && i + 1 < argc)
        return run_id(argv[i + 1]);
    if (strcmp(argv[i], "table") == 0 && i + 2 < argc)
        return scan_table(atol(argv[i + 1]), atol(argv[i + 2]));
    int code = settings.bare ? run_bare(argv[i]) : run_group(argv[i]);
    if (code == 2 && !settings.bare)
        code = resource_command(argc - i, argv + i);
    if (code == 2 && !settings.bare)
        code = peer_command(argc - i, argv + i);
    return code == 2 ? usage() : code;
}
