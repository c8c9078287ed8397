/* The floor of sandbox creation: the same kernel steps as a full sandbox, and nothing else.
 *
 * What it measures is what no implementation can beat on this machine: one small resident process that makes a user,
 * mount, pid, ipc, uts, cgroup and network namespace with one clone3 into a new cgroup, mounts an overlay, /proc, /dev
 * and /tmp, pivots, applies landlock and a seccomp filter and executes a static `true`. A benchmark runs it in the
 * same seconds as the product, so that a ratio can be taken; its absolute times say nothing about another machine.
 *
 *   floor create  [--net fresh|pooled] [--rounds N] [--pace MS] [--creators N]
 *   floor kill    [--sleepers N] [--rounds N]
 *   floor compare [--rounds N] [-- NAME PROGRAM [ARGUMENT...]]...
 *   floor serve
 *
 * `create` and `kill` print one JSON object. `compare` goes round-robin through both kinds of network namespace and
 * the given commands and prints one object per line, without ratios when others used more than 15 % of the
 * processors. `serve` reads the words fresh, pooled or kill, one per line, and answers each with
 * "READY_US REAP_US DOWN_US CYCLE_US", so that another program can interleave it with its own work; for kill, REAP_US
 * is the time from the signal to the end of 200 sleeping processes. Three more words are for what is not a creation:
 * `hop` answers with the microseconds that a message to another process and its answer take over a packet socket,
 * `hold` makes one more sandbox that stays (a static process 1 and a bash that waits for a command), `drop` ends these.
 *
 * Needs root. Mounts live in a private mount namespace and its cgroups below one of its own, so nothing stays behind.
 * It is a measuring instrument, not a sandbox: no id ranges of its own, no masks, no second user namespace.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/landlock.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ID_BASE 1900000000u
#define ID_COUNT 65536u
#define POOL 32
#define MAX_PEERS 16
#define MAX_HELD 1024
/* Instead of a number of sleepers: a bash. */
#define SHELL (-1)
#define FOREIGN_LIMIT_PERCENT 15.0
#define WORK "/mnt"

static char cgroup_root[512];
static pid_t owner;

/* Removes the cgroups; only in the process that made them, and only when they are empty. */
static void clean_up(void) {
    char path[1024];
    if (getpid() != owner) return;
    DIR *directory = opendir(cgroup_root);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        snprintf(path, sizeof path, "%s/%s", cgroup_root, entry->d_name);
        if (entry->d_type == DT_DIR && entry->d_name[0] != '.') (void)rmdir(path);
    }
    (void)rmdir(cgroup_root);
}

static _Noreturn void die(const char *format, ...) {
    int code = errno;
    va_list arguments;
    va_start(arguments, format);
    fputs("floor: ", stderr);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, ": %s\n", strerror(code));
    clean_up();
    _exit(125);
}

static void check(int ok, const char *what) {
    if (!ok) die("%s", what);
}

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void write_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) != (ssize_t)strlen(text)) die("write %s", path);
    close(fd);
}

/* The machine around the measurement: a ratio is worth nothing without it. */

struct machine {
    double busy_s, own_s, at_s;
};

static double cpu_busy_s(void) {
    unsigned long long user, nice, system, idle, iowait, irq, softirq, steal;
    FILE *stat = fopen("/proc/stat", "re");
    if (!stat || fscanf(stat, "cpu %llu %llu %llu %llu %llu %llu %llu %llu", &user, &nice, &system, &idle, &iowait, &irq,
                        &softirq, &steal) != 8)
        die("read /proc/stat");
    fclose(stat);
    return (double)(user + nice + system + irq + softirq + steal) / (double)sysconf(_SC_CLK_TCK);
}

