/*
 * R and the odd process shapes: attacks on quantities. Every one has a bound of its own, so that a sandbox without
 * limits costs the host a little and not everything.
 */
#include "prober.h"

#include <dirent.h>
#include <fcntl.h>
#include <mqueue.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define MIB (1024L * 1024L)

/* forkbomb MAX: as many sleeping children as the limit lets, then ends them. */
static int fork_bomb(long bound) {
    pid_t *children = calloc((size_t)bound, sizeof *children);
    long made = 0;
    int error_number = 0;
    for (; children && made < bound; made++) {
        pid_t child = fork();
        if (child < 0) {
            error_number = errno;
            break;
        }
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (;;)
                pause();
        }
        children[made] = child;
    }
    for (long i = 0; i < made; i++)
        kill(children[i], SIGKILL);
    while (wait(NULL) > 0)
        ;
    report("R01", "fork bomb", made == bound ? BREACHED : HELD, error_number, "%ld", made);
    return 0;
}

/* memory MIB: touches memory until it is killed or the bound is reached. */
static int memory_bomb(long bound) {
    for (long done = 0; done < bound; done += 4) {
        char *piece = mmap(NULL, (size_t)(4 * MIB), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (piece == MAP_FAILED) {
            report("R02", "memory bomb", HELD, errno, "%ld", done);
            return 0;
        }
        for (long at = 0; at < 4 * MIB; at += 4096)
            piece[at] = 1;
    }
    report("R02", "memory bomb", BREACHED, 0, "%ld", bound);
    return 0;
}

/* sharedmemory MIB: System V segments, which outlive their maker. */
static int shared_memory(long bound) {
    for (long done = 0; done < bound; done += 16) {
        int segment = shmget(IPC_PRIVATE, (size_t)(16 * MIB), IPC_CREAT | 0600);
        char *piece = segment < 0 ? (char *)-1 : shmat(segment, NULL, 0);
        if (piece == (char *)-1) {
            report("R11", "shared memory", HELD, errno, "%ld", done);
            return 0;
        }
        for (long at = 0; at < 16 * MIB; at += 4096)
            piece[at] = 1;
    }
    report("R11", "shared memory", BREACHED, 0, "%ld", bound);
    return 0;
}

/* fill DIRECTORY MIB: one growing file. The file stays until the sandbox goes, as an attacker's would. */
static int fill(const char *directory, long bound) {
    char path[512];
    static char block[1 << 20];
    memset(block, 'x', sizeof block);
    snprintf(path, sizeof path, "%s/prober-fill", directory);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (fd < 0) {
        report("R04", directory, ABSENT, errno, "0");
        return 0;
    }
    long written = 0;
    int error_number = 0;
    while (written < bound * MIB) {
        ssize_t got = write(fd, block, sizeof block);
        if (got <= 0) {
            error_number = errno;
            break;
        }
        written += got;
    }
    if (error_number == 0 && fsync(fd) < 0)
        error_number = errno;
    unlink(path);
    report("R04", directory, error_number ? HELD : BREACHED, error_number, "%ld", written / MIB);
    return 0;
}

/* inodes DIRECTORY MAX: empty files. */
static int inodes(const char *directory, long bound) {
    char path[512];
    long made = 0;
    int error_number = 0;
    snprintf(path, sizeof path, "%s/prober-inodes", directory);
    if (mkdir(path, 0700) < 0) {
        report("R05", directory, ABSENT, errno, "0");
        return 0;
    }
    int folder = open(path, O_RDONLY | O_DIRECTORY);
    for (; made < bound; made++) {
        char name[32];
        snprintf(name, sizeof name, "%ld", made);
        int fd = openat(folder, name, O_WRONLY | O_CREAT | O_EXCL, 0600);
        if (fd < 0) {
            error_number = errno;
            break;
        }
        close(fd);
    }
    for (long i = 0; i < made; i++) {
        char name[32];
        snprintf(name, sizeof name, "%ld", i);
        unlinkat(folder, name, 0);
    }
    rmdir(path);
    report("R05", directory, error_number ? HELD : BREACHED, error_number, "%ld", made);
    return 0;
}

static void *spin(void *until) {
    volatile unsigned long turns = 0;
    while (now_ms() < *(long *)until)
        turns++;
    return NULL;
}

/* cpu THREADS MS [MOST]: the processor time used, in percent of the wall time, and whether that is more than it may be. */
static int processor(long threads, long milliseconds, long most) {
    long begin = now_ms(), until = begin + milliseconds;
    pthread_t list[64];
    long made = 0;
    for (; made < threads && made < 64; made++)
        if (pthread_create(&list[made], NULL, spin, &until) != 0)
            break;
    for (long i = 0; i < made; i++)
        pthread_join(list[i], NULL);
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    long used = (use.ru_utime.tv_sec + use.ru_stime.tv_sec) * 1000 + (use.ru_utime.tv_usec + use.ru_stime.tv_usec) / 1000;
    long elapsed = now_ms() - begin;
    long percent = elapsed > 0 ? used * 100 / elapsed : 0;
    report("R07", "processor time", most && percent > most ? BREACHED : HELD, 0, "%ld", percent);
    return 0;
}

/* zombies COUNT: orphans that end at once. Counts what process 1 has not collected. */
static int zombies(long count) {
    for (long i = 0; i < count; i++) {
        pid_t child = fork();
        if (child < 0) {
            /* The limit counts zombies too, so a missing reaper shows up here as well. */
            report("R09", "zombie flood", BREACHED, errno, "fork failed after %ld", i);
            return 0;
        }
        if (child == 0) {
            if (fork() == 0)
                _exit(0);
            _exit(0);
        }
        waitpid(child, NULL, 0);
    }
    long left = 0;
    for (int tries = 0; tries < 50; tries++) {
        left = 0;
        DIR *proc = opendir("/proc");
        struct dirent *entry;
        while (proc && (entry = readdir(proc))) {
            char path[300], text[512];
            snprintf(path, sizeof path, "/proc/%s/stat", entry->d_name);
            if (entry->d_name[0] < '0' || entry->d_name[0] > '9' || read_small(path, text, sizeof text) <= 0)
                continue;
            char *end = strrchr(text, ')');
            left += end && end[2] == 'Z';
        }
        if (proc)
            closedir(proc);
        if (left == 0)
            break;
        usleep(100000);
    }
    report("R09", "zombie flood", left ? BREACHED : HELD, 0, "%ld left", left);
    return 0;
}

/* timers MAX: kernel memory by timers, queued signals and message queues. */
static int kernel_objects(long bound) {
    long made = 0;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN};
    signal(SIGRTMIN, SIG_IGN);
    timer_t timer;
    while (made < bound && timer_create(CLOCK_MONOTONIC, &event, &timer) == 0)
        made++;
    report("R15.timers", "timers", made == bound ? BREACHED : HELD, made == bound ? 0 : errno, "%ld", made);
    made = 0;
    while (made < bound) {
        char name[32];
        snprintf(name, sizeof name, "/prober-%ld", made);
        struct mq_attr attributes = {.mq_maxmsg = 10, .mq_msgsize = 8192};
        mqd_t queue = mq_open(name, O_RDWR | O_CREAT | O_EXCL, 0600, &attributes);
        if (queue < 0)
            break;
        mq_unlink(name);
        made++;
    }
    report("R15.queues", "message queues", made == bound ? BREACHED : HELD, made == bound ? 0 : errno, "%ld", made);
    return 0;
}

