/* C07, I: attacks on process 1 and the spawner (process 2), and on what the workload inherited. */
#include "prober.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/kcmp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/*
 * Who keeps the sandbox: process 1 and the spawner. Neither is listed in /proc, so they are found by their session: every
 * process of the workload has the session of its call, the keepers have none of this namespace (0) or that of process 1.
 */
static pid_t keepers[8] = {1};
static size_t keeper_count = 1;

/* Without a pid namespace the keepers share the session of the runner and of the launcher, which are keepers as well. */
static bool is_keeper(pid_t pid) {
    /* A thread has a session too, but only a process can be named twice here. */
    if (syscall(SYS_tgkill, pid, pid, 0) < 0 && errno == ESRCH)
        return false;
    pid_t session = getsid(pid), maker = settings.maker > 1 ? getsid(settings.maker) : 0;
    return session == 0 || session == 1 || (session > 0 && session == maker && maker != getsid(0));
}

static void find_keepers(void) {
    if (settings.bare) {
        keepers[1] = 2;
        keeper_count = 2;
        return;
    }
    pid_t found[64];
    size_t count = 0;
    pid_t last = settings.maker > 1 ? settings.maker + 64 : 64;
    for (pid_t pid = 2; pid < last && count < COUNT(found); pid++)
        if (is_keeper(pid))
            found[count++] = pid;
    /* A process of the workload that is just being made has not left its maker's session yet. */
    usleep(200000);
    for (size_t i = 0; i < count && keeper_count < COUNT(keepers); i++)
        if (is_keeper(found[i]))
            keepers[keeper_count++] = found[i];
    report("I00", "keepers found", keeper_count > 1 ? HELD : FAILED, 0, "%zu, the second is %d", keeper_count, keepers[1]);
}

static const int past_the_filter[] = {EFAULT, EINVAL, EBADF, EIO, 0};

/* Something at an address that exists in the control's process 1, which is this same program. */
static long landmark = 42;

static void name_it(char *what, size_t size, const char *call, pid_t pid) { snprintf(what, size, "%s of process %d", call, pid); }

static void trace(void) {
    find_keepers();
    for (size_t i = 0; i < keeper_count; i++) {
        char what[64];
        name_it(what, sizeof what, "ptrace(SEIZE)", keepers[i]);
        long rc = ptrace(PTRACE_SEIZE, keepers[i], 0, 0);
        report_refusal("C07.seize", what, rc);
        if (rc < 0) {
            name_it(what, sizeof what, "ptrace(ATTACH)", keepers[i]);
            report_refusal("C07.attach", what, ptrace(PTRACE_ATTACH, keepers[i], 0, 0));
        }
    }
}

static void memory(void) {
    find_keepers();
    for (size_t i = 0; i < keeper_count; i++) {
        char what[64];
        long copy = 0;
        struct iovec here = {&copy, sizeof copy}, there = {&landmark, sizeof landmark};
        name_it(what, sizeof what, "process_vm_readv", keepers[i]);
        report_reach("C07.readv", what, process_vm_readv(keepers[i], &here, 1, &there, 1, 0), past_the_filter);
        name_it(what, sizeof what, "process_vm_writev", keepers[i]);
        report_reach("C07.writev", what, process_vm_writev(keepers[i], &here, 1, &there, 1, 0), past_the_filter);
        static const char *const files[] = {"mem",     "maps", "environ", "auxv", "exe",   "cwd",       "root",
                                            "fd",      "fdinfo", "ns/mnt", "stack", "syscall", "personality", "pagemap",
                                            "clear_refs", "timers", "map_files", "io"};
        for (size_t f = 0; f < COUNT(files); f++) {
            char path[64], text[64];
            snprintf(path, sizeof path, "/proc/%d/%s", keepers[i], files[f]);
            int fd = strcmp(files[f], "clear_refs") == 0 ? open(path, O_WRONLY) : open(path, O_RDONLY);
            /* Some of these open for anyone and refuse at the first read. An empty answer gives nothing away. */
            long rc = fd;
            if (fd >= 0 && strncmp(files[f], "fd", 2) != 0 && strcmp(files[f], "clear_refs") != 0 &&
                strcmp(files[f], "map_files") != 0 && strcmp(files[f], "cwd") != 0 && strcmp(files[f], "root") != 0 &&
                strcmp(files[f], "exe") != 0 && strcmp(files[f], "ns/mnt") != 0) {
                rc = strcmp(files[f], "mem") == 0 ? pread(fd, text, 8, (off_t)(size_t)&landmark)
                                                  : read(fd, text, sizeof text);
                if (rc == 0) {
                    report("C07.file", path, HELD, 0, "opens, empty");
                    close(fd);
                    continue;
                }
            }
            report_refusal("C07.file", path, rc);
            if (fd >= 0)
                close(fd);
        }
    }
}

