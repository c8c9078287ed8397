/* D: device nodes, the machine's and new ones. */
#include "prober.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static void make_nodes(void) {
    static const struct {
        const char *what;
        mode_t kind;
        unsigned major, minor;
    } nodes[] = {
        {"mknod(c 1:1, mem)", S_IFCHR, 1, 1},    {"mknod(c 1:3, null)", S_IFCHR, 1, 3},   {"mknod(b 254:0, disk)", S_IFBLK, 254, 0},
        {"mknod(b 8:0, sda)", S_IFBLK, 8, 0},    {"mknod(c 10:229, fuse)", S_IFCHR, 10, 229}, {"mknod(c 10:232, kvm)", S_IFCHR, 10, 232},
        {"mknod(b 7:0, loop)", S_IFBLK, 7, 0},   {"mknod(c 5:1, console)", S_IFCHR, 5, 1},
    };
    static const char *const folders[] = {"/tmp", ".", "/dev", "/dev/shm"};
    for (size_t f = 0; f < COUNT(folders); f++)
        for (size_t i = 0; i < COUNT(nodes); i++) {
            /* The names in a host's /dev are not ours to use. */
            if (settings.bare && f >= 2)
                continue;
            char path[64];
            snprintf(path, sizeof path, "%s/prober-node", folders[f]);
            int rc = mknod(path, nodes[i].kind | 0600, makedev(nodes[i].major, nodes[i].minor));
            int error_number = errno;
            if (rc == 0)
                unlink(path);
            errno = error_number;
            report_refusal("D01", nodes[i].what, rc);
        }
}

static void machine_nodes(void) {
    static const char *const names[] = {
        "kvm",   "fuse",  "net/tun", "loop-control", "loop0", "mem",  "kmem",    "port",     "vsock",  "vhost-net",
        "vhost-vsock", "vhost-vdpa-0", "sda", "vda", "nvme0", "nvme0n1", "kmsg", "userfaultfd", "mapper/control",
        "btrfs-control", "hpet", "snapshot", "console", "dri/card0", "nvram", "watchdog", "autofs", "cuse", "uinput",
        "tty0",  "tty1",  "ttyS0",   "vcs",          "hwrng", "rtc0", "ppp",     "bsg",      "tpm0",   "sgx_enclave",
        "cpu_dma_latency", "fb0", "zfs", "nvidia0", "udmabuf", "vfio/vfio", "iommu"};
    for (size_t i = 0; i < COUNT(names); i++) {
        char path[64];
        snprintf(path, sizeof path, "/dev/%s", names[i]);
        /* O_PATH: opening some of these has effects (a watchdog starts), and the name alone should not be there. */
        report_refusal("D03", path, open(path, O_PATH | O_CLOEXEC));
    }
}

static bool harmless(dev_t device) {
    unsigned kind = major(device), number = minor(device);
    if (kind == 1)
        return number == 3 || number == 5 || number == 7 || number == 8 || number == 9;
    if (kind == 5)
        return number == 0 || number == 2;
    return kind >= 136 && kind <= 143;
}

static void walk(const char *path, int depth, int *bad, char *first, size_t size) {
    DIR *folder = opendir(path);
    struct dirent *entry;
    while (folder && (entry = readdir(folder))) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        char below[512];
        struct stat info;
        snprintf(below, sizeof below, "%s/%s", path, entry->d_name);
        if (lstat(below, &info) < 0)
            continue;
        if (S_ISDIR(info.st_mode) && depth < 3)
            walk(below, depth + 1, bad, first, size);
        bool device = S_ISCHR(info.st_mode) || S_ISBLK(info.st_mode);
        /* Character 0:0 is an overlay whiteout and opens nothing. */
        if (device && info.st_rdev != 0 && (S_ISBLK(info.st_mode) || !harmless(info.st_rdev)) && (*bad)++ == 0)
            snprintf(first, size, "%s %u:%u", below, major(info.st_rdev), minor(info.st_rdev));
    }
    if (folder)
        closedir(folder);
}

static void nodes_in_dev(void) {
    int bad = 0;
    char first[600] = "";
    walk("/dev", 0, &bad, first, sizeof first);
    report("D04", "device nodes besides the harmless ones", bad ? BREACHED : HELD, 0, "%d, first %s", bad, first);
}

static void terminals(void) {
    DIR *folder = opendir("/dev/pts");
    struct dirent *entry;
    int others = 0;
    while (folder && (entry = readdir(folder)))
        others += entry->d_name[0] >= '0' && entry->d_name[0] <= '9';
    if (folder)
        closedir(folder);
    report("D05", "terminals of others in /dev/pts", others ? BREACHED : HELD, 0, "%d", others);
    int master = open("/dev/ptmx", O_RDWR | O_NOCTTY);
    if (master < 0) {
        report("D05.own", "a terminal of our own", ABSENT, errno, "no /dev/ptmx");
        return;
    }
    int number = -1, unlock = 0;
    ioctl(master, TIOCGPTN, &number);
    ioctl(master, TIOCSPTLCK, &unlock);
    char path[32];
    snprintf(path, sizeof path, "/dev/pts/%d", number);
    struct stat info;
    bool own = stat(path, &info) == 0 && info.st_uid == geteuid();
    report("D05.own", "a terminal of our own", own ? HELD : FAILED, 0, "number %d", number);
    int slave = open(path, O_RDWR | O_NOCTTY);
    if (slave >= 0) {
        setsid();
        ioctl(slave, TIOCSCTTY, 0);
        char letter = 'x';
        report_refusal("D05.tiocsti", "type into a terminal", ioctl(slave, TIOCSTI, &letter));
    }
}

const struct attack device_attacks[] = {
    {"D01", "make device nodes", make_nodes, false},
    {"D03", "device nodes of the machine", machine_nodes, false},
    {"D04", "whatever is in /dev", nodes_in_dev, false},
    {"D05", "terminals", terminals, false},
    {0},
};
