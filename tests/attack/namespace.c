/* N and C: new namespaces, and rights that come back. */
#include "prober.h"

#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static const struct {
    const char *name;
    unsigned long flag;
} kinds[] = {
    {"mnt", CLONE_NEWNS},   {"uts", CLONE_NEWUTS},   {"ipc", CLONE_NEWIPC},       {"pid", CLONE_NEWPID},
    {"net", CLONE_NEWNET},  {"user", CLONE_NEWUSER}, {"cgroup", CLONE_NEWCGROUP}, {"time", 0x80},
};

static void unshare_each(void) {
    for (size_t i = 0; i < COUNT(kinds); i++) {
        char id[16], what[64];
        snprintf(id, sizeof id, "N0%zu", i + 1);
        snprintf(what, sizeof what, "unshare(%s)", kinds[i].name);
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            report_refusal(id, what, unshare((int)kinds[i].flag));
            _exit(0);
        }
        waitpid(child, NULL, 0);
    }
}

static void clone_each(void) {
    for (size_t i = 0; i < COUNT(kinds); i++) {
        char what[64];
        snprintf(what, sizeof what, "clone(%s)", kinds[i].name);
        /* CLONE_NEWTIME shares its bit with the exit signal and exists for unshare and clone3 alone. */
        if (kinds[i].flag == 0x80)
            continue;
        long child = syscall(SYS_clone, kinds[i].flag | SIGCHLD, NULL, NULL, NULL, NULL);
        if (child == 0)
            _exit(0);
        int error_number = errno;
        if (child > 0)
            waitpid((pid_t)child, NULL, 0);
        errno = error_number;
        report_refusal("N09", what, child);
    }
}

static void clone_three(void) {
    /* clone_args of 64 bytes: flags, …, exit_signal at offset 32. */
    unsigned long args[8] = {CLONE_NEWUSER, 0, 0, 0, SIGCHLD, 0, 0, 0};
    long child = syscall(435, args, sizeof args);
    if (child == 0)
        _exit(0);
    int error_number = errno;
    if (child > 0)
        waitpid((pid_t)child, NULL, 0);
    errno = error_number;
    report_refusal("N10", "clone3(user)", child);
    pid_t fallback = fork();
    if (fallback == 0)
        _exit(7);
    int status = 0;
    waitpid(fallback, &status, 0);
    report("N10.fork", "fork still works", WIFEXITED(status) && WEXITSTATUS(status) == 7 ? HELD : FAILED, 0, "status %d",
           status);
}

static void join_each(void) {
    static const char *const of[] = {"/proc/1/ns", "/proc/2/ns", "/proc/self/ns"};
    for (size_t p = 0; p < COUNT(of); p++)
        for (size_t i = 0; i < COUNT(kinds); i++) {
            char path[64];
            snprintf(path, sizeof path, "%s/%s", of[p], kinds[i].name);
            int fd = open(path, O_RDONLY | O_CLOEXEC);
            if (fd < 0) {
                report("N11", path, HELD, errno, "the namespace file cannot be opened");
                continue;
            }
            pid_t child = fork();
            if (child == 0) {
                report_refusal("N11", path, setns(fd, 0));
                _exit(0);
            }
            waitpid(child, NULL, 0);
            close(fd);
        }
}

const struct attack namespace_attacks[] = {
    {"N01", "unshare of each namespace", unshare_each, false},
    {"N09", "clone into each namespace", clone_each, false},
    {"N10", "clone3", clone_three, false},
    {"N11", "setns", join_each, false},
    {0},
};

static unsigned long status_number(const char *key, int base) {
    char text[8192];
    if (read_small("/proc/self/status", text, sizeof text) < 0)
        return ~0UL;
    char *at = strstr(text, key);
    return at ? strtoul(at + strlen(key), NULL, base) : ~0UL;
}