static void descriptors(void) {
    find_keepers();
    for (size_t i = 0; i < keeper_count; i++) {
        char what[64];
        int pidfd = (int)syscall(SYS_pidfd_open, keepers[i], 0);
        int error_number = errno;
        name_it(what, sizeof what, "pidfd_getfd", keepers[i]);
        if (pidfd < 0) {
            report("C07.getfd", what, HELD, error_number, "no pidfd");
            continue;
        }
        for (int fd = 0; fd < 16; fd++) {
            long rc = syscall(SYS_pidfd_getfd, pidfd, fd, 0);
            if (rc >= 0 || errno == EBADF || fd == 15) {
                report_reach("C07.getfd", what, rc, past_the_filter);
                break;
            }
        }
        name_it(what, sizeof what, "pidfd_send_signal", keepers[i]);
        report_refusal("C07.pidfd_signal", what, syscall(SYS_pidfd_send_signal, pidfd, SIGWINCH, NULL, 0));
        static const int namespaces = CLONE_NEWNS;
        name_it(what, sizeof what, "setns(pidfd)", keepers[i]);
        report_refusal("C07.setns", what, setns(pidfd, namespaces));
        name_it(what, sizeof what, "process_madvise", keepers[i]);
        struct iovec page = {(void *)((size_t)&landmark & ~4095UL), 4096};
        report_reach("C07.madvise", what, syscall(SYS_process_madvise, pidfd, &page, 1, 20, 0), past_the_filter);
        close(pidfd);
    }
}

static void limits(void) {
    find_keepers();
    for (size_t i = 0; i < keeper_count; i++) {
        char what[64], path[64], text[32];
        struct rlimit64 old;
        name_it(what, sizeof what, "prlimit(NOFILE)", keepers[i]);
        long rc = syscall(SYS_prlimit64, keepers[i], RLIMIT_NOFILE, NULL, &old);
        if (rc == 0)
            rc = syscall(SYS_prlimit64, keepers[i], RLIMIT_NOFILE, &old, NULL);
        report_refusal("C07.prlimit", what, rc);
        snprintf(path, sizeof path, "/proc/%d/oom_score_adj", keepers[i]);
        read_small(path, text, sizeof text);
        int fd = open(path, O_WRONLY);
        report_refusal("C07.oom_score_adj", path, fd < 0 ? -1 : write(fd, text, strlen(text)));
        if (fd >= 0)
            close(fd);
        name_it(what, sizeof what, "setpriority", keepers[i]);
        errno = 0;
        int priority = getpriority(PRIO_PROCESS, (id_t)keepers[i]);
        report_refusal("C07.setpriority", what, setpriority(PRIO_PROCESS, (id_t)keepers[i], priority));
        cpu_set_t set;
        name_it(what, sizeof what, "sched_setaffinity", keepers[i]);
        rc = sched_getaffinity(keepers[i], sizeof set, &set);
        report_refusal("C07.affinity", what, rc < 0 ? rc : sched_setaffinity(keepers[i], sizeof set, &set));
        struct sched_param parameters = {0};
        name_it(what, sizeof what, "sched_setscheduler", keepers[i]);
        report_refusal("C07.scheduler", what, sched_setscheduler(keepers[i], SCHED_OTHER, &parameters));
        name_it(what, sizeof what, "ioprio_set", keepers[i]);
        report_refusal("C07.ioprio", what, syscall(SYS_ioprio_set, 1, keepers[i], 2 << 13 | 4));
        name_it(what, sizeof what, "kcmp", keepers[i]);
        report_refusal("C07.kcmp", what, syscall(SYS_kcmp, keepers[i], getpid(), KCMP_VM, 0, 0));
        name_it(what, sizeof what, "get_robust_list", keepers[i]);
        void *head;
        size_t size;
        report_refusal("C07.robust_list", what, syscall(SYS_get_robust_list, keepers[i], &head, &size));
        name_it(what, sizeof what, "move_pages", keepers[i]);
        report_refusal("C07.move_pages", what, syscall(SYS_move_pages, keepers[i], 0UL, NULL, NULL, NULL, 0));
    }
}

