/*
 * S: system calls that agents do not need. The arguments are invalid in a way that only the kernel's own code notices,
 * after its checks of rights; so the errno tells who refused.
 */
#include "prober.h"

#include <fcntl.h>
#include <poll.h>
#include <linux/keyctl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define ALL -1L

struct row {
    const char *id;
    const char *call;
    long number;
    long argument[6];
    int proof[5];
    bool sandbox_only;
};

static char small_buffer[64];

static void run_rows(const struct row *rows, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const struct row *row = &rows[i];
        if (settings.bare && row->sandbox_only)
            continue;
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            const long *a = row->argument;
            report_reach(row->id, row->call, syscall(row->number, a[0], a[1], a[2], a[3], a[4], a[5]), row->proof);
            _exit(0);
        }
        int status = 0;
        waitpid(child, &status, 0);
        if (WIFSIGNALED(status))
            report(row->id, row->call, WTERMSIG(status) == SIGSYS ? HELD : FAILED, 0, "killed by signal %d",
                   WTERMSIG(status));
    }
}

static void refused_calls(void) {
    const struct row rows[] = {
        {"S01.setup", "io_uring_setup", 425, {1, 0}, {EFAULT}, false},
        {"S01.enter", "io_uring_enter", 426, {ALL}, {EBADF, EINVAL}, false},
        {"S01.register", "io_uring_register", 427, {ALL, ALL}, {EBADF, EINVAL}, false},
        {"S02", "bpf", SYS_bpf, {ALL, ALL, 16}, {EINVAL, EFAULT}, false},
        {"S03", "perf_event_open", SYS_perf_event_open, {ALL, 0, -1, -1, 0}, {EFAULT, EINVAL}, false},
        {"S04", "userfaultfd", SYS_userfaultfd, {1 | O_CLOEXEC}, {EINVAL}, false},
        {"S05.add_key", "add_key", SYS_add_key, {(long)"user", (long)"prober", (long)"x", 1, KEY_SPEC_PROCESS_KEYRING}, {0}, false},
        {"S05.request_key", "request_key", SYS_request_key, {ALL, ALL, 0, 0}, {EFAULT}, false},
        {"S05.keyctl", "keyctl(get session keyring)", SYS_keyctl, {KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 0}, {ENOKEY}, false},
        {"S06.kexec_load", "kexec_load", SYS_kexec_load, {0, ALL, ALL, 0}, {EINVAL, EFAULT}, false},
        {"S06.kexec_file_load", "kexec_file_load", 320, {ALL, ALL, 0, 0, ALL}, {EINVAL, EBADF}, false},
        {"S06.init_module", "init_module", SYS_init_module, {0, 0, 0}, {ENOEXEC, EFAULT}, false},
        {"S06.finit_module", "finit_module", SYS_finit_module, {ALL, 0, ALL}, {EINVAL, EBADF}, false},
        {"S06.delete_module", "delete_module", SYS_delete_module, {ALL, ALL}, {EFAULT}, false},
        {"S07", "reboot", SYS_reboot, {0, 0, 0}, {EINVAL}, false},
        {"S08.swapon", "swapon", SYS_swapon, {ALL, 0x7fff0000}, {EINVAL, EFAULT}, false},
        {"S08.swapoff", "swapoff", SYS_swapoff, {ALL}, {EFAULT}, false},
        {"S09.mount", "mount", SYS_mount, {ALL, ALL, ALL, 0, 0}, {EFAULT}, false},
        {"S09.umount2", "umount2", SYS_umount2, {ALL, 0x7000}, {EINVAL, EFAULT}, false},
#ifdef SYS_iopl
        {"S10.iopl", "iopl", SYS_iopl, {4}, {EINVAL}, false},
        {"S10.ioperm", "ioperm", SYS_ioperm, {0x10000, 1, 1}, {EINVAL}, false},
        {"S10.modify_ldt", "modify_ldt", SYS_modify_ldt, {0, (long)small_buffer, 16}, {0}, false},
#endif
        {"S11.quotactl", "quotactl", SYS_quotactl, {ALL, ALL, 0, 0}, {EINVAL, EFAULT, ENOTBLK}, false},
        {"S11.acct", "acct", SYS_acct, {ALL}, {EFAULT}, false},
        {"S12.init", "fanotify_init", SYS_fanotify_init, {0, 0}, {EINVAL}, false},
        {"S12.mark", "fanotify_mark", SYS_fanotify_mark, {ALL, 0, 0, 0, 0}, {EINVAL, EBADF}, false},
        {"S13.memfd_secret", "memfd_secret", 447, {ALL}, {EINVAL}, false},
        {"S13.move_pages", "move_pages", SYS_move_pages, {0, 0, 0, 0, 0, 0}, {EINVAL}, false},
        {"S13.migrate_pages", "migrate_pages", SYS_migrate_pages, {0, ALL, ALL, ALL}, {EINVAL, EFAULT}, false},
        {"S13.mbind", "mbind", SYS_mbind, {1, 0, 0, 0, 0, 0}, {EINVAL}, false},
        {"S14.getfd", "pidfd_getfd", SYS_pidfd_getfd, {ALL, 0, 0}, {EBADF}, false},
        {"S15.setns", "setns", SYS_setns, {ALL, 0}, {EBADF, EINVAL}, false},
        {"S15.unshare", "unshare(user)", SYS_unshare, {CLONE_NEWUSER}, {EINVAL, ENOSPC, EUSERS}, false},
        {"S16.tiocsti", "ioctl(TIOCSTI)", SYS_ioctl, {ALL, 0x5412, 0}, {EBADF}, false},
        {"S16.high", "ioctl(TIOCSTI with high bits)", SYS_ioctl, {ALL, 0x5412 | 1L << 32, 0}, {EBADF}, false},
        {"S16.tioclinux", "ioctl(TIOCLINUX)", SYS_ioctl, {ALL, 0x541c, 0}, {EBADF}, false},
        {"S17.personality", "personality(READ_IMPLIES_EXEC)", SYS_personality, {READ_IMPLIES_EXEC}, {0}, false},
        {"S17.high", "personality with high bits", SYS_personality, {0x0400000 | 1L << 33}, {0}, false},
        {"S18", "seccomp(NEW_LISTENER)", SYS_seccomp, {1, 8, ALL}, {EFAULT}, false},
        {"S22.syslog", "syslog(size of the buffer)", SYS_syslog, {10, 0, 0}, {0}, false},
        {"S22.settimeofday", "settimeofday(nothing)", SYS_settimeofday, {0, 0}, {EINVAL}, false},
        {"S22.clock_settime", "clock_settime", SYS_clock_settime, {0, ALL}, {EFAULT}, false},
        {"S22.sethostname", "sethostname", SYS_sethostname, {ALL, 4}, {EFAULT}, false},
        {"S22.setdomainname", "setdomainname", SYS_setdomainname, {ALL, 4}, {EFAULT}, false},
        {"S22.vhangup", "vhangup", SYS_vhangup, {0}, {0}, true},
#ifdef SYS_ustat
        {"S22.ustat", "ustat", SYS_ustat, {0, ALL}, {EINVAL, EFAULT}, false},
        {"S22.sysfs", "sysfs", SYS_sysfs, {3, 0, 0}, {EINVAL}, false},
#endif
        /* Its requests are counted for the whole machine, so that one caller can take them from everybody. */
        {"S23", "io_setup", SYS_io_setup, {1, ALL}, {EFAULT, EAGAIN}, false},
        {"S20", "system call 9999", 9999, {0}, {EINVAL, EFAULT, EPERM}, false},
    };
    run_rows(rows, COUNT(rows));
}