/* Each of these is a way out of a sandbox, or over its limits, by itself. */
static unsigned long dangerous(void) {
    static const int list[] = {CAP_SYS_ADMIN,  CAP_SYS_PTRACE,      CAP_NET_ADMIN, CAP_NET_RAW,  CAP_SYS_MODULE,
                               CAP_SYS_RAWIO,  CAP_DAC_READ_SEARCH, CAP_MKNOD,     CAP_SYS_BOOT, CAP_SYS_TIME,
                               CAP_SYS_RESOURCE, CAP_SETFCAP,       CAP_MAC_ADMIN, CAP_MAC_OVERRIDE, CAP_SYSLOG,
                               CAP_AUDIT_CONTROL, CAP_LINUX_IMMUTABLE, CAP_BPF,    CAP_PERFMON,  CAP_CHECKPOINT_RESTORE};
    unsigned long mask = 0;
    for (size_t i = 0; i < COUNT(list); i++)
        mask |= 1UL << list[i];
    return mask;
}

static void capability_sets(void) {
    static const char *const keys[] = {"CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"};
    for (size_t i = 0; i < COUNT(keys); i++) {
        unsigned long value = status_number(keys[i], 16);
        char id[16];
        snprintf(id, sizeof id, "C01.%.6s", keys[i]);
        report(id, "no capability that leads out", value & dangerous() ? BREACHED : HELD, 0, "%016lx", value);
    }
}

static void regain(void) {
    struct __user_cap_header_struct head = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
    struct __user_cap_data_struct data[2] = {{~0u, ~0u, ~0u}, {0x1ff, 0x1ff, 0x1ff}};
    unsigned long before = status_number("CapEff:", 16);
    long rc = syscall(SYS_capset, &head, data);
    int error_number = errno;
    unsigned long after = status_number("CapEff:", 16);
    report("C02", "capset(everything)", rc == 0 && after & dangerous() ? BREACHED : HELD, rc < 0 ? error_number : 0,
           "effective %lx, then %lx", before, after);
    report_refusal("C02.ambient", "raise an ambient capability",
                   prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_SYS_ADMIN, 0, 0));
    report_refusal("C02.securebits", "prctl(PR_SET_SECUREBITS, 0)", prctl(PR_SET_SECUREBITS, 0, 0, 0, 0));
}

static void irrevocable(void) {
    unsigned long no_new_privs = status_number("NoNewPrivs:", 10), mode = status_number("Seccomp:", 10),
                  filters = status_number("Seccomp_filters:", 10);
    report("C03", "NoNewPrivs", no_new_privs == 1 ? HELD : BREACHED, 0, "%lu", no_new_privs);
    report("C03.seccomp", "Seccomp mode", mode == 2 ? HELD : BREACHED, 0, "%lu", mode);
    report("C03.filters", "two seccomp filters", filters >= 2 ? HELD : BREACHED, 0, "%lu", filters);
    if (no_new_privs == 1)
        report_refusal("C03.clear", "prctl(PR_SET_NO_NEW_PRIVS, 0)", prctl(PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0));
    report_refusal("C03.disable", "prctl(PR_SET_SECCOMP, DISABLED)", prctl(PR_SET_SECCOMP, 0, 0, 0, 0));
}

/* Runs `program gained` as the user `uid`. Its answer is its exit code: 1 when it is somebody else than who started it. */
static void report_set_uid(const char *what, const char *program, uid_t uid) {
    pid_t child = fork();
    if (child == 0) {
        if (uid != geteuid() && (setgroups(0, NULL) < 0 || setresgid(uid, uid, uid) < 0 || setresuid(uid, uid, uid) < 0))
            _exit(4);
        execl(program, program, "gained", (char *)NULL);
        _exit(127);
    }
    int status = 0;
    waitpid(child, &status, 0);
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    enum verdict verdict = code == 1 ? BREACHED : code == 0 ? HELD : code == 4 ? ABSENT : FAILED;
    report("C04.gift", what, verdict, 0, "exit %d", code);
}

/* One that is set-uid for root came with the image; another is made here by whoever is root. */
static void set_uid_gifts(void) {
    if (!settings.set_uid)
        return;
    report_set_uid("set-uid file of root", settings.set_uid, geteuid() == 0 ? 1000 : geteuid());
    char directory[] = "./prober-XXXXXX", path[64], block[65536];
    int from = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (from < 0 || !mkdtemp(directory) || chmod(directory, 0755) < 0) {
        report("C04.gift", "set-uid file made here", FAILED, errno, "no directory to write to");
        return;
    }
    snprintf(path, sizeof path, "%s/gift", directory);
    int to = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0755);
    ssize_t got;
    while ((got = read(from, block, sizeof block)) > 0)
        if (write(to, block, (size_t)got) != got)
            break;
    close(to);
    if (got != 0 || chmod(path, 06755) < 0)
        report("C04.gift", "set-uid file made here", FAILED, errno, "not made");
    else
        report_set_uid("set-uid file made here", path, geteuid() == 0 ? 1000 : geteuid());
    unlink(path);
    rmdir(directory);
}

