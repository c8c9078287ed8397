/* T: one sandbox against another that lives beside it, and what such a neighbour has to lose. */
#include "prober.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

/* The neighbour: its secret, its port and its process as the attacker can name it. */
static const char *secret;
static int port;
static pid_t victim;

static key_t key(void) { return 0x5b000000 + port; }

/* Loopback, or every address of its own network. */
static socklen_t address(int family, bool any, struct sockaddr_storage *to) {
    memset(to, 0, sizeof *to);
    if (family == AF_INET) {
        struct sockaddr_in *four = (struct sockaddr_in *)to;
        four->sin_family = AF_INET;
        four->sin_port = htons((unsigned short)port);
        four->sin_addr.s_addr = htonl(any ? INADDR_ANY : INADDR_LOOPBACK);
        return sizeof *four;
    }
    struct sockaddr_in6 *six = (struct sockaddr_in6 *)to;
    six->sin6_family = AF_INET6;
    six->sin6_port = htons((unsigned short)port);
    six->sin6_addr = any ? in6addr_any : in6addr_loopback;
    return sizeof *six;
}

static socklen_t abstract(struct sockaddr_un *to) {
    memset(to, 0, sizeof *to);
    to->sun_family = AF_UNIX;
    size_t length = strlen(secret);
    memcpy(to->sun_path + 1, secret, length);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
}

static const char *const folders[] = {"/tmp", "/workspace", "/dev/shm"};

/* Everything that a neighbour could find. Descriptors stay open over the execve. */
static bool settle(void) {
    struct sockaddr_storage inet;
    struct sockaddr_un name;
    socklen_t length = address(AF_INET, true, &inet);
    int tcp = socket(AF_INET, SOCK_STREAM, 0), local = socket(AF_UNIX, SOCK_STREAM, 0);
    if (tcp < 0 || bind(tcp, (struct sockaddr *)&inet, length) < 0 || listen(tcp, 16) < 0)
        return false;
    length = abstract(&name);
    if (local < 0 || bind(local, (struct sockaddr *)&name, length) < 0 || listen(local, 16) < 0)
        return false;
    /* Without IPv6 there is nothing to listen on, and nothing to reach either. */
    length = address(AF_INET6, true, &inet);
    int six = socket(AF_INET6, SOCK_STREAM, 0), only = 1;
    if (six >= 0 && setsockopt(six, IPPROTO_IPV6, IPV6_V6ONLY, &only, sizeof only) == 0 && bind(six, (struct sockaddr *)&inet, length) == 0)
        listen(six, 16);
    int segment = shmget(key(), 4096, IPC_CREAT | 0666);
    char *memory = segment < 0 ? (char *)-1 : shmat(segment, NULL, 0);
    if (memory == (char *)-1 || msgget(key(), IPC_CREAT | 0666) < 0 || semget(key(), 1, IPC_CREAT | 0666) < 0)
        return false;
    snprintf(memory, 4096, "%s", secret);
    for (size_t i = 0; i < COUNT(folders); i++) {
        char path[256];
        snprintf(path, sizeof path, "%s/%s", folders[i], secret);
        int fd = open(path, O_WRONLY | O_CREAT, 0666);
        if (fd < 0 || write(fd, secret, strlen(secret)) < 0)
            return false;
        close(fd);
    }
    return true;
}

static void sockets(void) {
    static const int families[] = {AF_INET, AF_INET6};
    for (size_t i = 0; i < COUNT(families); i++) {
        struct sockaddr_storage to;
        socklen_t length = address(families[i], false, &to);
        int fd = socket(families[i], SOCK_STREAM | SOCK_CLOEXEC, 0);
        report_refusal("T01", families[i] == AF_INET ? "tcp of the neighbour" : "tcp over IPv6 of the neighbour",
                       fd < 0 ? -1 : connect(fd, (struct sockaddr *)&to, length));
    }
    struct sockaddr_un name;
    socklen_t length = abstract(&name);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    report_refusal("T02", "abstract socket of the neighbour", fd < 0 ? -1 : connect(fd, (struct sockaddr *)&name, length));
}

static void objects(void) {
    report_refusal("T03", "shared memory by its key", shmget(key(), 0, 0));
    int shown = -1;
    /* Numbers are given from 0 on. Only reading is asked for, so that a mode of 0444 would do. */
    for (int number = 0; number < 256 && shown < 0; number++) {
        char *memory = shmat(number, NULL, SHM_RDONLY);
        if (memory != (char *)-1 && strcmp(memory, secret) == 0)
            shown = number;
    }
    report("T03.number", "shared memory by its number", shown >= 0 ? BREACHED : HELD, shown >= 0 ? 0 : EINVAL, "segment %d",
           shown);
    report_refusal("T04.messages", "message queue by its key", msgget(key(), 0));
    report_refusal("T04.semaphores", "semaphores by their key", semget(key(), 0, 0));
}

