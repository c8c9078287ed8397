//! Asks the kernel for its landlock version. The crate keeps its own answer to itself.

use nix::errno::Errno;

/// The landlock ABI of the running kernel.
///
/// # Errors
/// `ENOSYS` when landlock is not built in (or a seccomp filter around us hides it), `EOPNOTSUPP` when it is not
/// enabled.
pub fn abi() -> nix::Result<i32> {
    const LANDLOCK_CREATE_RULESET_VERSION: nix::libc::c_uint = 1;
    // SAFETY: with the version flag landlock_create_ruleset(2) demands a null pointer and the size 0, reads no memory
    // and makes no descriptor.
    let version = unsafe {
        nix::libc::syscall(
            nix::libc::SYS_landlock_create_ruleset,
            std::ptr::null::<nix::libc::c_void>(),
            0_usize,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    Errno::result(version).map(|version| i32::try_from(version).unwrap_or(i32::MAX))
}
