//! The filters mean what the table says, for every number of both architectures and all options.

use std::collections::{BTreeMap, BTreeSet};

use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::SeccompCmpOp::{Eq, MaskedEq, Ne};
use seccompiler::{SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch};

use super::interpret::{Answer, Call, single, stacked};
use super::rule::{Rule, Test};
use super::*;

const ARCHES: [Arch; 2] = [Arch::X86_64, Arch::Aarch64];

fn all_options() -> Vec<Options> {
    Profile::ALL
        .into_iter()
        .flat_map(|profile| {
            // No sandbox without namespaces shares its identity with process 1.
            [(false, false), (true, false), (false, true)].map(|(shared_identity, no_namespaces)| Options {
                profile,
                shared_identity,
                no_namespaces,
            })
        })
        .collect()
}

fn number(arch: Arch, name: &str) -> u32 {
    let call = SYSTEM_CALLS.iter().find(|call| call.name == name).expect("a name of the table");
    call.number(arch).expect("a call of this architecture")
}

fn ask(arch: Arch, options: &Options, number: u32, arguments: [u64; 6]) -> Answer {
    let [first, last] = filters(arch, options);
    stacked(&[&first, &last], &Call::new(arch, number, arguments))
}

fn as_answer(verdict: Verdict) -> Answer {
    match verdict {
        Verdict::Allow => Answer::Allow,
        Verdict::Errno(errno) => Answer::Errno(u32::try_from(errno as i32).expect("errnos are positive")),
    }
}

/// Values that can make a difference to a rule, and neighbours of them.
fn interesting_values() -> Vec<u64> {
    let mut low = BTreeSet::from([0, 1, 2, 3, 5, 10, u32::MAX, u32::MAX - 1, u32::MAX - 2, 1 << 31, 0x80]);
    for call in SYSTEM_CALLS {
        let Rule::Clauses(clauses) = call.rule else { continue };
        for test in clauses.iter().flat_map(|clause| clause.tests) {
            match test {
                Test::In { values, .. } => {
                    low.extend(values.iter().flat_map(|value| [*value, value ^ 1, value | 0x800]))
                }
                Test::AnyBit { bits, .. } => {
                    low.extend((0..32).map(|bit| 1 << bit).filter(|bit| bits & bit != 0));
                    low.extend([*bits, !bits]);
                }
            }
        }
    }
    low.into_iter().map(u64::from).flat_map(|value| [value, value | 0xdead_beef_0000_0000]).collect()
}

/// The arguments of a rule: combinations of interesting values where it looks, all zero where it does not.
fn interesting_arguments(rule: Rule) -> Vec<[u64; 6]> {
    let Rule::Clauses(clauses) = rule else { return vec![[0; 6], [u64::MAX; 6], [1, 2, 3, 4, 5, 6]] };
    let tested: BTreeSet<usize> = clauses
        .iter()
        .flat_map(|clause| clause.tests)
        .map(|test| match test {
            Test::In { argument, .. } | Test::AnyBit { argument, .. } => usize::from(*argument),
        })
        .collect();
    let values = interesting_values();
    let few: Vec<u64> =
        [0, 1, 2, 3, 5, 6, 10, 15, 17, 58, 262, 0x8_0001, 0x802, u64::from(u32::MAX), 1 << 32, (1 << 32) | 1]
            .into_iter()
            .collect();
    let mut all = vec![[0; 6]];
    for (position, argument) in tested.iter().enumerate() {
        // One full dimension and small others keep the number of combinations in bounds.
        let choices = if position == 0 || tested.len() < 3 { &values } else { &few };
        all = all
            .iter()
            .flat_map(|arguments| {
                choices.iter().map(|value| {
                    let mut arguments = *arguments;
                    arguments[*argument] = *value;
                    arguments
                })
            })
            .collect();
    }
    all
}