/* names COUNT: misses in the name cache, which is kernel memory. */
static int missing_names(long count) {
    struct stat info;
    char path[64];
    for (long i = 0; i < count; i++) {
        snprintf(path, sizeof path, "/tmp/missing-%ld", i);
        if (stat(path, &info) == 0)
            return 3;
    }
    report("R19", "missing names", HELD, 0, "%ld", count);
    return 0;
}

/*
 * denied COUNT: calls that the filter refuses, device commands that landlock refuses, and processes that the filter kills for a
 * call of another table. Whoever writes each of them down fills the host's log.
 */
static int denied(long count) {
    int device = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    struct termios ignored;
    long refused = 0, killed = 0;
    for (long i = 0; i < count; i++) {
        refused += unshare(CLONE_NEWUSER) < 0;
        refused += ioctl(device, TCGETS, &ignored) < 0;
    }
#ifdef __x86_64__
    for (long i = 0; i < count / 100; i++) {
        pid_t child = fork();
        if (child == 0) {
            long result = 20;
            __asm__ volatile("int $0x80" : "+a"(result) : : "memory");
            _exit(0);
        }
        int status = 0;
        waitpid(child, &status, 0);
        killed += WIFSIGNALED(status);
    }
#endif
    report("R20", "denied calls", refused == 2 * count ? HELD : BREACHED, 0, "%ld refused, %ld killed", refused, killed);
    return 0;
}

