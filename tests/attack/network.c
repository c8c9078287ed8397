/* W: reaching anything outside, and the kernel's own network interfaces. */
#include "prober.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* Fills `to` from an address in either notation. Returns its length, 0 if the text is no address. */
static socklen_t address(const char *text, int port, struct sockaddr_storage *to) {
    memset(to, 0, sizeof *to);
    struct sockaddr_in *four = (struct sockaddr_in *)to;
    struct sockaddr_in6 *six = (struct sockaddr_in6 *)to;
    if (inet_pton(AF_INET, text, &four->sin_addr) == 1) {
        four->sin_family = AF_INET;
        four->sin_port = htons((unsigned short)port);
        return sizeof *four;
    }
    if (inet_pton(AF_INET6, text, &six->sin6_addr) == 1) {
        six->sin6_family = AF_INET6;
        six->sin6_port = htons((unsigned short)port);
        return sizeof *six;
    }
    return 0;
}

/*
 * Connects without waiting longer than a second. A refusal must come at once: an attempt that is still pending has
 * left this machine or is being dropped, and both are wrong here.
 */
static long try_connect(const char *text, int port, int type) {
    struct sockaddr_storage to;
    socklen_t length = address(text, port, &to);
    int fd = length ? socket(to.ss_family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0) : -1;
    if (fd < 0)
        return -1;
    int rc = connect(fd, (struct sockaddr *)&to, length);
    if (rc < 0 && errno == EINPROGRESS) {
        struct pollfd wait_for = {.fd = fd, .events = POLLOUT};
        if (poll(&wait_for, 1, 1000) == 0)
            return 2;
        int error_number = 0;
        socklen_t size = sizeof error_number;
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &error_number, &size);
        errno = error_number;
        rc = error_number ? -1 : 0;
    }
    if (rc == 0 && type == SOCK_DGRAM)
        rc = (int)send(fd, "x", 1, 0);
    int error_number = errno;
    close(fd);
    errno = error_number;
    return rc;
}

static void try_both(const char *id, const char *text, int port) {
    char what[128];
    snprintf(what, sizeof what, "tcp %s port %d", text, port);
    report_refusal(id, what, try_connect(text, port, SOCK_STREAM));
    snprintf(what, sizeof what, "udp %s port %d", text, port);
    report_refusal(id, what, try_connect(text, port, SOCK_DGRAM));
}

static void outside(void) {
    static const struct {
        const char *id, *address;
        int port;
    } targets[] = {
        {"W01", "169.254.169.254", 80}, {"W01", "fd00:ec2::254", 80},   {"W01", "100.100.100.200", 80}, {"W01", "169.254.170.2", 80},
        {"W08", "10.0.0.1", 22},        {"W08", "172.17.0.1", 2375},    {"W08", "192.168.0.1", 80},     {"W08", "fe80::1", 22},
        {"W08", "224.0.0.1", 5353},     {"W08", "255.255.255.255", 67}, {"W10", "192.0.2.53", 53},      {"W10", "198.51.100.9", 853},
        {"W11", "2001:db8::1", 443},    {"W11", "203.0.113.7", 443},
    };
    if (!settings.external)
        return;
    for (size_t i = 0; i < COUNT(targets); i++)
        try_both(targets[i].id, targets[i].address, targets[i].port);
}

static void host_listener(void) {
    static const char *const names[] = {"127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"};
    if (!settings.port)
        return;
    char what[128];
    for (size_t i = 0; i < COUNT(names); i++) {
        snprintf(what, sizeof what, "tcp %s, the host's listener", names[i]);
        report_refusal("W02", what, try_connect(names[i], settings.port, SOCK_STREAM));
    }
    for (int i = 0; i < settings.addresses.count; i++) {
        snprintf(what, sizeof what, "tcp %s, the host's listener", settings.addresses.item[i]);
        report_refusal("W02.host", what, try_connect(settings.addresses.item[i], settings.port, SOCK_STREAM));
    }
}

static void connect_unix(const char *id, const char *name, bool abstract_name, int type) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    size_t length = strlen(name);
    if (length + 1 >= sizeof to.sun_path)
        return;
    memcpy(to.sun_path + (abstract_name ? 1 : 0), name, length);
    int fd = socket(AF_UNIX, type, 0);
    int rc = fd < 0 ? -1
                    : connect(fd, (struct sockaddr *)&to,
                              (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + 1));
    report_refusal(id, name, rc);
    if (fd >= 0)
        close(fd);
}

static void unix_sockets(void) {
    if (settings.abstract_name)
        connect_unix("W03", settings.abstract_name, true, SOCK_STREAM);
    for (int i = 0; i < settings.sockets.count; i++)
        connect_unix("W04", settings.sockets.item[i], false, SOCK_STREAM);
    static const char *const usual[] = {"/run/docker.sock",
                                        "/var/run/docker.sock",
                                        "/run/containerd/containerd.sock",
                                        "/run/crio/crio.sock",
                                        "/run/podman/podman.sock",
                                        "/run/dbus/system_bus_socket",
                                        "/run/systemd/private",
                                        "/run/systemd/journal/stdout",
                                        "/run/systemd/notify",
                                        "/run/sandbox-runner/launcher.sock",
                                        "/run/sandbox-runner/admin.sock",
                                        "/run/nscd/socket",
                                        "/run/snapd.socket"};
    for (size_t i = 0; i < COUNT(usual); i++)
        connect_unix("W04.usual", usual[i], false, SOCK_STREAM);
}

