/* F: leaving the root, changing mounts, gaining rights through files. */
#include "prober.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <termios.h>
#include <unistd.h>

/* A directory of our own to work in; the working directory first, because that is what a session writes to. */
static const char *scratch(void) {
    static char path[64];
    static const char *const bases[] = {".", "/tmp", "/dev/shm"};
    for (size_t i = 0; i < COUNT(bases); i++) {
        snprintf(path, sizeof path, "%s/prober-XXXXXX", bases[i]);
        if (mkdtemp(path))
            return path;
    }
    return NULL;
}

static void canary_by_absolute_path(void) {
    for (int i = 0; i < settings.files.count; i++)
        report_refusal("F01", settings.files.item[i], open(settings.files.item[i], O_RDONLY));
}

static void canary_by_dotdot(void) {
    char path[4096];
    for (int i = 0; i < settings.files.count; i++) {
        char *end = path;
        for (int up = 0; up < 64; up++)
            end = stpcpy(end, "../");
        snprintf(end, sizeof path - (size_t)(end - path), "%s", settings.files.item[i]);
        report_refusal("F02", "open(../../…/canary)", open(path, O_RDONLY));
    }
    for (int up = 0; up < 64; up++)
        if (chdir("..") < 0)
            break;
    char where[4096];
    long length = syscall(SYS_getcwd, where, sizeof where);
    report("F02.cwd", "chdir(..) 64 times", length == 2 && strcmp(where, "/") == 0 ? HELD : BREACHED, 0, "cwd %s",
           length > 0 ? where : "?");
}

static void canary_by_link(void) {
    static const char *const roots[] = {"/proc/1/root", "/proc/2/root", "/proc/self/root", "/proc/1/cwd",
                                        "/proc/self/cwd/../../../../.."};
    const char *dir = scratch();
    if (!dir) {
        report("F03", "symlink to /", FAILED, errno, "no directory to write to");
        return;
    }
    char link[128], path[4096];
    for (size_t r = 0; r < COUNT(roots); r++)
        for (int i = 0; i < settings.files.count; i++) {
            snprintf(link, sizeof link, "%s/link", dir);
            unlink(link);
            if (symlink(roots[r], link) < 0) {
                report("F03", roots[r], FAILED, errno, "symlink");
                continue;
            }
            snprintf(path, sizeof path, "%s%s", link, settings.files.item[i]);
            int canary = open(path, O_RDONLY);
            report_refusal("F03", roots[r], canary);
            /* The same way, for writing beside the canary. A directory of that name may exist inside as well; writing
             * there is nobody's business, so only the canary beside it makes it a breach. */
            char *slash = strrchr(path, '/');
            snprintf(slash, 16, "/breach");
            int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
            int error_number = errno;
            if (fd >= 0)
                unlink(path);
            errno = error_number;
            if (fd >= 0 && canary < 0)
                report("F03.write", roots[r], HELD, 0, "a directory of our own");
            else
                report_refusal("F03.write", roots[r], fd);
        }
    unlink(link);
    rmdir(dir);
}

static void leaked_directory(void) {
    int found = -1;
    for (int fd = 3; fd < 1024; fd++) {
        int got = openat(fd, "../..", O_RDONLY | O_DIRECTORY);
        if (got >= 0) {
            found = fd;
            break;
        }
    }
    if (found >= 0)
        report("F05", "openat(fd, ../..) for every fd", BREACHED, 0, "descriptor %d is a directory", found);
    else
        report("F05", "openat(fd, ../..) for every fd", HELD, EBADF, "none");
}

static void bind_root(void) {
    const char *dir = scratch();
    if (!dir) {
        report("F07", "mount(/, MS_BIND)", FAILED, errno, "no directory to write to");
        return;
    }
    int rc = mount("/", dir, NULL, MS_BIND | MS_REC, NULL);
    int error_number = errno;
    if (rc == 0)
        umount2(dir, MNT_DETACH);
    errno = error_number;
    report_refusal("F07", "mount(/, MS_BIND)", rc);
    static const char *const types[] = {"tmpfs", "proc", "sysfs", "devtmpfs", "cgroup2", "mqueue", "overlay", "debugfs"};
    for (size_t i = 0; i < COUNT(types); i++) {
        rc = mount("none", dir, types[i], 0, strcmp(types[i], "overlay") == 0 ? "lowerdir=/:/tmp" : NULL);
        error_number = errno;
        if (rc == 0)
            umount2(dir, MNT_DETACH);
        errno = error_number;
        char id[32];
        snprintf(id, sizeof id, "F07.%s", types[i]);
        report_refusal(id, "mount of a new filesystem", rc);
    }
    rmdir(dir);
}