/* core: a process with much memory aborts. What is left is found by the caller. */
static int dump_core(void) {
    memory_bomb(32);
    if (chdir("/tmp") < 0)
        return 3;
    abort();
}

/* daemon TOKEN: a process that left its session and its parent, and sleeps. */
static int leave_daemon(const char *token) {
    pid_t child = fork();
    if (child == 0) {
        setsid();
        pid_t grandchild = fork();
        if (grandchild == 0) {
            int null = open("/dev/null", O_RDWR);
            dup2(null, 0);
            dup2(null, 1);
            dup2(null, 2);
            char *arguments[] = {(char *)"prober", (char *)"sleep", (char *)"3600", (char *)token, NULL};
            char *nothing[] = {NULL};
            execve("/proc/self/exe", arguments, nothing);
            _exit(3);
        }
        _exit(0);
    }
    waitpid(child, NULL, 0);
    report("R12", "leave a daemon", HELD, 0, "%s", token);
    return 0;
}

/* flood MS: output as fast as the reader takes it. */
static int flood(long milliseconds) {
    static char block[65536];
    memset(block, 'y', sizeof block);
    block[sizeof block - 1] = '\n';
    long until = now_ms() + milliseconds;
    while (now_ms() < until)
        if (write(STDOUT_FILENO, block, sizeof block) < 0)
            return 1;
    return 0;
}

static int open_files(long bound) {
    long made = 0;
    while (made < bound && open("/dev/null", O_RDONLY) >= 0)
        made++;
    report("R15.files", "open files", made == bound ? BREACHED : HELD, made == bound ? 0 : errno, "%ld", made);
    return 0;
}

/* Shapes that the harness kills or waits for. */
static int shape(const char *name) {
    if (strcmp(name, "stubborn") == 0) {
        for (int number = 1; number < 32; number++)
            signal(number, SIG_IGN);
        report("R18", "ignore every signal", HELD, 0, "ready");
        for (;;)
            pause();
    }
    if (strcmp(name, "killall") == 0) {
        long rc = kill(-1, SIGKILL);
        report("I01.all", "kill(-1, KILL)", HELD, rc < 0 ? errno : 0, "still here");
        return 0;
    }
    if (strcmp(name, "core") == 0)
        return dump_core();
    return 2;
}

/*
 * flip DIRECTORY TARGET: `real`, a directory with a file `kept`, and `link`, a link to the target, exchange their names
 * without end.
 */
static int flip(const char *directory, const char *target) {
    char real[256], link[256], file[300];
    snprintf(real, sizeof real, "%s/real", directory);
    snprintf(link, sizeof link, "%s/link", directory);
    snprintf(file, sizeof file, "%s/kept", real);
    if (mkdir(directory, 0755) < 0 || mkdir(real, 0755) < 0 || symlink(target, link) < 0)
        return 3;
    int fd = open(file, O_WRONLY | O_CREAT, 0644);
    if (fd < 0 || write(fd, "old", 3) != 3)
        return 3;
    while (renameat2(AT_FDCWD, real, AT_FDCWD, link, RENAME_EXCHANGE) == 0)
        ;
    return 1;
}