static double own_cpu_s(void) {
    double total = 0;
    int who[2] = {RUSAGE_SELF, RUSAGE_CHILDREN};
    for (int i = 0; i < 2; i++) {
        struct rusage u;
        getrusage(who[i], &u);
        total += (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
    }
    return total;
}

static struct machine machine_now(void) {
    return (struct machine){cpu_busy_s(), own_cpu_s(), now_us() / 1e6};
}

/* Share of all processors that others used since `before`, in percent. The kernel's own clean-up work counts as theirs. */
static double foreign_percent(struct machine before) {
    struct machine after = machine_now();
    double span = (after.at_s - before.at_s) * (double)sysconf(_SC_NPROCESSORS_ONLN);
    double foreign = (after.busy_s - before.busy_s) - (after.own_s - before.own_s);
    return span <= 0 || foreign < 0 ? 0 : 100 * foreign / span;
}

static void print_machine(struct machine before) {
    long available_kib = 0;
    int running = 0, processes = 0;
    char line[256];
    FILE *f = fopen("/proc/meminfo", "re");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %ld", &available_kib) == 1) break;
    if (f) fclose(f);
    f = fopen("/proc/loadavg", "re");
    if (!f || fscanf(f, "%*s %*s %*s %d/%d", &running, &processes) != 2) processes = -1;
    if (f) fclose(f);
    printf("\"foreign_cpu_percent\":%.1f,\"tasks\":%d,\"available_mib\":%ld", foreign_percent(before), processes,
           available_kib / 1024);
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_percentiles(const char *name, double *values, int count) {
    qsort(values, (size_t)count, sizeof *values, by_value);
    printf("\"%s_us\":{\"p50\":%.0f,\"p90\":%.0f,\"p99\":%.0f}", name, values[count / 2], values[count * 9 / 10],
           values[count * 99 / 100]);
}

/* Preparation, once: what a resident launcher has ready. */

static int home_net = -1, pool_net[POOL], pool_next;

static void find_cgroup2(char *out, size_t size) {
    char line[4096], path[400];
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    check(mounts != NULL, "open /proc/self/mountinfo");
    while (fgets(line, sizeof line, mounts))
        if (strstr(line, " - cgroup2 ") && sscanf(line, "%*s %*s %*s %*s %399s", path) == 1) {
            snprintf(out, size, "%s", path);
            fclose(mounts);
            return;
        }
    errno = ENOENT;
    die("no cgroup2 mount");
}

static void loopback_up(void) {
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (s < 0 || ioctl(s, SIOCSIFFLAGS, &request)) die("lo up");
    close(s);
}

static void device(const char *name, unsigned major_number, unsigned minor_number) {
    char path[256];
    snprintf(path, sizeof path, WORK "/dev/%s", name);
    check(mknod(path, S_IFCHR | 0666, makedev(major_number, minor_number)) == 0, path);
    check(chmod(path, 0666) == 0, path);
}

static void copy_self(const char *to) {
    char buffer[65536];
    ssize_t n;
    int in = open("/proc/self/exe", O_RDONLY | O_CLOEXEC), out = open(to, O_WRONLY | O_CREAT | O_CLOEXEC, 0755);
    check(in >= 0 && out >= 0, to);
    while ((n = read(in, buffer, sizeof buffer)) > 0) check(write(out, buffer, (size_t)n) == n, to);
    close(in);
    close(out);
}

static void prepare(void) {
    struct rlimit files = {65536, 65536};
    (void)setrlimit(RLIMIT_NOFILE, &files);
    check(unshare(CLONE_NEWNS) == 0, "unshare mounts (root is needed)");
    check(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0, "make mounts private");
    check(mount("floor", WORK, "tmpfs", 0, "mode=755") == 0, "mount tmpfs");
    const char *directories[] = {WORK "/lower",     WORK "/lower/bin",     WORK "/lower/proc", WORK "/lower/dev",
                                 WORK "/lower/tmp", WORK "/lower/dev/pts", WORK "/dev",
                                 WORK "/lower/usr"};
    for (size_t i = 0; i < sizeof directories / sizeof *directories; i++)
        check(mkdir(directories[i], 0755) == 0, directories[i]);
    copy_self(WORK "/lower/bin/true");
    check(symlink("usr/lib", WORK "/lower/lib") == 0 && symlink("usr/lib64", WORK "/lower/lib64") == 0, "link libraries");
    device("null", 1, 3);
    device("zero", 1, 5);
    device("full", 1, 7);
    device("random", 1, 8);
    device("urandom", 1, 9);
    device("tty", 5, 0);

    char base[400];
    find_cgroup2(base, sizeof base);
    snprintf(cgroup_root, sizeof cgroup_root, "%s/sandbox-floor-%d", base, getpid());
    check(mkdir(cgroup_root, 0755) == 0, cgroup_root);
    owner = getpid();

    home_net = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    check(home_net >= 0, "open network namespace");
    for (int i = 0; i < POOL; i++) {
        check(unshare(CLONE_NEWNET) == 0, "unshare network");
        loopback_up();
        pool_net[i] = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
        check(pool_net[i] >= 0, "open pooled network namespace");
        check(setns(home_net, CLONE_NEWNET) == 0, "return to the network namespace");
    }
}

/* Inside the sandbox. */

static void restrict_self(void) {
    struct landlock_ruleset_attr attribute = {.handled_access_fs = (1ull << 13) - 1};
    int rules = (int)syscall(SYS_landlock_create_ruleset, &attribute, sizeof attribute, 0);
    check(rules >= 0, "landlock_create_ruleset");
    uint64_t read_execute = LANDLOCK_ACCESS_FS_EXECUTE | LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_READ_DIR;
    struct {
        const char *path;
        uint64_t access;
    } allowed[3] = {{"/", read_execute},
                    {"/tmp", attribute.handled_access_fs},
                    {"/dev", read_execute | LANDLOCK_ACCESS_FS_WRITE_FILE}};
    for (int i = 0; i < 3; i++) {
        struct landlock_path_beneath_attr beneath = {.allowed_access = allowed[i].access,
                                                     .parent_fd = open(allowed[i].path, O_PATH | O_CLOEXEC)};
        check(beneath.parent_fd >= 0, allowed[i].path);
        check(syscall(SYS_landlock_add_rule, rules, LANDLOCK_RULE_PATH_BENEATH, &beneath, 0) == 0, "landlock_add_rule");
        close(beneath.parent_fd);
    }
    check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs");
    check(syscall(SYS_landlock_restrict_self, rules, 0) == 0, "landlock_restrict_self");
    close(rules);

    static const int denied[40] = {
        SYS_mount,         SYS_umount2,       SYS_pivot_root,    SYS_chroot,        SYS_reboot,        SYS_swapon,
        SYS_swapoff,       SYS_init_module,   SYS_finit_module,  SYS_delete_module, SYS_kexec_load,    SYS_bpf,
        SYS_ptrace,        SYS_perf_event_open, SYS_keyctl,      SYS_add_key,       SYS_request_key,   SYS_unshare,
        SYS_setns,         SYS_open_by_handle_at, SYS_name_to_handle_at, SYS_userfaultfd, SYS_acct,    SYS_quotactl,
        SYS_settimeofday,  SYS_clock_settime, SYS_clock_adjtime, SYS_adjtimex,      SYS_syslog,        SYS_vhangup,
        SYS_move_mount,    SYS_open_tree,     SYS_fsopen,        SYS_fsconfig,      SYS_fsmount,       SYS_fspick,
        SYS_mount_setattr, SYS_process_vm_readv, SYS_process_vm_writev, SYS_io_uring_setup};
    struct sock_filter program[44];
    unsigned short n = 0;
    program[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < 40; i++)
        program[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)denied[i], (unsigned char)(40 - i), 0);
    program[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    program[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM);
    struct sock_fprog filter = {n, program};
    check(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0) == 0, "seccomp");
}

struct place {
    char upper[128], work[128], root[128], cgroup[600];
};

static _Noreturn void inside(const struct place *place, int go, int report, int fresh_net, int sleepers) {
    char byte, options[512];
    check(read(go, &byte, 1) == 1, "wait for the id map");
    check(setgroups(0, NULL) == 0 && setresgid(0, 0, 0) == 0 && setresuid(0, 0, 0) == 0, "take the ids");
    check(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0, "private mounts");
    snprintf(options, sizeof options, "lowerdir=" WORK "/lower,upperdir=%s,workdir=%s,volatile,userxattr", place->upper,
             place->work);
    check(mount("overlay", place->root, "overlay", 0, options) == 0, "mount overlay");
    check(chdir(place->root) == 0, place->root);
    check(mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) == 0, "mount proc");
    check(mount(WORK "/dev", "dev", NULL, MS_BIND, NULL) == 0, "bind dev");
    check(mount("tmp", "tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=64m,mode=1777") == 0, "mount tmp");
    if (sleepers == SHELL) check(mount("/usr", "usr", NULL, MS_BIND | MS_REC, NULL) == 0, "bind usr");
    check(syscall(SYS_pivot_root, ".", ".") == 0, "pivot_root");
    check(umount2(".", MNT_DETACH) == 0 && chdir("/") == 0, "leave the old root");
    if (fresh_net) loopback_up();
    check(sethostname("sandbox", 7) == 0, "sethostname");
    restrict_self();
    char count[16];
    snprintf(count, sizeof count, "%d", sleepers);
    char *arguments[] = {"true", NULL, NULL};
    char *environment[] = {NULL};
    if (sleepers) {
        arguments[0] = sleepers == SHELL ? "holder" : "sleepers";
        arguments[1] = count;
        check(dup2(report, 3) == 3 && fcntl(3, F_SETFD, 0) == 0, "pass the report pipe");
    }
    execve("/bin/true", arguments, environment);
    die("exec");
}