static void undo_mounts(void) {
    static const char *const targets[] = {"/proc", "/proc/sys", "/proc/kcore", "/dev", "/dev/null", "/sys", "/tmp", "/usr",
                                          "/run", "/"};
    /* Remounts first: where unmounting works, nothing is left to remount. */
    report_refusal("F08.remount", "mount(/, MS_REMOUNT)", mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL));
    report_refusal("F08.propagation", "mount(/, MS_SHARED)", mount(NULL, "/", NULL, MS_SHARED, NULL));
    for (size_t i = 0; i < COUNT(targets); i++)
        report_refusal("F08", targets[i], umount2(targets[i], MNT_DETACH));
}

static void new_mount_api(void) {
    static const int proof[] = {EFAULT, EINVAL, EBADF, ENOENT, 0};
    report_reach("F10.open_tree", "open_tree(/, CLONE)", syscall(428, AT_FDCWD, "/", 1 | O_CLOEXEC), proof);
    report_reach("F10.move_mount", "move_mount", syscall(429, -1, "", -1, "", 0x44), proof);
    report_reach("F10.fsopen", "fsopen(tmpfs)", syscall(430, "tmpfs", 0), proof);
    report_reach("F10.fsconfig", "fsconfig", syscall(431, -1, 6, NULL, NULL, 0), proof);
    report_reach("F10.fsmount", "fsmount", syscall(432, -1, 0, 0), proof);
    report_reach("F10.fspick", "fspick(/)", syscall(433, AT_FDCWD, "/", 0), proof);
    report_reach("F10.mount_setattr", "mount_setattr", syscall(442, AT_FDCWD, "/", 0, NULL, (size_t)32), proof);
    report_reach("F10.open_tree_attr", "open_tree_attr", syscall(467, AT_FDCWD, "/", 1, NULL, (size_t)32), proof);
}

static void pivot(void) {
    static const int proof[] = {EINVAL, EBUSY, ENOTDIR, 0};
    report_reach("F11", "pivot_root(., .)", syscall(SYS_pivot_root, ".", "."), proof);
}

/* The old way out: chroot below the working directory, then walk up from above the new root. */
static void chroot_breakout(void) {
    const char *dir = scratch();
    if (!dir || settings.files.count == 0) {
        report("F12", "chroot and walk up", FAILED, errno, "nothing to try");
        return;
    }
    /* Opened before, because it is above the new root: that is what the walk starts from. */
    char parent[64];
    snprintf(parent, sizeof parent, "%.*s", (int)(strrchr(dir, '/') - dir), dir);
    int up = open(parent, O_RDONLY | O_DIRECTORY);
    int rc = chroot(dir);
    int error_number = errno;
    if (rc < 0) {
        rmdir(dir);
        errno = error_number;
        report("F12", "chroot and walk up", HELD, error_number, "chroot refused");
        return;
    }
    unlinkat(up, strrchr(dir, '/') + 1, AT_REMOVEDIR);
    bool walked = up >= 0 && fchdir(up) == 0;
    for (int i = 0; walked && i < 64; i++)
        if (chdir("..") < 0)
            break;
    int fd = open(settings.files.item[0] + 1, O_RDONLY);
    report_refusal("F12", "chroot and walk up", fd);
}

