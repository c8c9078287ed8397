//! Capability sets of this process (capabilities(7)).

use nix::errno::Errno;

/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Sets effective and permitted to `kept` and empties inheritable.
///
/// # Errors
/// `EPERM` when `kept` holds something that is not permitted now.
#[allow(clippy::cast_possible_truncation, reason = "the low and high half of a 64-bit set")]
pub fn set(kept: u64) -> nix::Result<()> {
    let mut header = Header { version: VERSION, pid: 0 };
    let low = kept as u32;
    let high = (kept >> 32) as u32;
    let data = [
        Data { effective: low, permitted: low, inheritable: 0 },
        Data { effective: high, permitted: high, inheritable: 0 },
    ];
    // SAFETY: header and data have the layout that version 3 demands (two data elements) and outlive the call.
    let rc = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    Errno::result(rc).map(drop)
}

/// The effective set.
///
/// # Errors
/// Never in practice.
pub fn effective() -> nix::Result<u64> {
    let mut header = Header { version: VERSION, pid: 0 };
    let mut data = [Data::default(); 2];
    // SAFETY: header and data have the layout that version 3 demands and outlive the call.
    let rc = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    Errno::result(rc)?;
    Ok(u64::from(data[0].effective) | u64::from(data[1].effective) << 32)
}

/// Drops from the bounding set everything that is not in `kept`, and clears the ambient set.
///
/// # Errors
/// `EPERM` without `CAP_SETPCAP`.
pub fn limit_bounding(kept: u64) -> nix::Result<()> {
    for number in 0..64_u32 {
        if kept & (1 << number) != 0 {
            continue;
        }
        // SAFETY: PR_CAPBSET_DROP takes an integer.
        let rc = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
        match Errno::result(rc) {
            Ok(_) => {}
            // The first number that the kernel does not know ends the list.
            Err(Errno::EINVAL) => break,
            Err(errno) => return Err(errno),
        }
    }
    // SAFETY: PR_CAP_AMBIENT takes integers.
    let rc = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    Errno::result(rc).map(drop)
}