#[test]
fn filters_answer_as_the_table_says_for_every_number_and_all_options() {
    let mut checked = 0_u64;
    for (arch, options) in ARCHES.into_iter().flat_map(|arch| all_options().into_iter().map(move |o| (arch, o))) {
        let [first, last] = filters(arch, &options);
        for number in (0..=600).chain([1000, 9999, 0x3fff_ffff, 0x4000_0000, 0x7fff_ffff, 0x8000_0000, u32::MAX]) {
            let call = SYSTEM_CALLS.iter().find(|call| call.number(arch) == Some(number));
            let rule = call.map_or(Rule::Always(ABSENT), |call| call.rule);
            for arguments in interesting_arguments(rule) {
                let expected = as_answer(verdict(arch, &options, number, &arguments));
                let actual = stacked(&[&first, &last], &Call::new(arch, number, arguments));
                assert_eq!(actual, expected, "{arch:?} {options:?} number {number} arguments {arguments:x?}");
                checked += 1;
            }
        }
    }
    assert!(checked > 100_000, "only {checked} combinations");
}

#[test]
fn at_most_one_of_the_two_filters_answers_with_an_errno_of_its_own() {
    for (arch, options) in ARCHES.into_iter().flat_map(|arch| all_options().into_iter().map(move |o| (arch, o))) {
        let [first, last] = filters(arch, &options);
        for number in 0..=600 {
            let call = Call::new(arch, number, [0x7e02_0000; 6]);
            let (first, last) = (single(&first, &call).0, single(&last, &call).0);
            if let (Answer::Errno(_), Answer::Errno(last)) = (first, last) {
                // Free numbers of the first filter take the answer of their neighbours; the last one has the say.
                assert_eq!(last, Errno::ENOSYS as u32, "{arch:?} {options:?} number {number}");
            }
        }
    }
}

#[test]
fn the_first_filter_lets_the_last_one_be_loaded() {
    for (arch, options) in ARCHES.into_iter().flat_map(|arch| all_options().into_iter().map(move |o| (arch, o))) {
        let [first, _] = filters(arch, &options);
        for name in ["seccomp", "prctl"] {
            let call = Call::new(arch, number(arch, name), [u64::MAX; 6]);
            assert_eq!(single(&first, &call).0, Answer::Allow, "{arch:?} {options:?} {name}");
        }
    }
}

#[test]
fn numbers_of_another_architecture_kill_the_process() {
    const I386: u32 = 0x4000_0003;
    const ARM: u32 = 0x4000_0028;
    for arch in ARCHES {
        let other = if arch == Arch::X86_64 { Arch::Aarch64 } else { Arch::X86_64 };
        for filter in
            filters(arch, &Options { profile: Profile::Standard, shared_identity: false, no_namespaces: false })
        {
            for audit in [I386, ARM, other.audit(), 0, u32::MAX] {
                let call = Call { audit, number: number(arch, "getpid"), arguments: [0; 6] };
                assert_eq!(single(&filter, &call).0, Answer::KillProcess, "{arch:?} entered as {audit:#x}");
            }
        }
    }
}

#[test]
fn x32_numbers_do_not_exist() {
    for options in all_options() {
        for name in ["read", "execve", "clone", "socket"] {
            let x32 = number(Arch::X86_64, name) | 0x4000_0000;
            assert_eq!(ask(Arch::X86_64, &options, x32, [0; 6]), Answer::Errno(Errno::ENOSYS as u32), "{name}");
        }
    }
}