/* Set-uid files and device nodes mean nothing only where every mount says so. */
static void mount_flags(void) {
    static char table[65536];
    ssize_t length = read_small("/proc/self/mounts", table, sizeof table);
    if (length <= 0) {
        report("F16", "a mount without nosuid", FAILED, errno, "/proc/self/mounts");
        return;
    }
    int suid = 0, device = 0, total = 0;
    char first_suid[128] = "", first_device[128] = "";
    for (char *line = strtok(table, "\n"); line; line = strtok(NULL, "\n")) {
        char target[512];
        struct statvfs info;
        if (sscanf(line, "%*s %511s", target) != 1 || statvfs(target, &info) < 0)
            continue;
        total++;
        struct stat at;
        if (stat(target, &at) < 0)
            continue;
        /* The few nodes in /dev must work as devices, and a file of /proc that the null device covers shows nothing. What
         * else is in /dev is the business of D01 and D04. */
        bool node = S_ISCHR(at.st_mode);
        bool in_dev = strcmp(target, "/dev") == 0 || strncmp(target, "/dev/", 5) == 0;
        if (!(info.f_flag & ST_NOSUID) && !node && suid++ == 0)
            snprintf(first_suid, sizeof first_suid, "%.100s", target);
        if (!(info.f_flag & ST_NODEV) && !node && !in_dev && device++ == 0)
            snprintf(first_device, sizeof first_device, "%.100s", target);
    }
    report("F16", "a mount without nosuid", suid ? BREACHED : HELD, 0, "%d of %d mounts, first %s", suid, total, first_suid);
    report("F16.device", "a mount without nodev", device ? BREACHED : HELD, 0, "%d of %d mounts, first %s", device, total,
           first_device);
}

static void file_capability(void) {
    const char *dir = scratch();
    char path[128];
    snprintf(path, sizeof path, "%s/file", dir ? dir : "/tmp");
    int fd = open(path, O_RDWR | O_CREAT, 0755);
    if (fd < 0) {
        report("F17", "setxattr(security.capability)", FAILED, errno, "no file to write");
        return;
    }
    /* vfs_cap_data revision 2, effective, CAP_NET_RAW and CAP_SYS_ADMIN permitted. */
    unsigned int data[5] = {0x02000001, 1u << 13 | 1u << 21, 0, 0, 0};
    report_refusal("F17", "setxattr(security.capability)", fsetxattr(fd, "security.capability", data, sizeof data, 0));
    /* A set-uid file of another owner would be the same gift. */
    int rc = fchown(fd, 0, 0);
    struct stat info;
    bool foreign = rc == 0 && fstat(fd, &info) == 0 && info.st_uid != geteuid();
    report("F17.owner", "chown of an own file to another user", foreign ? BREACHED : HELD, rc < 0 ? errno : 0, "uid %u",
           (unsigned)geteuid());
    close(fd);
    unlink(path);
    if (dir)
        rmdir(dir);
}

static void read_only_files(void) {
    static const char *const paths[] = {"/usr/bin/env", "/usr/lib/os-release", "/usr/bin/sh"};
    struct statvfs info;
    if (statvfs("/usr", &info) < 0 || !(info.f_flag & ST_RDONLY)) {
        report("F18", "write below a read-only mount", ABSENT, 0, "/usr is part of the writable root here");
        return;
    }
    for (size_t i = 0; i < COUNT(paths); i++)
        report_refusal("F18", paths[i], open(paths[i], O_WRONLY));
    report_refusal("F18.create", "/usr/breach", open("/usr/breach", O_WRONLY | O_CREAT, 0600));
    report_refusal("F18.chmod", "chmod(/usr/bin)", chmod("/usr/bin", 0777));
}

static void overlay_attributes(void) {
    const char *dir = scratch();
    if (!dir) {
        report("F19", "setxattr(trusted.overlay.redirect)", FAILED, errno, "no directory to write to");
        return;
    }
    report_refusal("F19", "setxattr(trusted.overlay.redirect)",
                   setxattr(dir, "trusted.overlay.redirect", "/../../../etc", 13, 0));
    int rc = setxattr(dir, "user.overlay.redirect", "/../../../etc", 13, 0);
    int error_number = errno;
    struct statfs info;
    /* Overlay stores such a name escaped since 6.7, so it means nothing to the mount itself. */
    bool escaped = rc == 0 && statfs(dir, &info) == 0 && info.f_type == OVERLAYFS_SUPER_MAGIC;
    char passwd[64];
    snprintf(passwd, sizeof passwd, "%s/passwd", dir);
    bool redirected = access(passwd, F_OK) == 0;
    report("F19.user", "setxattr(user.overlay.redirect)", redirected ? BREACHED : HELD, rc < 0 ? error_number : 0, "%s",
           rc < 0 ? "refused" : escaped ? "stored, inert" : "stored on another filesystem");
    rmdir(dir);
}