struct times {
    double ready, reap, down, cycle;
};

/* A sandbox that has executed, or that holds what it was told to hold. */
struct sandbox {
    struct place place;
    pid_t pid;
    int child_fd, cgroup, go, report;
};

static struct sandbox begin(int worker, int fresh_net, int sleepers) {
    static unsigned serial;
    struct sandbox sandbox = {.child_fd = -1};
    struct place *place = &sandbox.place;
    int go[2], report[2];
    char text[64], path[64], byte;

    serial++;
    snprintf(place->upper, sizeof place->upper, WORK "/u%d-%u", worker, serial);
    snprintf(place->work, sizeof place->work, WORK "/w%d-%u", worker, serial);
    snprintf(place->root, sizeof place->root, WORK "/r%d-%u", worker, serial);
    snprintf(place->cgroup, sizeof place->cgroup, "%s/%d-%u", cgroup_root, worker, serial);
    check(mkdir(place->upper, 0755) == 0 && mkdir(place->work, 0755) == 0 && mkdir(place->root, 0755) == 0, "make directories");
    check(chown(place->upper, ID_BASE, ID_BASE) == 0 && chown(place->work, ID_BASE, ID_BASE) == 0, "give directories away");
    check(mkdir(place->cgroup, 0755) == 0, place->cgroup);
    sandbox.cgroup = open(place->cgroup, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    check(sandbox.cgroup >= 0 && pipe2(go, O_CLOEXEC) == 0 && pipe2(report, O_CLOEXEC) == 0, "open cgroup and pipes");

    struct clone_args arguments = {
        .flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP | CLONE_PIDFD |
                 CLONE_INTO_CGROUP | (fresh_net ? CLONE_NEWNET : 0),
        .exit_signal = SIGCHLD,
        .pidfd = (uint64_t)(uintptr_t)&sandbox.child_fd,
        .cgroup = (uint64_t)sandbox.cgroup,
    };
    if (!fresh_net) check(setns(pool_net[pool_next++ % POOL], CLONE_NEWNET) == 0, "enter a pooled network namespace");
    sandbox.pid = (pid_t)syscall(SYS_clone3, &arguments, sizeof arguments);
    check(sandbox.pid >= 0, "clone3");
    if (sandbox.pid == 0) inside(place, go[0], report[1], fresh_net, sleepers);
    if (!fresh_net) check(setns(home_net, CLONE_NEWNET) == 0, "return to the network namespace");
    close(report[1]);
    close(go[0]);

    snprintf(text, sizeof text, "0 %u %u\n", ID_BASE, ID_COUNT);
    snprintf(path, sizeof path, "/proc/%d/uid_map", sandbox.pid);
    write_file(path, text);
    snprintf(path, sizeof path, "/proc/%d/gid_map", sandbox.pid);
    write_file(path, text);
    check(write(go[1], "g", 1) == 1, "let the child go");

    /* End of file when exec closed the pipe; with something to hold, one byte when all of it is there. */
    ssize_t n = read(report[0], &byte, 1);
    check(sleepers ? n == 1 : n == 0, "wait for exec");
    sandbox.go = go[1];
    sandbox.report = report[0];
    return sandbox;
}

static void await_end(const struct sandbox *sandbox, int killed) {
    int status;
    if (killed) check(kill(sandbox->pid, SIGKILL) == 0, "kill");
    check(waitpid(sandbox->pid, &status, 0) == sandbox->pid, "wait");
    if (!killed && status != 0) {
        errno = ECHILD;
        die("the sandbox ended with status %#x", status);
    }
}

static void take_down(const struct sandbox *sandbox) {
    const struct place *place = &sandbox->place;
    close(sandbox->child_fd);
    close(sandbox->cgroup);
    close(sandbox->go);
    close(sandbox->report);
    check(rmdir(place->cgroup) == 0, place->cgroup);
    /* What overlay leaves in its work directory; a volatile mount says so with a file. */
    static const char *const left[] = {"work/incompat/volatile/dirty", "work/incompat/volatile", "work/incompat", "work"};
    for (size_t i = 0; i < sizeof left / sizeof *left; i++) {
        char inner[200];
        snprintf(inner, sizeof inner, "%s/%s", place->work, left[i]);
        check(remove(inner) == 0, inner);
    }
    check(rmdir(place->work) == 0 && rmdir(place->upper) == 0 && rmdir(place->root) == 0, "remove directories");
}

/* One sandbox, from nothing to nothing. With sleepers, `reap` is the time from the kill to the end. */
static struct times one(int worker, int fresh_net, int sleepers) {
    double t0 = now_us();
    struct sandbox sandbox = begin(worker, fresh_net, sleepers);
    double t1 = now_us();
    await_end(&sandbox, sleepers != 0);
    double t2 = now_us();
    take_down(&sandbox);
    double t3 = now_us();
    return (struct times){t1 - t0, t2 - t1, t3 - t2, t3 - t0};
}

static struct sandbox held[MAX_HELD];
static int held_count;

static void hold(void) {
    errno = ENOSPC;
    check(held_count < MAX_HELD, "hold more");
    held[held_count] = begin(0, 1, SHELL);
    held_count++;
}

static void drop(void) {
    for (int i = 0; i < held_count; i++) {
        await_end(&held[i], 1);
        take_down(&held[i]);
    }
    held_count = 0;
}

/* A message to a process of its own and the answer, as packets; the process is made at the first call. */
static double hop_us(void) {
    static int near = -1;
    char packet[128] = {0};
    if (near < 0) {
        int pair[2];
        check(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0, "socketpair");
        pid_t pid = fork();
        check(pid >= 0, "fork the other side");
        if (pid == 0) {
            ssize_t n;
            close(pair[0]);
            while ((n = read(pair[1], packet, sizeof packet)) > 0)
                if (write(pair[1], packet, (size_t)n) != n) break;
            _exit(0);
        }
        close(pair[1]);
        near = pair[0];
        (void)hop_us();
    }
    double start = now_us();
    check(write(near, packet, sizeof packet) == sizeof packet && read(near, packet, sizeof packet) == sizeof packet, "hop");
    return now_us() - start;
}

/* An ordinary command, from spawn to end, for peers. */
static double command_us(char **argv, int *failed) {
    extern char **environ;
    posix_spawn_file_actions_t actions;
    pid_t pid;
    int status;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
    double start = now_us();
    int code = posix_spawnp(&pid, argv[0], &actions, NULL, argv, environ);
    if (code) {
        errno = code;
        die("spawn %s", argv[0]);
    }
    check(waitpid(pid, &status, 0) == pid, "wait for a peer");
    double took = now_us() - start;
    posix_spawn_file_actions_destroy(&actions);
    *failed |= status != 0;
    return took;
}

struct options {
    int rounds, creators, sleepers, pace_ms, fresh_net;
};

static double *samples(int count) {
    double *values = calloc((size_t)count, sizeof *values);
    check(values != NULL, "allocate samples");
    return values;
}

static void sleep_ms(int ms) {
    struct timespec t = {ms / 1000, (long)(ms % 1000) * 1000000};
    while (nanosleep(&t, &t) && errno == EINTR) {}
}

static void create_alone(const struct options *o, int sleepers) {
    double *ready = samples(o->rounds), *reap = samples(o->rounds), *down = samples(o->rounds), *cycle = samples(o->rounds);
    for (int i = 0; i < 5; i++) one(0, o->fresh_net, sleepers);
    struct machine before = machine_now();
    for (int i = 0; i < o->rounds; i++) {
        if (o->pace_ms) sleep_ms(o->pace_ms);
        struct times t = one(0, o->fresh_net, sleepers);
        ready[i] = t.ready, reap[i] = t.reap, down[i] = t.down, cycle[i] = t.cycle;
    }
    printf("{\"what\":\"%s\",\"net\":\"%s\",\"rounds\":%d,\"pace_ms\":%d,\"sleepers\":%d,", sleepers ? "kill" : "create",
           o->fresh_net ? "fresh" : "pooled", o->rounds, o->pace_ms, sleepers);
    print_percentiles("ready", ready, o->rounds);
    putchar(',');
    print_percentiles(sleepers ? "kill" : "reap", reap, o->rounds);
    putchar(',');
    print_percentiles("down", down, o->rounds);
    putchar(',');
    print_percentiles("cycle", cycle, o->rounds);
    putchar(',');
    print_machine(before);
    puts("}");
}

static void create_together(const struct options *o) {
    struct machine before = machine_now();
    double start = now_us();
    for (int worker = 0; worker < o->creators; worker++) {
        pid_t pid = fork();
        check(pid >= 0, "fork");
        if (pid == 0) {
            pool_next = worker * (POOL / o->creators);
            for (int i = 0; i < o->rounds; i++) one(worker, o->fresh_net, 0);
            _exit(0);
        }
    }
    int status, failed = 0;
    for (int worker = 0; worker < o->creators; worker++) {
        check(wait(&status) > 0, "wait for a creator");
        failed |= status;
    }
    double took = (now_us() - start) / 1e6;
    if (failed) {
        errno = ECHILD;
        die("a creator failed");
    }
    printf("{\"what\":\"rate\",\"net\":\"%s\",\"creators\":%d,\"rounds\":%d,\"per_second\":%.1f,", o->fresh_net ? "fresh" : "pooled",
           o->creators, o->rounds * o->creators, (double)(o->rounds * o->creators) / took);
    print_machine(before);
    puts("}");
}

static void compare(const struct options *o, int argc, char **argv) {
    const char *names[MAX_PEERS + 2] = {"floor fresh", "floor pooled"};
    char **commands[MAX_PEERS + 2] = {NULL, NULL};
    double *values[MAX_PEERS + 2];
    int failed[MAX_PEERS + 2] = {0}, count = 2;
    for (int i = 0; i < argc; i++) {
        if (strcmp(argv[i], "--")) continue;
        argv[i] = NULL;
        if (i + 2 >= argc || count == MAX_PEERS + 2) {
            errno = EINVAL;
            die("each -- is followed by a name and a program, at most %d times", MAX_PEERS);
        }
        names[count] = argv[i + 1];
        commands[count++] = &argv[i + 2];
    }
    for (int p = 0; p < count; p++) values[p] = samples(o->rounds);
    struct machine before = machine_now();
    for (int i = -2; i < o->rounds; i++)
        for (int p = 0; p < count; p++) {
            double took = p < 2 ? one(0, p == 0, 0).cycle : command_us(commands[p], &failed[p]);
            if (i >= 0) values[p][i] = took;
        }
    double base = 0, foreign = foreign_percent(before);
    for (int p = 0; p < count; p++) {
        printf("{\"what\":\"%s\",\"rounds\":%d,\"failed\":%s,", names[p], o->rounds, failed[p] ? "true" : "false");
        print_percentiles("cycle", values[p], o->rounds);
        if (p == 0) base = values[0][o->rounds / 2];
        /* On a busy machine a ratio is an accident, so there is none. */
        if (foreign > FOREIGN_LIMIT_PERCENT) printf(",\"ratio_to_floor_fresh\":null,");
        else printf(",\"ratio_to_floor_fresh\":%.2f,", values[p][o->rounds / 2] / base);
        print_machine(before);
        puts("}");
    }
}

static void serve(void) {
    char word[32];
    while (scanf("%31s", word) == 1) {
        int sleepers = strcmp(word, "kill") == 0 ? 200 : 0;
        if (!strcmp(word, "hop")) {
            printf("%.1f\n", hop_us());
        } else if (!strcmp(word, "hold") || !strcmp(word, "drop")) {
            if (word[0] == 'h') hold();
            else drop();
            printf("%d\n", held_count);
        } else if (!sleepers && strcmp(word, "fresh") && strcmp(word, "pooled")) {
            puts("error: say fresh, pooled, kill, hop, hold or drop");
        } else {
            struct times t = one(0, strcmp(word, "pooled") != 0, sleepers);
            printf("%.0f %.0f %.0f %.0f\n", t.ready, t.reap, t.down, t.cycle);
        }
        fflush(stdout);
    }
    drop();
}

/* What a sandbox that is held executes: process 1 and a bash beside it that has run one command. */
static _Noreturn void holder(void) {
    int input[2], output[2];
    char word[8];
    check(pipe2(input, O_CLOEXEC) == 0 && pipe2(output, O_CLOEXEC) == 0, "pipes of the shell");
    pid_t pid = fork();
    check(pid >= 0, "fork the shell");
    if (pid == 0) {
        check(dup2(input[0], 0) == 0 && dup2(output[1], 1) == 1, "give the shell its pipes");
        char *arguments[] = {"bash", "--noprofile", "--norc", NULL};
        char *environment[] = {"PATH=/usr/bin", NULL};
        execve("/usr/bin/bash", arguments, environment);
        die("exec bash");
    }
    close(input[0]);
    close(output[1]);
    check(write(input[1], "echo\n", 5) == 5 && read(output[0], word, sizeof word) == 1, "let the shell say something");
    check(write(3, "r", 1) == 1, "report");
    for (;;) pause();
}

/* What a sandbox that will be killed executes: this same file under another name. Says when all of them sleep. */
static _Noreturn void sleepers(int count) {
    for (int i = 0; i < count; i++) {
        pid_t pid = fork();
        check(pid >= 0, "fork a sleeper");
        if (pid == 0)
            for (;;) pause();
    }
    check(write(3, "r", 1) == 1, "report");
    for (;;) pause();
}

/* Interrupts what waits, which then ends in order: a program that dies of a signal removes no cgroup. */
static void wake(int number) { (void)number; }

int main(int argc, char **argv) {
    const char *slash = argc > 0 ? strrchr(argv[0], '/') : NULL;
    const char *name = slash ? slash + 1 : argc > 0 ? argv[0] : "";
    if (strcmp(name, "true") == 0) return 0;
    if (strcmp(name, "holder") == 0) holder();
    if (strcmp(name, "sleepers") == 0) sleepers(argc > 1 ? atoi(argv[1]) : 0);
    struct options o = {.rounds = 100, .creators = 1, .sleepers = 200, .fresh_net = 1};
    const char *mode = argc > 1 ? argv[1] : "";
    int i = 2;
    for (; i < argc && strcmp(argv[i], "--"); i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : "";
        int *number = !strcmp(argv[i], "--rounds")     ? &o.rounds
                      : !strcmp(argv[i], "--creators") ? &o.creators
                      : !strcmp(argv[i], "--sleepers") ? &o.sleepers
                      : !strcmp(argv[i], "--pace")     ? &o.pace_ms
                                                       : NULL;
        if (number && atoi(value) > 0) {
            *number = atoi(value);
        } else if (!strcmp(argv[i], "--net") && (!strcmp(value, "fresh") || !strcmp(value, "pooled"))) {
            o.fresh_net = !strcmp(value, "fresh");
        } else {
            fprintf(stderr, "floor: bad option %s %s\n", argv[i], value);
            return 2;
        }
        i++;
    }
    if (strcmp(mode, "create") && strcmp(mode, "kill") && strcmp(mode, "compare") && strcmp(mode, "serve")) {
        fputs("usage: floor create|kill|compare|serve [options]; see the head of floor.c\n", stderr);
        return 2;
    }
    if (o.creators > POOL) o.creators = POOL;
    setvbuf(stdout, NULL, _IOFBF, 0);
    prepare();
    atexit(clean_up);
    /* SIGPIPE as well: whoever started this may be gone in the middle of an answer. A program executed from here is not
       affected, because handlers do not survive execve. */
    struct sigaction action = {.sa_handler = wake};
    for (int k = 0; k < 4; k++) sigaction((int[]){SIGTERM, SIGINT, SIGHUP, SIGPIPE}[k], &action, NULL);
    if (!strcmp(mode, "serve")) serve();
    else if (!strcmp(mode, "compare")) compare(&o, argc - i, argv + i);
    else if (!strcmp(mode, "kill")) create_alone(&o, o.sleepers);
    else if (o.creators > 1) fflush(stdout), create_together(&o);
    else create_alone(&o, 0);
    return 0;
}
