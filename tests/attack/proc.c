/* P: what procfs and sysfs give away or let change. Nothing is written: an open for writing is already the breach. */
#include "prober.h"

#include <ctype.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void writable_list(const char *id, const char *const *paths) {
    for (; *paths; paths++) {
        int fd = open(*paths, O_WRONLY);
        report_refusal(id, *paths, fd);
        if (fd >= 0)
            close(fd);
    }
}

static void sysctls(void) {
    static const char *const paths[] = {
        "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe",      "/proc/sys/kernel/hotplug",
        "/proc/sys/kernel/hostname",     "/proc/sys/kernel/shmmax",        "/proc/sys/kernel/ns_last_pid",
        "/proc/sys/kernel/panic",        "/proc/sys/vm/drop_caches",       "/proc/sys/vm/overcommit_memory",
        "/proc/sys/fs/file-max",         "/proc/sys/fs/suid_dumpable",     "/proc/sys/fs/mqueue/queues_max",
        "/proc/sys/net/ipv4/ip_forward", "/proc/sys/user/max_user_namespaces", NULL};
    writable_list("P01", paths);
}

static void triggers(void) {
    static const char *const paths[] = {"/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/proc/mtrr",
                                        "/proc/bus/pci/00/00.0", "/proc/driver", "/proc/self/attr/current", NULL};
    /* The last one is harmless without a security module; opening it is allowed to any process for itself. */
    for (const char *const *path = paths; *path && strcmp(*path, "/proc/self/attr/current") != 0; path++)
        report_refusal("P02", *path, open(*path, O_WRONLY));
}

static void sysfs(void) {
    static const char *const paths[] = {"/sys/kernel/uevent_helper",
                                        "/sys/power/state",
                                        "/sys/kernel/mm/transparent_hugepage/enabled",
                                        "/sys/kernel/mm/ksm/run",
                                        "/sys/fs/cgroup/cgroup.procs",
                                        "/sys/fs/cgroup/unified/cgroup.procs",
                                        "/sys/fs/cgroup/memory/release_agent",
                                        "/sys/fs/cgroup/memory/cgroup.procs",
                                        NULL};
    writable_list("P04", paths);
    static const char *const folders[] = {"/sys/firmware", "/sys/kernel/debug", "/sys/kernel/tracing", "/sys/kernel/security",
                                          "/sys/fs/bpf",   "/sys/devices/virtual/powercap", "/sys/block", "/sys/class/net",
                                          NULL};
    for (const char *const *path = folders; *path; path++) {
        DIR *folder = opendir(*path);
        int entries = 0, error_number = errno;
        struct dirent *entry;
        while (folder && (entry = readdir(folder)))
            entries += entry->d_name[0] != '.' && strcmp(entry->d_name, "lo") != 0;
        if (folder)
            closedir(folder);
        report("P04.list", *path, entries ? BREACHED : HELD, folder ? 0 : error_number, "%d entries", entries);
    }
}

static void secrets(void) {
    static const char *const paths[] = {"/proc/kcore",      "/proc/keys",        "/proc/key-users",    "/proc/kmsg",
                                        "/proc/timer_list", "/proc/sched_debug", "/proc/kpagecount",   "/proc/kpageflags",
                                        "/proc/config.gz",  "/proc/mdstat",      "/proc/interrupts",   "/proc/latency_stats",
                                        "/proc/vmallocinfo", "/proc/slabinfo",   "/proc/pagetypeinfo", "/proc/iomem",
                                        "/proc/ioports",    "/proc/acpi",        "/proc/scsi/scsi",    "/proc/asound/cards",
                                        "/proc/locks",      "/proc/zoneinfo",    "/proc/kpagecgroup",
                                        NULL};
    /* One more than a multiple of 8, which some of these insist on. */
    char buffer[513];
    for (const char *const *path = paths; *path; path++) {
        errno = 0;
        ssize_t got = read_small(*path, buffer, sizeof buffer);
        int error_number = got < 0 ? errno : 0;
        bool addresses_hidden = false;
        if (got > 0 && (strcmp(*path, "/proc/iomem") == 0 || strcmp(*path, "/proc/ioports") == 0))
            addresses_hidden = strncmp(buffer, "00000000-00000000", 17) == 0 || strncmp(buffer, "0000-0000", 9) == 0;
        enum verdict verdict = got > 0 && !addresses_hidden ? BREACHED : HELD;
        if (verdict == HELD && settings.bare && error_number == ENOENT)
            verdict = ABSENT;
        report("P05", *path, verdict, error_number, "%zd bytes", got);
    }
    /* The first symbols may be offsets from 0 on every kernel, so all lines are looked at. */
    FILE *symbols = fopen("/proc/kallsyms", "re");
    int error_number = symbols ? 0 : errno;
    bool any = false, shown = false;
    while (symbols && !shown && fgets(buffer, sizeof buffer, symbols)) {
        any = true;
        shown = strncmp(buffer, "0000000000000000", 16) != 0 && isxdigit((unsigned char)buffer[0]);
    }
    if (symbols)
        fclose(symbols);
    report("P05.kallsyms", "/proc/kallsyms", shown ? BREACHED : HELD, error_number, "%s",
           shown ? "addresses shown" : any ? "addresses are zero" : "nothing");
}