static void interfaces(void) {
    struct if_nameindex *list = if_nameindex();
    int others = 0;
    char first[IF_NAMESIZE] = "";
    for (struct if_nameindex *i = list; i && i->if_index; i++)
        if (strcmp(i->if_name, "lo") != 0 && others++ == 0)
            snprintf(first, sizeof first, "%s", i->if_name);
    report("W05", "interfaces besides loopback", others ? BREACHED : HELD, 0, "%d, first %s", others, first);
    char text[8192];
    ssize_t length = read_small("/proc/net/route", text, sizeof text);
    char *second = length > 0 ? strchr(text, '\n') : NULL;
    report("W05.route", "routes", second && second[1] ? BREACHED : HELD, 0, "%s", second && second[1] ? "present" : "none");
    length = read_small("/proc/net/unix", text, sizeof text);
    bool shown = length > 0 && settings.abstract_name && strstr(text, settings.abstract_name);
    report("W05.unix", "the host's abstract sockets in /proc/net/unix", shown ? BREACHED : HELD, 0, "%s",
           shown ? "shown" : "not shown");
}

static void raw_sockets(void) {
    static const struct {
        const char *what;
        int family, type, protocol;
    } list[] = {
        {"raw icmp", AF_INET, SOCK_RAW, IPPROTO_ICMP},       {"raw icmp6", AF_INET6, SOCK_RAW, IPPROTO_ICMPV6},
        {"raw tcp", AF_INET, SOCK_RAW, IPPROTO_TCP},         {"raw ip", AF_INET, SOCK_RAW, IPPROTO_RAW},
        {"packet raw", AF_PACKET, SOCK_RAW, 0x0300},         {"packet datagram", AF_PACKET, SOCK_DGRAM, 0x0300},
        {"packet old", AF_INET, SOCK_PACKET, 0x0300},
    };
    for (size_t i = 0; i < COUNT(list); i++)
        report_refusal("W06", list[i].what, socket(list[i].family, list[i].type, list[i].protocol));
}

/* Asks the kernel to change loopback into what it already is: without effect, but only for an administrator. */
static void netlink(void) {
    struct {
        struct nlmsghdr head;
        struct ifinfomsg link;
    } request = {.head = {.nlmsg_len = sizeof request, .nlmsg_type = RTM_NEWLINK, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK},
                 .link = {.ifi_family = AF_UNSPEC, .ifi_index = 1}};
    struct {
        struct nlmsghdr head;
        struct nlmsgerr error;
        char rest[512];
    } answer;
    int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
    long rc = fd;
    if (fd >= 0 && send(fd, &request, sizeof request, 0) == sizeof request && recv(fd, &answer, sizeof answer, 0) > 0) {
        errno = answer.head.nlmsg_type == NLMSG_ERROR ? -answer.error.error : 0;
        rc = errno ? -1 : 0;
    }
    report_refusal("W07", "change a network interface", rc);
    static const struct {
        const char *what;
        int protocol;
    } list[] = {{"netlink netfilter", NETLINK_NETFILTER}, {"netlink audit", NETLINK_AUDIT}, {"netlink uevent", NETLINK_KOBJECT_UEVENT},
                {"netlink connector", NETLINK_CONNECTOR}, {"netlink xfrm", NETLINK_XFRM},   {"netlink generic", NETLINK_GENERIC},
                {"netlink selinux", NETLINK_SELINUX},     {"netlink crypto", NETLINK_CRYPTO}, {"netlink iscsi", NETLINK_ISCSI},
                {"netlink sock_diag", NETLINK_SOCK_DIAG}};
    for (size_t i = 0; i < COUNT(list); i++)
        report_refusal("W07.socket", list[i].what, socket(AF_NETLINK, SOCK_RAW, list[i].protocol));
}

/* Every family but the four that programs use. */
static void families(void) {
    static const int types[] = {SOCK_STREAM, SOCK_DGRAM, SOCK_RAW, SOCK_SEQPACKET};
    for (int family = 0; family < 64; family++) {
        if (family == AF_UNIX || family == AF_INET || family == AF_INET6 || family == AF_NETLINK)
            continue;
        int fd = -1, error_number = EAFNOSUPPORT;
        for (size_t t = 0; t < COUNT(types) && fd < 0; t++) {
            fd = socket(family, types[t], 0);
            if (fd < 0 && errno != EAFNOSUPPORT)
                error_number = errno;
        }
        char what[64];
        snprintf(what, sizeof what, "socket family %d%s", family,
                 family == AF_VSOCK  ? " (vsock)"
                 : family == AF_ALG  ? " (alg)"
                 : family == AF_PACKET ? " (packet)"
                 : family == 44      ? " (xdp)"
                                     : "");
        errno = error_number;
        report_refusal("W15", what, fd);
    }
}

static void hypervisor(void) {
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK, 0);
    report_refusal("W13", "vsock", fd);
}

const struct attack network_attacks[] = {
    {"W01", "addresses outside", outside, true},
    {"W02", "the host's listener", host_listener, false},
    {"W03", "the host's unix sockets", unix_sockets, false},
    {"W05", "interfaces and routes", interfaces, false},
    {"W06", "raw sockets", raw_sockets, false},
    {"W07", "netlink", netlink, false},
    {"W13", "hypervisor sockets", hypervisor, false},
    {"W15", "socket families", families, false},
    {0},
};
