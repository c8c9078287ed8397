/*
 * The prober: performs attacks from inside a sandbox and prints one JSON line for each.
 *
 * It never decides what should have happened. `held` means that the attempt was refused, `breached` that it had an
 * effect or reached the kernel code it was meant to be kept away from, `absent` that this kernel lacks the target,
 * `error` that the attempt itself could not be made. The suites compare with what they expect.
 */
#ifndef PROBER_H
#define PROBER_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

enum verdict { HELD, BREACHED, ABSENT, FAILED };

#define LIST_MAX 32

struct list {
    const char *item[LIST_MAX];
    int count;
};

/* What the harness planted on the host, given on the command line. */
struct settings {
    struct list files;     /* canary files: must not be readable */
    struct list sockets;   /* listening unix sockets: must not be reachable */
    struct list addresses; /* addresses of the host, dotted or colon form */
    struct list strings;   /* text that must not show up in mountinfo or cgroup files */
    struct list variables; /* environment variables that must not be inherited */
    const char *token;     /* in the command line of the canary process */
    const char *abstract_name;
    const char *set_uid; /* a copy of this program that is set-uid for root */
    int port;      /* canary TCP listener */
    bool bare;     /* running on the bare host as a negative control */
    bool external; /* addresses outside this machine may be tried */
    pid_t maker;   /* who started this program: process 1 of the sandbox */
};

extern struct settings settings;

/* Prints one result line. `error_number` 0 prints an empty errno. */
void report(const char *id, const char *attack, enum verdict verdict, int error_number, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

/*
 * Prints the usual result: breached when `rc` is not negative, otherwise held. On the bare host a missing kernel
 * feature is told apart as absent.
 */
void report_refusal(const char *id, const char *attack, long rc);

/* Same, for calls where these errnos, ended by 0, prove that the call passed every filter. */
void report_reach(const char *id, const char *attack, long rc, const int *proof);

/* True when the errno says that the kernel lacks the feature. Only meaningful on the bare host. */
bool is_absence(int error_number);

/* One forked child per attack, so that a kill by a filter costs one row. */
struct attack {
    const char *id;
    const char *what;
    void (*run)(void);
    /* Would disturb a real host, so it is left out on the bare host. */
    bool sandbox_only;
};

extern const struct attack filesystem_attacks[];
extern const struct attack proc_attacks[];
extern const struct attack namespace_attacks[];
extern const struct attack capability_attacks[];
extern const struct attack keeper_attacks[];
extern const struct attack syscall_attacks[];
extern const struct attack device_attacks[];
extern const struct attack network_attacks[];
extern const struct attack landlock_attacks[];

/* Prints {"nr":N,"outcome":…,"errno":…} for every number of a range. */
int scan_table(long first, long last);

/* Attacks on quantities. Each takes a bound and prints what it reached; each gives back what it took. */
int resource_command(int argc, char **argv);

/* tenant SECRET PORT: a neighbour. peer SECRET PORT PID: the attack on it. */
int peer_command(int argc, char **argv);

/* Reads a small file into `buffer`, always terminated. Returns the length or -1. */
ssize_t read_small(const char *path, char *buffer, size_t size);

/* Milliseconds of a clock that never jumps. */
long now_ms(void);

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

#endif