/// The policy a second time, by hand and for seccompiler: what is allowed with shared identity off.
fn allowlist(arch: Arch, profile: Profile) -> SeccompFilter {
    let condition =
        |argument, operator, value| SeccompCondition::new(argument, Dword, operator, value).expect("condition");
    let all = |conditions: Vec<SeccompCondition>| SeccompRule::new(conditions).expect("rule");
    let standard = profile == Profile::Standard;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in SYSTEM_CALLS {
        let Some(number) = call.number(arch) else { continue };
        let allowed = match call.name {
            "clone" => vec![all(vec![condition(0, MaskedEq(0x7e02_0000), 0)])],
            "socket" => {
                let mut allowed = vec![all(vec![condition(0, Eq, 1)])];
                for (domain, kind, protocol) in [2, 10].into_iter().flat_map(|domain| {
                    [1, 2].into_iter().flat_map(move |kind| [0, 1, 6, 17, 58].map(|protocol| (domain, kind, protocol)))
                }) {
                    allowed.push(all(vec![
                        condition(0, Eq, domain),
                        condition(1, MaskedEq(0xf), kind),
                        condition(2, Eq, protocol),
                    ]));
                }
                if standard {
                    allowed.push(all(vec![condition(0, Eq, 16), condition(2, Eq, 0)]));
                }
                allowed
            }
            "socketpair" => vec![all(vec![condition(0, Eq, 1)])],
            "ioctl" => {
                vec![all([0x5412, 0x541c, 0x5423, 0x401c_5820].map(|command| condition(1, Ne, command)).to_vec())]
            }
            "personality" => {
                let bits: u32 = if standard { !0x6_0008 } else { !0x2_0008 };
                vec![all(vec![condition(0, Eq, 0xffff_ffff)]), all(vec![condition(0, MaskedEq(bits.into()), 0)])]
            }
            "prctl" if !standard => vec![all(vec![condition(0, Ne, 22)])],
            "seccomp" if standard => vec![all(vec![condition(1, MaskedEq(8), 0)])],
            "seccomp" | "chroot" | "ptrace" | "process_vm_readv" | "process_vm_writev" if !standard => continue,
            _ if matches!(call.rule, Rule::Always(Verdict::Errno(_))) => continue,
            _ => vec![],
        };
        rules.insert(number.into(), allowed);
    }
    let target = if arch == Arch::X86_64 { TargetArch::x86_64 } else { TargetArch::aarch64 };
    let refused = SeccompAction::Errno(Errno::EPERM as u32);
    SeccompFilter::new(rules, refused, SeccompAction::Allow, target).expect("an allowlist")
}

#[test]
fn the_short_form_allows_exactly_what_a_plain_allowlist_allows() {
    for (arch, profile) in ARCHES.into_iter().flat_map(|arch| Profile::ALL.map(|profile| (arch, profile))) {
        let options = Options { profile, shared_identity: false, no_namespaces: false };
        let [first, last] = filters(arch, &options);
        let plain: BpfProgram = allowlist(arch, profile).try_into().expect("a program");
        for number in 0..=600 {
            let call = SYSTEM_CALLS.iter().find(|call| call.number(arch) == Some(number));
            for arguments in interesting_arguments(call.map_or(Rule::Always(ABSENT), |call| call.rule)) {
                let call = Call::new(arch, number, arguments);
                let short = stacked(&[&first, &last], &call) == Answer::Allow;
                let long = single(&plain, &call).0 == Answer::Allow;
                assert_eq!(short, long, "{arch:?} {options:?} number {number} arguments {arguments:x?}");
            }
        }
    }
}

#[test]
fn names_and_numbers_agree_with_the_table_of_seccompiler() {
    let mut known = 0;
    for call in SYSTEM_CALLS {
        for (arch, target) in [(Arch::X86_64, TargetArch::x86_64), (Arch::Aarch64, TargetArch::aarch64)] {
            let json = format!(
                r#"{{"t":{{"mismatch_action":"allow","match_action":"trap","filter":[{{"syscall":"{}"}}]}}}}"#,
                call.name
            );
            let Ok(programs) = seccompiler::compile_from_json(json.as_bytes(), target) else { continue };
            known += 1;
            let number = call.number(arch).unwrap_or_else(|| panic!("{} exists on {arch:?}", call.name));
            let compared: Vec<u32> = programs["t"]
                .iter()
                .filter(|instruction| instruction.code == 0x15)
                .map(|instruction| instruction.k)
                .collect();
            assert!(compared.contains(&number), "{} is {compared:?} on {arch:?}, not {number}", call.name);
        }
    }
    assert!(known > 600, "seccompiler knew only {known} names");
}