/* Programs that are set-uid on an ordinary system: run, they must not change who we are. */
static void set_uid_programs(void) {
    static const char *const programs[] = {"/usr/bin/su", "/usr/bin/sudo", "/usr/bin/newuidmap", "/usr/bin/mount",
                                           "/usr/bin/passwd", "/usr/bin/chsh", "/usr/bin/fusermount3"};
    set_uid_gifts();
    for (size_t i = 0; i < COUNT(programs); i++) {
        struct stat info;
        if (stat(programs[i], &info) < 0 || !(info.st_mode & S_ISUID)) {
            report("C04", programs[i], ABSENT, 0, "not here or not set-uid");
            continue;
        }
        pid_t child = fork();
        if (child == 0) {
            int null = open("/dev/null", O_RDWR);
            dup2(null, 0);
            dup2(null, 1);
            dup2(null, 2);
            /* Stopped before main by the tracer-less way: the program waits on a pipe it cannot read. */
            execl(programs[i], programs[i], "--help", (char *)NULL);
            _exit(127);
        }
        char path[64], text[4096];
        unsigned effective = ~0u;
        snprintf(path, sizeof path, "/proc/%d/status", child);
        for (int tries = 0; tries < 200; tries++) {
            if (read_small(path, text, sizeof text) <= 0)
                break;
            char *at = strstr(text, "Uid:");
            unsigned real, now;
            if (at && sscanf(at, "Uid: %u %u", &real, &now) == 2 && (effective == ~0u || now != getuid()))
                effective = now;
            usleep(500);
        }
        waitpid(child, NULL, 0);
        bool gained = effective != ~0u && effective != getuid();
        report("C04", programs[i], gained ? BREACHED : HELD, 0, "effective uid %u", effective);
    }
}

/* Whoever can become process 1's user can also signal it and change its limits. */
static void become_keeper(void) {
    struct stat info;
    if (stat("/proc/1", &info) < 0) {
        report("C05", "setresuid(user of process 1)", HELD, errno, "process 1 is hidden");
    } else {
        int rc = setresuid(info.st_uid, info.st_uid, info.st_uid);
        int error_number = errno;
        bool same = rc == 0 && info.st_uid == 65534;
        /* 65534 is shown for any unmapped user. Taking that number is not taking its identity. */
        if (same && kill(1, 0) < 0)
            report("C05", "setresuid(user of process 1)", HELD, errno, "a different user with the same number");
        else {
            errno = error_number;
            report_refusal("C05", "setresuid(user of process 1)", rc);
        }
    }
    static const unsigned ids[] = {65535, 65536, 4095, 4096, 2013265920u, 4294967294u};
    for (size_t i = 0; i < COUNT(ids); i++) {
        char what[48];
        snprintf(what, sizeof what, "setresuid(%u)", ids[i]);
        pid_t child = fork();
        if (child == 0) {
            long rc = setresuid(ids[i], ids[i], ids[i]);
            int error_number = errno;
            /* An own id of the sandbox is fine as long as process 1 stays out of reach. */
            if (rc == 0 && kill(1, 0) < 0)
                report("C05.id", what, HELD, errno, "process 1 stays out of reach");
            else {
                errno = error_number;
                report_refusal("C05.id", what, rc);
            }
            _exit(0);
        }
        waitpid(child, NULL, 0);
    }
    int fd = open("/proc/self/setgroups", O_WRONLY);
    report_refusal("C06", "write allow to setgroups", fd < 0 ? -1 : write(fd, "allow", 5));
}

const struct attack capability_attacks[] = {
    {"C01", "capability sets", capability_sets, false},
    {"C02", "regain capabilities", regain, false},
    {"C03", "what cannot be taken back", irrevocable, false},
    {"C04", "set-uid programs", set_uid_programs, true},
    {"C05", "become process 1's user", become_keeper, false},
    {0},
};
