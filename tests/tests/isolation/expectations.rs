//! Which refusal each attack must meet. A refusal by an unexpected errno is a failure too: it means that another layer
//! than the one we rely on did the work, or that the attack did not reach what it was aimed at.

use sandbox_runner_tests::prober::{Row, Verdict};

/// Identifier (a prefix ends before a dot) and the errnos that count as refused. An empty name means no errno at all: the
/// attack looked and found nothing. The longest matching identifier decides.
const EXPECTED: &[(&str, &[&str])] = &[
    // Files: nothing of the host exists under any name.
    ("F01", &["ENOENT"]),
    ("F02", &["ENOENT"]),
    ("F02.cwd", &[""]),
    ("F03", &["ENOENT", "EACCES", "EPERM"]),
    ("F03.write", &["ENOENT", "EACCES", "EPERM", "EROFS", ""]),
    ("F05", &["EBADF"]),
    ("F07", &["EPERM"]),
    ("F08", &["EPERM"]),
    ("F10", &["EPERM", "ENOSYS"]),
    ("F11", &["EPERM"]),
    // chroot itself is allowed to root inside (debootstrap needs it); leaving it must lead to our own root.
    ("F12", &["EPERM", "ENOENT"]),
    ("F16", &[""]),
    ("F17", &["EPERM", "EOPNOTSUPP"]),
    ("F17.owner", &["", "EPERM", "EINVAL"]),
    ("F18", &["EROFS", "EACCES", "EPERM", "ENOENT"]),
    ("F19", &["EPERM", "EOPNOTSUPP"]),
    ("F19.user", &["", "EPERM", "EOPNOTSUPP"]),
    ("F20", &["", "EPERM", "EACCES"]),
    ("F21", &["EPERM", "ENOSYS", "EOPNOTSUPP"]),
    // Kernel interfaces: masked, read-only or not there.
    ("P01", &["EACCES", "EROFS", "ENOENT", "EPERM"]),
    ("P02", &["EACCES", "EROFS", "ENOENT", "EPERM", "EISDIR"]),
    ("P04", &["EACCES", "EROFS", "ENOENT", "EPERM"]),
    ("P04.list", &["EACCES", "ENOENT", ""]),
    ("P05", &["EACCES", "ENOENT", "EPERM", "EISDIR", "ENOTDIR", "EINVAL", ""]),
    ("P07", &[""]),
    ("P08", &[""]),
    ("P09", &[""]),
    ("P10", &["EPERM", "EACCES", "EROFS"]),
    ("P10.map", &[""]),
    // Namespaces.
    ("N0", &["EPERM"]),
    ("N09", &["EPERM"]),
    ("N10", &["ENOSYS"]),
    ("N10.fork", &[""]),
    ("N11", &["EPERM", "EACCES", "ENOENT"]),
    // Rights.
    ("C01", &[""]),
    ("C02", &["EPERM", ""]),
    ("C03", &["", "EINVAL", "EPERM"]),
    ("C04", &[""]),
    ("C05", &["EPERM", "EINVAL", "EACCES", "ENOENT", "ESRCH"]),
    ("C06", &["EPERM", "EACCES", "EROFS", "ENOENT"]),
    ("C07", &["EPERM", "EACCES", "ENOENT", "ESRCH", "ENOSYS", ""]),
    // Process 1 and inheritance.
    ("I00", &[""]),
    ("I01", &["EPERM"]),
    ("I02", &["EPERM"]),
    ("I04", &["EBADF"]),
    ("I08", &[""]),
    ("I09", &["ENXIO", "ENOENT"]),
    // Calls.
    ("S", &["EPERM", "ENOSYS"]),
    ("S01", &["ENOSYS"]),
    ("S16", &["EPERM"]),
    ("S19", &["EACCES", "EPERM"]),
    ("S20", &["ENOSYS"]),
    ("S21", &["ENOSYS", ""]),
    ("R15", &["EPERM"]),
    ("R17", &["EPERM"]),
    // The neighbour.
    ("T01", &["ECONNREFUSED", "EADDRNOTAVAIL", "ENETUNREACH"]),
    ("T02", &["ECONNREFUSED", "EPERM"]),
    ("T03", &["ENOENT"]),
    ("T03.number", &["EINVAL"]),
    ("T04", &["ENOENT"]),
    ("T05", &["ENOENT"]),
    ("T06", &[""]),
    ("T07", &["ESRCH"]),
    // Devices.
    ("D01", &["EPERM", "EACCES", "EROFS", "ENOENT"]),
    ("D03", &["ENOENT"]),
    ("D04", &[""]),
    ("D05", &["", "EPERM", "ENOENT", "EACCES"]),
    // Network: an immediate error, never silence.
    ("W0", &["ENETUNREACH", "ECONNREFUSED", "EHOSTUNREACH", "EACCES", "EPERM", "EADDRNOTAVAIL", "EINVAL"]),
    ("W1", &["ENETUNREACH", "ECONNREFUSED", "EHOSTUNREACH", "EACCES", "EPERM", "EADDRNOTAVAIL"]),
    ("W03", &["ECONNREFUSED", "EPERM"]),
    ("W04", &["ENOENT", "EACCES"]),
    ("W05", &[""]),
    ("W06", &["EPERM", "EACCES", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "EAFNOSUPPORT"]),
    ("W07", &["EPERM", "EPROTONOSUPPORT", "EAFNOSUPPORT"]),
    ("W13", &["EPERM", "EAFNOSUPPORT"]),
    ("W15", &["EPERM", "EAFNOSUPPORT"]),
];

/// Fails with every row that is not the refusal we expect.
pub(crate) fn assert_held(rows: &[Row]) {
    let wrong: Vec<String> = rows.iter().filter(|row| !is_expected(row)).map(ToString::to_string).collect();
    assert!(
        wrong.is_empty(),
        "{} of {} attacks were not refused as they must be:\n  {}",
        wrong.len(),
        rows.len(),
        wrong.join("\n  ")
    );
}

fn is_expected(row: &Row) -> bool {
    match row.result {
        Verdict::Absent => true,
        Verdict::Breached | Verdict::Error => false,
        // Killed by a filter: refused, and there is no errno.
        Verdict::Held if row.detail.starts_with("killed by signal") => true,
        Verdict::Held => errnos(&row.id).is_some_and(|errnos| errnos.contains(&row.errno.as_str())),
    }
}

fn errnos(id: &str) -> Option<&'static [&'static str]> {
    EXPECTED
        .iter()
        .filter(|(prefix, _)| id.starts_with(prefix))
        .max_by_key(|(prefix, _)| prefix.len())
        .map(|(_, errnos)| *errnos)
}

#[test]
fn longest_identifier_decides_and_an_unknown_attack_is_never_expected() {
    assert_eq!(errnos("W03"), Some(&["ECONNREFUSED", "EPERM"][..]));
    assert_eq!(errnos("F02.cwd"), Some(&[""][..]));
    assert_eq!(errnos("X99"), None);
}