#[test]
fn the_table_is_ordered_complete_and_gives_its_reasons() {
    let mut previous = None;
    for call in SYSTEM_CALLS {
        let number = call.number(Arch::X86_64).expect("every call exists on x86_64");
        assert!(previous < Some(number), "{} is out of order", call.name);
        previous = Some(number);
        assert!(call.rule == Rule::Always(Verdict::Allow) || !call.reason.is_empty(), "{} has no reason", call.name);
    }
    let numbers = |arch: Arch| -> BTreeSet<u32> { SYSTEM_CALLS.iter().filter_map(|call| call.number(arch)).collect() };
    // Numbers no kernel up to 6.18 has: 337 to 423 on x86_64; on aarch64 those kept for other architectures.
    assert_eq!(numbers(Arch::X86_64), (0..=336).chain(424..=469).collect());
    assert_eq!(numbers(Arch::Aarch64), (0..=243).chain(260..=294).chain(424..=469).collect());
    let count = SYSTEM_CALLS.iter().filter(|call| call.number(Arch::Aarch64).is_some()).count();
    assert_eq!(count, numbers(Arch::Aarch64).len(), "a number of aarch64 is given twice");
}

#[test]
fn every_rule_with_clauses_ends_unconditionally_and_tests_only_bits_it_keeps() {
    for call in SYSTEM_CALLS {
        let Rule::Clauses(clauses) = call.rule else { continue };
        for options in all_options() {
            if let Decision::Ordered(left) = call.rule.resolve(&options) {
                assert!(left.last().is_some_and(|clause| clause.tests.is_empty()), "{} under {options:?}", call.name);
            }
        }
        for test in clauses.iter().flat_map(|clause| clause.tests) {
            if let Test::In { mask, values, .. } = test {
                assert!(!values.is_empty() && values.iter().all(|value| value & !mask == 0), "{}", call.name);
            }
        }
    }
}

#[test]
fn socket_families_and_protocols_beyond_the_common_ones_are_refused() {
    let errno = |errno: Errno| Answer::Errno(errno as u32);
    let cases = [
        // domain, type, protocol, standard, strict
        (1, 1, 0, Answer::Allow, Answer::Allow),
        (2, 0x80801, 6, Answer::Allow, Answer::Allow),
        (10, 2, 58, Answer::Allow, Answer::Allow),
        (2, 3, 1, errno(Errno::EPERM), errno(Errno::EPERM)),
        // SOCK_PACKET: AF_PACKET by another name.
        (2, 10, 0x0300, errno(Errno::EPERM), errno(Errno::EPERM)),
        (2, 1, 262, errno(Errno::EPROTONOSUPPORT), errno(Errno::EPROTONOSUPPORT)),
        (2, 1, 132, errno(Errno::EPROTONOSUPPORT), errno(Errno::EPROTONOSUPPORT)),
        (16, 3, 0, Answer::Allow, errno(Errno::EAFNOSUPPORT)),
        (16, 3, 9, errno(Errno::EPROTONOSUPPORT), errno(Errno::EAFNOSUPPORT)),
        (17, 3, 0, errno(Errno::EAFNOSUPPORT), errno(Errno::EAFNOSUPPORT)),
        (38, 5, 0, errno(Errno::EAFNOSUPPORT), errno(Errno::EAFNOSUPPORT)),
        (40, 1, 0, errno(Errno::EAFNOSUPPORT), errno(Errno::EAFNOSUPPORT)),
    ];
    for (domain, kind, protocol, standard, strict) in cases {
        for (profile, expected) in [(Profile::Standard, standard), (Profile::Strict, strict)] {
            let options = Options { profile, shared_identity: false, no_namespaces: false };
            // The kernel ignores the upper half of an `int`, so it must not open a way around.
            for high in [0, 0xffff_ffff_0000_0000] {
                let arguments = [domain | high, kind | high, protocol | high, 0, 0, 0];
                let answer = ask(Arch::NATIVE, &options, number(Arch::NATIVE, "socket"), arguments);
                assert_eq!(answer, expected, "{profile:?} socket({domain}, {kind}, {protocol}) high {high:x}");
            }
        }
    }
}