/* write PATH TEXT, read PATH, env, args: plain tools, so that a rootfs with nothing else can be used. */
static int plain(int argc, char **argv) {
    extern char **environ;
    if (strcmp(argv[0], "env") == 0) {
        for (char **entry = environ; *entry; entry++)
            dprintf(STDOUT_FILENO, "%s\n", *entry);
        return 0;
    }
    if (strcmp(argv[0], "pwd") == 0) {
        char where[4096];
        if (!getcwd(where, sizeof where))
            return 1;
        dprintf(STDOUT_FILENO, "%s\n", where);
        return 0;
    }
    if (strcmp(argv[0], "args") == 0) {
        for (int i = 1; i < argc; i++)
            dprintf(STDOUT_FILENO, "%zu\n", strlen(argv[i]));
        return 0;
    }
    if (strcmp(argv[0], "read") == 0 && argc == 2) {
        static char text[65536];
        ssize_t length = read_small(argv[1], text, sizeof text);
        if (length < 0) {
            dprintf(STDERR_FILENO, "%s: %s\n", argv[1], strerror(errno));
            return 1;
        }
        return write(STDOUT_FILENO, text, (size_t)length) == length ? 0 : 1;
    }
    if (strcmp(argv[0], "write") == 0 && argc == 3) {
        int fd = open(argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0644);
        if (fd < 0 || write(fd, argv[2], strlen(argv[2])) < 0) {
            dprintf(STDERR_FILENO, "%s: %s\n", argv[1], strerror(errno));
            return 1;
        }
        return 0;
    }
    if (strcmp(argv[0], "list") == 0 && argc == 2) {
        DIR *folder = opendir(argv[1]);
        struct dirent *entry;
        if (!folder) {
            dprintf(STDERR_FILENO, "%s: %s\n", argv[1], strerror(errno));
            return 1;
        }
        while ((entry = readdir(folder)))
            dprintf(STDOUT_FILENO, "%s\n", entry->d_name);
        closedir(folder);
        return 0;
    }
    if (strcmp(argv[0], "connect") == 0 && argc == 2) {
        /* Connects the socket at descriptor 0, which its other holder then uses with our credentials. */
        struct sockaddr_un to = {.sun_family = AF_UNIX};
        snprintf(to.sun_path, sizeof to.sun_path, "%s", argv[1]);
        if (connect(STDIN_FILENO, (struct sockaddr *)&to, sizeof to) < 0) {
            dprintf(STDERR_FILENO, "%s\n", strerror(errno));
            return 1;
        }
        return 0;
    }
    if (strcmp(argv[0], "flip") == 0 && argc == 3)
        return flip(argv[1], argv[2]);
    if (strcmp(argv[0], "gained") == 0 && argc == 1)
        return geteuid() != getuid() || getegid() != getgid();
    if (strcmp(argv[0], "exit") == 0 && argc == 2)
        return atoi(argv[1]);
    if (strcmp(argv[0], "sleep") == 0 && argc >= 2) {
        sleep((unsigned)atoi(argv[1]));
        return 0;
    }
    return 2;
}

int resource_command(int argc, char **argv) {
    const char *name = argv[0];
    long bound = argc > 1 ? atol(argv[argc - 1]) : 0;
    if (strcmp(name, "forkbomb") == 0 && argc == 2)
        return fork_bomb(bound);
    if (strcmp(name, "memory") == 0 && argc == 2)
        return memory_bomb(bound);
    if (strcmp(name, "sharedmemory") == 0 && argc == 2)
        return shared_memory(bound);
    if (strcmp(name, "fill") == 0 && argc == 3)
        return fill(argv[1], bound);
    if (strcmp(name, "inodes") == 0 && argc == 3)
        return inodes(argv[1], bound);
    if (strcmp(name, "cpu") == 0 && argc == 3)
        return processor(atol(argv[1]), bound, 0);
    if (strcmp(name, "cpu") == 0 && argc == 4)
        return processor(atol(argv[1]), atol(argv[2]), bound);
    if (strcmp(name, "zombies") == 0 && argc == 2)
        return zombies(bound);
    if (strcmp(name, "kernelobjects") == 0 && argc == 2)
        return kernel_objects(bound);
    if (strcmp(name, "files") == 0 && argc == 2)
        return open_files(bound);
    if (strcmp(name, "denied") == 0 && argc == 2)
        return denied(bound);
    if (strcmp(name, "names") == 0 && argc == 2)
        return missing_names(bound);
    if (strcmp(name, "flood") == 0 && argc == 2)
        return flood(bound);
    if (strcmp(name, "daemon") == 0 && argc == 2)
        return leave_daemon(argv[1]);
    if (argc == 1 && (strcmp(name, "stubborn") == 0 || strcmp(name, "killall") == 0 || strcmp(name, "core") == 0))
        return shape(name);
    return plain(argc, argv);
}
