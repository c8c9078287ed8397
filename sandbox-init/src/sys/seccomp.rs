//! Loads seccomp filters for the calling thread.
//!
//! The crate's own call is enough here: it copies nothing but the program and is made from a single-threaded process,
//! so there is no other thread to bring along.

use nix::errno::Errno;
use seccompiler::BpfProgram;

/// Adds `program` to the filters of the calling thread; children inherit it, nothing removes it.
///
/// The caller has set `no_new_privs`. (It would be set here as well, because the kernel demands it from everybody
/// without `CAP_SYS_ADMIN`, but a caller that relies on that has its steps in the wrong order.) Of the two filters of
/// the policy the first must be loaded first.
///
/// # Errors
/// `EINVAL` for an empty or malformed program, `EPERM` when an earlier filter forbids further ones, `ENOMEM` when the
/// filters of the thread are too long together.
pub fn install(program: &BpfProgram) -> nix::Result<()> {
    seccompiler::apply_filter(program).map_err(|error| match error {
        seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => {
            Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO))
        }
        _ => Errno::EINVAL,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Profile;
    use crate::policy::seccomp::{Arch, Options, Verdict, entries, filters, verdict};

    /// Every argument has all bits set: no address is valid, no flag set is, no descriptor exists.
    const ARGUMENTS: [u64; 6] = [u64::MAX; 6];

    fn ask_kernel(number: u32) -> nix::Result<nix::libc::c_long> {
        // SAFETY: called for numbers only that the loaded filter answers itself; and were it not loaded, an address of
        // all ones is never mapped, so the kernel could not write to memory of this process.
        let result = unsafe {
            nix::libc::syscall(nix::libc::c_long::from(number), -1_i64, -1_i64, -1_i64, -1_i64, -1_i64, -1_i64)
        };
        Errno::result(result)
    }

    #[test]
    fn the_running_kernel_gives_the_errno_of_the_policy_for_every_number_it_refuses() {
        for profile in Profile::ALL {
            let options = Options { profile, shared_identity: false, no_namespaces: false };
            let answers = std::thread::spawn(move || {
                nix::sys::prctl::set_no_new_privs().expect("no_new_privs");
                for filter in filters(Arch::NATIVE, &options) {
                    install(&filter).expect("the kernel takes the filter");
                }
                (0..=600)
                    .filter_map(|number| match verdict(Arch::NATIVE, &options, number, &ARGUMENTS) {
                        Verdict::Allow => None,
                        Verdict::Errno(errno) => Some((number, errno, ask_kernel(number))),
                    })
                    .collect::<Vec<_>>()
            })
            .join()
            .expect("the confined thread");
            assert!(answers.len() > 200, "only {} numbers are refused", answers.len());
            for (number, errno, answer) in answers {
                let name =
                    entries(Arch::NATIVE).find(|entry| entry.number == number).map_or("unknown", |entry| entry.name);
                assert_eq!(answer, Err(errno), "{profile:?} {name} {number}");
            }
        }
    }

    #[test]
    fn an_empty_program_is_an_error_and_not_a_missing_filter() {
        assert_eq!(install(&Vec::new()), Err(Errno::EINVAL));
    }
}