static void files(void) {
    char path[320];
    for (size_t i = 0; i < COUNT(folders); i++) {
        snprintf(path, sizeof path, "%s/%s", folders[i], secret);
        report_refusal("T05", folders[i], open(path, O_RDONLY));
        snprintf(path, sizeof path, "/proc/%d/root%s/%s", victim, folders[i], secret);
        report_refusal("T05.root", "through the root of the neighbour", open(path, O_RDONLY));
    }
}

/* Our own processes carry the secret as an argument, so those of our session do not count. */
static int shown_by(const char *file) {
    static char text[65536];
    char path[64];
    int found = 0;
    DIR *proc = opendir("/proc");
    struct dirent *entry;
    while (proc && (entry = readdir(proc))) {
        if (!isdigit((unsigned char)entry->d_name[0]) || getsid(atoi(entry->d_name)) == getsid(0))
            continue;
        snprintf(path, sizeof path, "/proc/%.20s/%s", entry->d_name, file);
        ssize_t length = read_small(path, text, sizeof text);
        found += length > 0 && memmem(text, (size_t)length, secret, strlen(secret)) != NULL;
    }
    if (proc)
        closedir(proc);
    return found;
}

static void processes(void) {
    static const char *const shown[] = {"cmdline", "environ"};
    for (size_t i = 0; i < COUNT(shown); i++) {
        char id[32];
        snprintf(id, sizeof id, "T06.%s", shown[i]);
        int found = shown_by(shown[i]);
        report(id, "secret of the neighbour in /proc", found ? BREACHED : HELD, 0, "%d processes", found);
    }
    report_refusal("T07", "signal to a process of the neighbour", kill(victim, 0));
    report_refusal("T07.queue", "signal with a value", sigqueue(victim, 0, (union sigval){0}));
    report_refusal("T07.group", "signal to its group", kill(-victim, 0));
    report_refusal("T07.priority", "its priority", setpriority(PRIO_PROCESS, (id_t)victim, 0));
    long copy = 0;
    struct iovec here = {&copy, sizeof copy}, there = {(void *)&victim, sizeof copy};
    errno = 0;
    report_refusal("T07.memory", "its memory", process_vm_readv(victim, &here, 1, &there, 1, 0));
    report_refusal("T07.pidfd", "a handle on it", syscall(SYS_pidfd_open, victim, 0));
    report_refusal("T07.trace", "trace it", ptrace(PTRACE_SEIZE, victim, 0, 0));
}

static int attack(void) {
    sockets();
    objects();
    files();
    processes();
    return 0;
}

/*
 * The neighbour. A process of its own makes the attack from inside first, as the control: whatever it does not reach proves
 * nothing when somebody else does not reach it either.
 */
static int live(void) {
    char shown[256], variable[256], path[64], text[512];
    if (!settle()) {
        report("T00", "a neighbour with something to lose", FAILED, errno, "not settled");
        return 3;
    }
    snprintf(shown, sizeof shown, "tenant-%.200s", secret);
    snprintf(variable, sizeof variable, "TENANT=%.200s", secret);
    pid_t self = getpid(), control = fork();
    if (control == 0) {
        setsid();
        victim = self;
        snprintf(path, sizeof path, "/proc/%d/environ", self);
        for (int tries = 0; tries < 2000; tries++) {
            if (read_small(path, text, sizeof text) > 0 && strncmp(text, variable, strlen(variable)) == 0)
                break;
            usleep(5000);
        }
        _exit(attack());
    }
    char *arguments[] = {(char *)"prober", (char *)"sleep", (char *)"600", shown, NULL};
    char *environment[] = {variable, NULL};
    execve("/proc/self/exe", arguments, environment);
    return 3;
}

int peer_command(int argc, char **argv) {
    if (argc < 3)
        return 2;
    secret = argv[1];
    port = atoi(argv[2]);
    if (strlen(secret) > 64)
        return 2;
    if (strcmp(argv[0], "tenant") == 0 && argc == 3)
        return live();
    if (strcmp(argv[0], "peer") == 0 && argc == 4) {
        victim = atoi(argv[3]);
        return attack();
    }
    return 2;
}