static void process_list(void) {
    DIR *proc = opendir("/proc");
    struct dirent *entry;
    int processes = 0, foreign = 0;
    char path[64], line[4096];
    while (proc && (entry = readdir(proc))) {
        if (!isdigit((unsigned char)entry->d_name[0]))
            continue;
        processes++;
        snprintf(path, sizeof path, "/proc/%.20s/cmdline", entry->d_name);
        ssize_t length = read_small(path, line, sizeof line);
        /* Our own arguments carry the token too, so the prober's image is left out by its first argument. */
        bool ours = length > 0 && strstr(line, "prober") != NULL;
        if (length > 0 && !ours && settings.token && memmem(line, (size_t)length, settings.token, strlen(settings.token)))
            foreign++;
    }
    if (proc)
        closedir(proc);
    report("P07", "the canary process in /proc", foreign ? BREACHED : HELD, 0, "%d processes seen", processes);
}

static void strings_in(const char *id, const char *path) {
    static char text[262144];
    if (read_small(path, text, sizeof text) < 0) {
        report(id, path, HELD, errno, "unreadable");
        return;
    }
    for (int i = 0; i < settings.strings.count; i++) {
        char *at = strstr(text, settings.strings.item[i]);
        report(id, path, at ? BREACHED : HELD, 0, "%s%.60s", at ? "shows " : "hides ", settings.strings.item[i]);
    }
}

static void host_paths(void) {
    strings_in("P08", "/proc/self/mountinfo");
    strings_in("P08.mounts", "/proc/self/mounts");
    strings_in("P08.mountstats", "/proc/self/mountstats");
    strings_in("P09", "/proc/self/cgroup");
}

static void id_maps(void) {
    static const char *const files[] = {"/proc/self/uid_map", "/proc/self/gid_map"};
    for (size_t i = 0; i < COUNT(files); i++) {
        int fd = open(files[i], O_WRONLY);
        if (fd < 0) {
            report("P10", files[i], HELD, errno, "open refused");
            continue;
        }
        report_refusal("P10", files[i], write(fd, "0 0 4294967295", 14));
        close(fd);
    }
    char text[4096];
    read_small("/proc/self/uid_map", text, sizeof text);
    unsigned long inside, outside, count;
    bool owns_root = sscanf(text, "%lu %lu %lu", &inside, &outside, &count) == 3 && outside == 0 && count == 4294967295UL;
    report("P10.map", "host ids in the own map", owns_root ? BREACHED : HELD, 0, "%s", text);
    /* Below zero: preferred to processes of the host when memory is short. */
    int fd = open("/proc/self/oom_score_adj", O_WRONLY);
    report_refusal("P10.oom", "oom_score_adj below that of the host", fd < 0 ? -1 : write(fd, "-1", 2));
}

const struct attack proc_attacks[] = {
    {"P01", "write kernel settings", sysctls, false},
    {"P02", "write kernel triggers", triggers, false},
    {"P04", "sysfs", sysfs, false},
    {"P05", "read kernel secrets", secrets, false},
    {"P07", "see foreign processes", process_list, false},
    {"P08", "host paths in mount tables", host_paths, false},
    {"P10", "own id maps and scores", id_maps, false},
    {0},
};