/* The second system call tables of x86_64: a filter that looks at numbers alone is blind there. */
static void other_tables(void) {
#ifdef __x86_64__
    static const int proof[] = {EPERM, EINVAL, EFAULT, 0};
    report_reach("S21.x32", "getpid of the x32 table", syscall(0x40000000L + SYS_getpid), proof);
    pid_t child = fork();
    if (child == 0) {
        long result = 20; /* getpid of the i386 table */
        __asm__ volatile("int $0x80" : "+a"(result) : : "memory");
        _exit(result == getpid() ? 1 : 2);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status))
        report("S21.i386", "int 0x80", WTERMSIG(status) == SIGSEGV && settings.bare ? ABSENT : HELD, 0, "killed by signal %d",
               WTERMSIG(status));
    else
        report("S21.i386", "int 0x80", WEXITSTATUS(status) == 1 ? BREACHED : HELD, 0, "exit %d", WEXITSTATUS(status));
#endif
}

/* An anonymous program may run; it must not have more rights than a file. */
static void anonymous_program(void) {
    int fd = (int)syscall(SYS_memfd_create, "prober", 0);
    int self = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || self < 0) {
        report("S19", "execute a memfd", fd < 0 ? HELD : FAILED, errno, "no program to copy");
        return;
    }
    char buffer[65536];
    ssize_t got;
    while ((got = read(self, buffer, sizeof buffer)) > 0)
        if (write(fd, buffer, (size_t)got) != got)
            _exit(3);
    close(self);
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    /* The copy tries the shortest way out and reports under its own rows. */
    char *arguments[] = {(char *)"prober", (char *)"only", (char *)"C03", NULL};
    char *nothing[] = {NULL};
    execve(path, arguments, nothing);
    report("S19", "execute a memfd", HELD, errno, "refused");
}