/// One caller can take all asynchronous requests that the machine has (`fs.aio-max-nr`): no namespace and no group counts
/// them.
#[test]
fn requests_that_are_counted_for_the_whole_machine_do_not_exist() {
    for (arch, options) in ARCHES.into_iter().flat_map(|arch| all_options().into_iter().map(move |o| (arch, o))) {
        for name in ["io_setup", "io_destroy", "io_getevents", "io_pgetevents", "io_submit", "io_cancel"] {
            let answer = ask(arch, &options, number(arch, name), [1, 0, 0, 0, 0, 0]);
            assert_eq!(answer, as_answer(super::rule::ABSENT), "{arch:?} {options:?} {name}");
        }
    }
}

#[test]
fn terminal_injection_is_refused_whatever_the_upper_half_says() {
    for options in all_options() {
        for command in [0x5412, 0x541c, 0xffff_ffff_0000_5412, 0x1_0000_541c] {
            let answer = ask(Arch::NATIVE, &options, number(Arch::NATIVE, "ioctl"), [0, command, 0, 0, 0, 0]);
            assert_eq!(answer, Answer::Errno(Errno::EPERM as u32), "{command:#x}");
        }
        let tcgets = ask(Arch::NATIVE, &options, number(Arch::NATIVE, "ioctl"), [0, 0x5401, 0, 0, 0, 0]);
        assert_eq!(tcgets, Answer::Allow);
    }
}

#[test]
fn with_a_shared_identity_nothing_can_be_aimed_at_process_1_or_the_spawner() {
    let minus = |pid: i64| u64::from_le_bytes(pid.to_le_bytes());
    let attacks: &[(&str, [u64; 3])] = &[
        ("kill", [1, 9, 0]),
        ("kill", [2, 9, 0]),
        ("kill", [0xffff_ffff_0000_0002, 9, 0]),
        ("kill", [minus(-1), 9, 0]),
        ("kill", [0xffff_ffff, 9, 0]),
        ("kill", [minus(-2), 9, 0]),
        ("tkill", [2, 9, 0]),
        ("tgkill", [2, 2, 9]),
        ("rt_sigqueueinfo", [1, 9, 0]),
        ("rt_tgsigqueueinfo", [2, 2, 9]),
        ("pidfd_open", [1, 0, 0]),
        ("pidfd_send_signal", [3, 9, 0]),
        ("prlimit64", [1, 7, 0]),
        ("sched_setaffinity", [2, 8, 0]),
        ("sched_setscheduler", [1, 0, 0]),
        ("sched_setparam", [1, 0, 0]),
        ("sched_setattr", [1, 0, 0]),
        ("setpriority", [0, 1, 19]),
        ("setpriority", [1, 2, 19]),
        ("setpriority", [2, 0, 19]),
        ("ioprio_set", [1, 2, 0]),
        ("ioprio_set", [2, 1, 0]),
        ("ioprio_set", [3, 0, 0]),
        ("fcntl", [5, 8, 2]),
        ("fcntl", [5, 8, minus(-2)]),
        ("fcntl", [5, 15, 0]),
        ("ioctl", [5, 0x8901, 0]),
        ("ioctl", [5, 0x8902, 0]),
    ];
    for (name, [a, b, c]) in attacks {
        let arguments = [*a, *b, *c, 0, 0, 0];
        for (arch, profile) in ARCHES.into_iter().flat_map(|arch| Profile::ALL.map(|profile| (arch, profile))) {
            let number = number(arch, name);
            let shared =
                ask(arch, &Options { profile, shared_identity: true, no_namespaces: false }, number, arguments);
            let separate =
                ask(arch, &Options { profile, shared_identity: false, no_namespaces: false }, number, arguments);
            assert_eq!(shared, Answer::Errno(Errno::EPERM as u32), "{arch:?} {name} {arguments:x?}");
            assert_eq!(separate, Answer::Allow, "the kernel itself decides on {name} where ids differ");
        }
    }
}