/* Every signal, to process 1 and to the spawner. The spawner of the control is a bystander and may not be killed. */
static void signals(void) {
    find_keepers();
    for (size_t i = 0; i < keeper_count; i++) {
        int accepted = 0, first_errno = 0;
        for (int number = 1; number <= 64; number++) {
            if (settings.bare && keepers[i] != 1 && number != SIGCONT && number != SIGWINCH)
                continue;
            if (syscall(SYS_kill, keepers[i], number) == 0)
                accepted++;
            else if (!first_errno)
                first_errno = errno;
        }
        char what[64];
        name_it(what, sizeof what, "kill with every signal", keepers[i]);
        report(keepers[i] == 1 ? "I01" : "I02", what, accepted ? BREACHED : HELD, first_errno, "%d accepted", accepted);
        name_it(what, sizeof what, "tgkill", keepers[i]);
        report_refusal("I01.tgkill", what, syscall(SYS_tgkill, keepers[i], keepers[i], SIGWINCH));
        siginfo_t info = {.si_signo = SIGWINCH, .si_code = SI_QUEUE};
        name_it(what, sizeof what, "rt_sigqueueinfo", keepers[i]);
        report_refusal("I01.queue", what, syscall(SYS_rt_sigqueueinfo, keepers[i], SIGWINCH, &info));
    }
}

static void inherited_descriptors(void) {
    int usable = 0, first = -1;
    for (int fd = 3; fd < 65536; fd++)
        if (fcntl(fd, F_GETFD) >= 0) {
            /* The pipe end by which the prober tells that an attack is over is its own. */
            char path[64], target[64] = "";
            snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
            ssize_t length = readlink(path, target, sizeof target - 1);
            bool own_pipe = fcntl(fd, F_GETFD) & FD_CLOEXEC && length > 0 && strncmp(target, "pipe:", 5) == 0;
            if (!own_pipe && usable++ == 0)
                first = fd;
        }
    report("I04", "a descriptor above 2", usable ? BREACHED : HELD, usable ? 0 : EBADF, "%d open, first %d", usable, first);
    char buffer = 'x';
    int written = 0;
    for (int fd = 3; fd < 1024; fd++)
        if (!(fcntl(fd, F_GETFD) & FD_CLOEXEC) && write(fd, &buffer, 1) >= 0)
            written++;
    report("I04.write", "write to every descriptor above 2", written ? BREACHED : HELD, written ? 0 : EBADF, "%d took it",
           written);
}

static void inherited_environment(void) {
    for (int i = 0; i < settings.variables.count; i++) {
        const char *value = getenv(settings.variables.item[i]);
        report("I08", settings.variables.item[i], value ? BREACHED : HELD, 0, "%s", value ? "inherited" : "not there");
    }
    int odd = 0;
    char first[64] = "";
    for (char **entry = environ; *entry; entry++)
        if ((strncmp(*entry, "RUNNER_", 7) == 0 || strncmp(*entry, "SANDBOX_INIT", 12) == 0 ||
             strncmp(*entry, "CARGO", 5) == 0 || strncmp(*entry, "NOTIFY_SOCKET", 13) == 0 ||
             strncmp(*entry, "CREDENTIALS_DIRECTORY", 21) == 0) &&
            odd++ == 0)
            snprintf(first, sizeof first, "%.30s", *entry);
    report("I08.runner", "variables of the runner", odd ? BREACHED : HELD, 0, "%d, first %s", odd, first);
}

/* A sandbox has no controlling terminal of the host, and no session or group it shares with the host. */
static void terminal(void) {
    int fd = open("/dev/tty", O_RDWR);
    report("I09", "open(/dev/tty)", fd >= 0 ? BREACHED : HELD, fd < 0 ? errno : 0, "session %d", getsid(0));
}

const struct attack keeper_attacks[] = {
    {"C07.trace", "trace process 1", trace, false},
    {"C07.memory", "memory of process 1", memory, false},
    {"C07.descriptors", "descriptors of process 1", descriptors, false},
    {"C07.limits", "limits of process 1", limits, false},
    {"I01", "signal process 1", signals, false},
    {"I04", "inherited descriptors", inherited_descriptors, false},
    {"I08", "inherited environment", inherited_environment, false},
    {"I09", "controlling terminal", terminal, true},
    {0},
};