/* A process may trace its own children; the filters and the landlock domain stay with both. */
static void limits_raised(void) {
    struct rlimit limit;
    static const struct {
        const char *id;
        int resource;
    } list[] = {{"R17.core", RLIMIT_CORE}, {"R15.memlock", RLIMIT_MEMLOCK}, {"R15.nofile", RLIMIT_NOFILE},
                {"R15.msgqueue", RLIMIT_MSGQUEUE}, {"R15.rtprio", RLIMIT_RTPRIO}, {"R15.nice", RLIMIT_NICE}};
    for (size_t i = 0; i < COUNT(list); i++) {
        if (getrlimit((__rlimit_resource_t)list[i].resource, &limit) < 0)
            continue;
        struct rlimit higher = {limit.rlim_max, limit.rlim_max == RLIM_INFINITY ? RLIM_INFINITY : limit.rlim_max + 1};
        if (limit.rlim_max == RLIM_INFINITY)
            report(list[i].id, "no limit at all", BREACHED, 0, "unlimited");
        else
            report_refusal(list[i].id, "raise a hard limit", setrlimit((__rlimit_resource_t)list[i].resource, &higher));
    }
}

const struct attack syscall_attacks[] = {
    {"S01", "calls without use for agents", refused_calls, false},
    {"S21", "other call tables", other_tables, false},
    {"S19", "anonymous programs", anonymous_program, false},
    {"R15", "hard limits", limits_raised, false},
    {0},
};

/* Calls that end, replace or suspend the caller whatever their arguments are, and so say nothing by an errno. */
static bool cannot_be_scanned(long number) {
    switch (number) {
    case SYS_exit:
    case SYS_exit_group:
    case SYS_rt_sigreturn:
#ifdef SYS_vfork
    case SYS_vfork: /* the child would return on the parent's stack */
#endif
#ifdef SYS_pause
    case SYS_pause:
#endif
        return true;
    default:
        return false;
    }
}

/* futex answers ENOSYS for an unknown operation, which looks like a filter; zeros are a plain EFAULT. */
static long scan_argument(long number) { return number == SYS_futex ? 0 : -1; }

int scan_table(long first, long last) {
    for (long number = first; number <= last; number++) {
        if (cannot_be_scanned(number)) {
            dprintf(STDOUT_FILENO, "{\"nr\":%ld,\"outcome\":\"skipped\",\"errno\":0}\n", number);
            continue;
        }
        int answer[2];
        if (pipe2(answer, O_CLOEXEC) < 0)
            return 3;
        pid_t child = fork();
        if (child < 0)
            return 3;
        if (child == 0) {
            pid_t self = getpid();
            long a = scan_argument(number);
            errno = 0;
            long rc = syscall(number, a, a, a, a, a, a);
            int error_number = rc < 0 ? errno : 0;
            /* fork and clone come back twice. By raw call: a cached or fake value must not mislead. */
            if (syscall(SYS_getpid) != self)
                _exit(0);
            _exit(write(answer[1], &error_number, sizeof error_number) == sizeof error_number ? 0 : 3);
        }
        close(answer[1]);
        struct pollfd wait_for = {.fd = answer[0], .events = POLLIN};
        int error_number = 0, status = 0;
        bool answered = poll(&wait_for, 1, 2000) > 0 && read(answer[0], &error_number, sizeof error_number) == sizeof error_number;
        if (!answered)
            kill(child, SIGKILL);
        waitpid(child, &status, 0);
        close(answer[0]);
        const char *outcome = answered                                            ? "returned"
                              : WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS ? "killed"
                              : WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL ? "waited"
                                                                                   : "ended";
        dprintf(STDOUT_FILENO, "{\"nr\":%ld,\"outcome\":\"%s\",\"errno\":%d}\n", number, outcome, error_number);
    }
    return 0;
}