#[test]
fn with_a_shared_identity_ordinary_use_goes_on() {
    let options = Options { profile: Profile::Standard, shared_identity: true, no_namespaces: false };
    let uses: &[(&str, [u64; 3])] = &[
        ("kill", [0, 15, 0]),
        ("kill", [4711, 9, 0]),
        ("kill", [u64::from(u32::MAX) - 4710, 9, 0]),
        ("prlimit64", [0, 7, 0]),
        ("sched_setaffinity", [0, 8, 0]),
        ("setpriority", [0, 0, 10]),
        ("ioprio_set", [1, 0, 0]),
        ("fcntl", [5, 2, 1]),
        ("fcntl", [5, 8, 4711]),
    ];
    for (name, [a, b, c]) in uses {
        let answer = ask(Arch::NATIVE, &options, number(Arch::NATIVE, name), [*a, *b, *c, 0, 0, 0]);
        assert_eq!(answer, Answer::Allow, "{name} {a} {b} {c}");
    }
}

#[test]
fn instruction_counts_stay_small() {
    for (arch, options) in ARCHES.into_iter().flat_map(|arch| all_options().into_iter().map(move |o| (arch, o))) {
        let [first, last] = filters(arch, &options);
        let path = |filter: &BpfProgram| {
            (0..=600).map(|number| single(filter, &Call::new(arch, number, [0; 6])).1).max().expect("some number")
        };
        println!(
            "{arch:?} {options:?}: {} + {} instructions, longest path {} + {}",
            first.len(),
            last.len(),
            path(&first),
            path(&last)
        );
        assert!(first.len() + last.len() < 400, "{} + {}", first.len(), last.len());
        // The kernel walks this once per number when a filter is loaded.
        assert!(path(&first) < 40 && path(&last) < 20, "{} and {}", path(&first), path(&last));
    }
}

mod real_kernel {
    use std::os::fd::AsRawFd;

    use nix::sched::{CloneFlags, unshare};
    use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

    use super::*;
    use crate::sys;

    /// Runs `body` in a thread that has both filters. A filter binds its thread only and ends with it.
    fn confined<T: Send + 'static>(profile: Profile, body: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(move || {
            nix::sys::prctl::set_no_new_privs().expect("no_new_privs");
            for filter in filters(Arch::NATIVE, &Options { profile, shared_identity: false, no_namespaces: false }) {
                sys::seccomp::install(&filter).expect("the kernel takes the filter");
            }
            body()
        })
        .join()
        .expect("the confined thread")
    }

    #[test]
    fn the_kernel_refuses_what_the_table_refuses() {
        let (unshared, vsock, internet, pid) = confined(Profile::Standard, || {
            (
                unshare(CloneFlags::CLONE_NEWNS),
                socket(AddressFamily::Vsock, SockType::Stream, SockFlag::empty(), None).map(|fd| fd.as_raw_fd()),
                socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp).map(drop),
                std::process::id(),
            )
        });
        assert_eq!(unshared, Err(Errno::EPERM));
        assert_eq!(vsock, Err(Errno::EAFNOSUPPORT));
        assert_eq!(internet, Ok(()));
        assert_eq!(pid, std::process::id());
    }

    #[test]
    fn the_thread_has_two_filters_and_the_strict_profile_takes_no_third() {
        let count = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").expect("status");
            let line = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:")).expect("a count");
            line.trim().parse::<u32>().expect("a number")
        };
        let before = count();
        let again = filters(
            Arch::NATIVE,
            &Options { profile: Profile::Standard, shared_identity: false, no_namespaces: false },
        );
        let (inside, third) = confined(Profile::Strict, move || (count(), sys::seccomp::install(&again[0])));
        assert_eq!(inside, before + 2);
        assert_eq!(third, Err(Errno::EPERM));
        assert_eq!(count(), before, "other threads have none");
    }

    #[test]
    fn processes_can_still_be_started_although_clone3_does_not_exist() {
        let output = confined(Profile::Strict, || std::process::Command::new("/bin/echo").arg("hello").output());
        assert_eq!(output.expect("the program ran").stdout, b"hello\n");
    }
}