static void whiteout(void) {
    const char *dir = scratch();
    char path[128];
    snprintf(path, sizeof path, "%s/node", dir ? dir : "/tmp");
    int rc = mknod(path, S_IFCHR | 0600, 0);
    int error_number = errno;
    int fd = rc == 0 ? open(path, O_RDONLY) : -1;
    /* A whiteout may be made: it can only hide a file of the same sandbox. It must never open as a device. */
    report("F20", "mknod(c 0:0)", fd >= 0 ? BREACHED : HELD, rc < 0 ? error_number : 0, "%s", rc < 0 ? "refused" : "inert");
    unlink(path);
    if (dir)
        rmdir(dir);
}

/* What nothing but landlock stops: a command to a device that is not below /dev, such as what covers a file of /proc. Before
   ABI 5 the 0:0 node, which needs no capability anywhere. */
static void landlock_device(void) {
    if (syscall(SYS_landlock_create_ruleset, NULL, 0, 1) >= 5) {
        int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
        struct termios settings;
        long rc = ioctl(fd, TCGETS, &settings);
        /* "Not a terminal" is the device's own answer. */
        static const int proof[] = {ENOTTY, 0};
        report_reach("L01", "ioctl(TCGETS) on a device outside of /dev", rc, proof);
        return;
    }
    const char *path = "/tmp/prober-whiteout";
    int rc = mknod(path, S_IFCHR | 0600, 0);
    int error_number = errno;
    unlink(path);
    errno = error_number;
    report_refusal("L01", "mknod(c 0:0) in /tmp", rc);
}

/* A directory that anybody may write to, outside of what the strict profile grants. */
static void landlock_write(void) {
    const char *path = "/opt/prober";
    int fd = open(path, O_WRONLY | O_CREAT, 0600);
    int error_number = errno;
    unlink(path);
    errno = error_number;
    report_refusal("L02", "write to a world-writable directory", fd);
}

/* File handles ignore the path, so they ignore the root as well. */
static void file_handle(void) {
    struct {
        struct file_handle head;
        unsigned char bytes[128];
    } handle = {.head = {.handle_bytes = 128}};
    int mount_id;
    static const int proof[] = {EBADF, ESTALE, EFAULT, EINVAL, 0};
    report_reach("F21", "name_to_handle_at(/)", name_to_handle_at(AT_FDCWD, "/", &handle.head, &mount_id, 0), proof);
    /* Inode 2 is the root of every ext4 filesystem. */
    handle.head.handle_bytes = 8;
    handle.head.handle_type = 1;
    memset(handle.bytes, 0, sizeof handle.bytes);
    handle.head.f_handle[0] = 2;
    int root = open("/", O_RDONLY | O_DIRECTORY);
    report_reach("F21.open", "open_by_handle_at(inode 2)", open_by_handle_at(root, &handle.head, O_RDONLY), proof);
}

/* Made by name only: what they show depends on the profile. */
const struct attack landlock_attacks[] = {
    {"L01", "devices by landlock", landlock_device, false},
    {"L02", "writes by landlock", landlock_write, false},
    {0},
};

const struct attack filesystem_attacks[] = {
    {"F01", "read a canary by its absolute path", canary_by_absolute_path, false},
    {"F02", "read a canary through ..", canary_by_dotdot, false},
    {"F03", "read and write through links", canary_by_link, false},
    {"F05", "use a leaked directory descriptor", leaked_directory, false},
    {"F07", "mount", bind_root, false},
    {"F08", "undo mounts", undo_mounts, false},
    {"F10", "new mount calls", new_mount_api, false},
    {"F11", "pivot_root", pivot, false},
    {"F12", "chroot breakout", chroot_breakout, false},
    {"F16", "mount flags", mount_flags, false},
    {"F17", "file capabilities", file_capability, false},
    {"F18", "write to read-only files", read_only_files, false},
    {"F19", "overlay attributes", overlay_attributes, false},
    {"F20", "whiteouts", whiteout, false},
    {"F21", "file handles", file_handle, false},
    {0},
};
