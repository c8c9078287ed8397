//! The system call table against an answer of the kernel for every number.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use sandbox_init::policy::seccomp::{Arch, Options, Verdict, verdict};
use sandbox_runner_tests::prober::Scanned;

/// Fails with every number whose answer inside is not the one of the table. `outside` is what the kernel answers to an ordinary
/// user without our filters.
pub(crate) fn assert_answers(options: &Options, inside: &BTreeMap<u32, Scanned>, outside: &BTreeMap<u32, Scanned>) {
    let mut wrong = String::new();
    let mut compared = 0;
    for number in 0..=LAST {
        let expected = verdict(Arch::NATIVE, options, number, &arguments(number));
        let (Some(inside), Some(outside)) = (inside.get(&number), outside.get(&number)) else {
            panic!("number {number} was not scanned");
        };
        if inside.outcome == "skipped" {
            continue;
        }
        compared += 1;
        if let Some(objection) = objection(expected, inside, outside) {
            let _ = writeln!(wrong, "{number}: {objection}: {expected:?}, inside {inside:?}, outside {outside:?}");
        }
    }
    assert!(compared > 590, "only {compared} numbers were compared");
    assert!(wrong.is_empty(), "{wrong}");
}

const EPERM: i32 = 1;
const ENOSYS: i32 = 38;
/// Last number that is called.
pub(crate) const LAST: u32 = 600;

/// The arguments with which the prober calls `number`.
fn arguments(number: u32) -> [u64; 6] {
    let futex = match Arch::NATIVE {
        Arch::X86_64 => 202,
        Arch::Aarch64 => 98,
    };
    if number == futex { [0; 6] } else { [u64::MAX; 6] }
}

/// Why the answer of the sandbox to one number is wrong.
fn objection(expected: Verdict, inside: &Scanned, outside: &Scanned) -> Option<&'static str> {
    match expected {
        Verdict::Errno(errno) if inside.outcome != "returned" || inside.errno != errno as i32 => {
            Some("the table refuses it with another errno")
        }
        Verdict::Errno(_) => None,
        Verdict::Allow if inside.outcome == "killed" => Some("the table allows it and a filter kills"),
        // The kernel's own refusals: without a filter they are the same.
        Verdict::Allow if inside.errno == ENOSYS && outside.errno != ENOSYS => {
            Some("the table allows it and it does not exist")
        }
        Verdict::Allow if inside.errno == EPERM && outside.errno != EPERM => {
            Some("the table allows it and it is refused")
        }
        Verdict::Allow => None,
    }
}
