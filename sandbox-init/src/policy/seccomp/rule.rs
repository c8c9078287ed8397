//! The vocabulary of the table: what a rule can say, and what it means for one set of options.
//!
//! A rule looks at the low 32 bits of arguments only. That is not a shortcut: every argument a rule looks at is an
//! `int` or an `unsigned int` in the kernel (the flags of `clone` are cut to 32 bits there), so the kernel ignores
//! the upper half, and a filter that compared it could be passed by setting a bit in it. Nothing can compare memory
//! behind a pointer: another thread could change it after the check.

use nix::errno::Errno;

use super::{Options, Verdict};
use crate::policy::Profile;

/// What happens to one system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rule {
    /// The same for all arguments and options.
    Always(Verdict),
    /// The first clause that applies decides. The last clause has no condition.
    Clauses(&'static [Clause]),
}

/// One line of a rule.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Clause {
    /// The options under which this line exists.
    pub(super) when: When,
    /// All of these must hold.
    pub(super) tests: &'static [Test],
    /// Then this is the answer.
    pub(super) verdict: Verdict,
}

/// The options under which a clause exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// Under all.
    Always,
    /// In this profile only.
    Profile(Profile),
    /// Where the workload has the same user id as process 1.
    SharedIdentity,
    /// Where the workload has no namespaces of its own.
    NoNamespaces,
}

/// One question about the low 32 bits of an argument.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Test {
    /// After masking, the value is one of these.
    In {
        /// 0 to 5.
        argument: u8,
        /// Bits that count.
        mask: u32,
        /// Never empty.
        values: &'static [u32],
    },
    /// At least one of these bits is set.
    AnyBit {
        /// 0 to 5.
        argument: u8,
        /// The bits.
        bits: u32,
    },
}

/// A rule as it stands for one set of options: what the emitter compiles and what equal neighbours are compared by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    /// One answer.
    Fixed(Verdict),
    /// Ordered; the last one has no condition.
    Ordered(Vec<&'static Clause>),
}

/// Shorthands in which the table is written.
pub(super) const ALLOW: Verdict = Verdict::Allow;
pub(super) const REFUSE: Verdict = Verdict::Errno(Errno::EPERM);
pub(super) const ABSENT: Verdict = Verdict::Errno(Errno::ENOSYS);

impl Clause {
    /// `verdict` when all `tests` hold.
    pub(super) const fn on(tests: &'static [Test], verdict: Verdict) -> Self {
        Self { when: When::Always, tests, verdict }
    }

    /// `verdict` in all cases that are left.
    pub(super) const fn otherwise(verdict: Verdict) -> Self {
        Self { when: When::Always, tests: &[], verdict }
    }

    /// The same clause, existing only under some options.
    pub(super) const fn only(self, when: When) -> Self {
        Self { when, tests: self.tests, verdict: self.verdict }
    }
}

impl Test {
    /// The whole value is one of `values`.
    pub(super) const fn is(argument: u8, values: &'static [u32]) -> Self {
        Self::In { argument, mask: u32::MAX, values }
    }

    /// Whether it holds for these arguments.
    pub(super) fn holds(&self, arguments: &[u64; 6]) -> bool {
        match self {
            Self::In { argument, mask, values } => values.contains(&(low(arguments, *argument) & mask)),
            Self::AnyBit { argument, bits } => low(arguments, *argument) & bits != 0,
        }
    }
}

fn low(arguments: &[u64; 6], argument: u8) -> u32 {
    u32::try_from(arguments[usize::from(argument)] & u64::from(u32::MAX)).unwrap_or(u32::MAX)
}

impl When {
    fn covers(self, options: &Options) -> bool {
        match self {
            Self::Always => true,
            Self::Profile(profile) => profile == options.profile,
            Self::SharedIdentity => options.shared_identity,
            Self::NoNamespaces => options.no_namespaces,
        }
    }
}

impl Rule {
    /// What is left of the rule under `options`.
    pub(super) fn resolve(self, options: &Options) -> Decision {
        let clauses = match self {
            Self::Always(verdict) => return Decision::Fixed(verdict),
            Self::Clauses(clauses) => clauses,
        };
        let mut left = Vec::new();
        for clause in clauses.iter().filter(|clause| clause.when.covers(options)) {
            left.push(clause);
            if clause.tests.is_empty() {
                break;
            }
        }
        match left.as_slice() {
            [only] if only.tests.is_empty() => Decision::Fixed(only.verdict),
            _ => Decision::Ordered(left),
        }
    }
}

impl Decision {
    /// The answer for these arguments. A list without a last clause refuses; a test keeps such lists out of the table.
    pub(super) fn verdict(&self, arguments: &[u64; 6]) -> Verdict {
        match self {
            Self::Fixed(verdict) => *verdict,
            Self::Ordered(clauses) => clauses
                .iter()
                .find(|clause| clause.tests.iter().all(|test| test.holds(arguments)))
                .map_or(REFUSE, |clause| clause.verdict),
        }
    }
}
