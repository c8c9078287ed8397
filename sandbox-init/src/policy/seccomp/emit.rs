//! Writes a filter as a binary search over ranges of numbers that share a decision.
//!
//! A program is written backwards, because the jumps of classic BPF go forward only: when an instruction is added,
//! the places it jumps to already exist and their distance is known. Identical answers and identical argument checks
//! are written once and shared while a jump (at most 255 instructions) reaches them; beyond that a jump of its own is
//! placed in between.

use seccompiler::{BpfProgram, sock_filter};

use super::rule::{Clause, Decision, REFUSE, Test};
use super::{Arch, Verdict};

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_NOT_LESS: u16 = 0x35;
const JUMP_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGUMENTS: u32 = 16;

const ANSWER_KILL_PROCESS: u32 = 0x8000_0000;
const ANSWER_ERRNO: u32 = 0x0005_0000;
const ANSWER_ALLOW: u32 = 0x7fff_0000;

/// The farthest a conditional jump reaches.
const REACH: usize = 255;

/// A filter with one decision per number from 0 on. `None` means that any answer is right; numbers above get `beyond`.
pub(super) fn program(arch: Arch, decisions: impl Iterator<Item = Option<Decision>>, beyond: Verdict) -> BpfProgram {
    let ranges = ranges(decisions, beyond);
    let mut emitter = Emitter::default();
    let search = emitter.search(&ranges);
    emitter.place_next_to(search);
    emitter.statement(LOAD, OFFSET_NUMBER);
    let search = emitter.here();
    let kill = emitter.answer(ANSWER_KILL_PROCESS);
    emitter.branch(JUMP_EQUAL, arch.audit(), search, kill);
    emitter.statement(LOAD, OFFSET_ARCH);
    emitter.backwards.reverse();
    emitter.backwards
}

/// The numbers from `start` to the start of the next range.
#[derive(Debug)]
struct Range {
    start: u32,
    decision: Decision,
}

fn ranges(decisions: impl Iterator<Item = Option<Decision>>, beyond: Verdict) -> Vec<Range> {
    let mut ranges: Vec<Range> = Vec::new();
    for (start, decision) in (0..).zip(decisions.chain([Some(Decision::Fixed(beyond))])) {
        let Some(decision) = decision else { continue };
        match ranges.last() {
            Some(last) if last.decision == decision => {}
            // Numbers before the first decision are free; they join it.
            None => ranges.push(Range { start: 0, decision }),
            Some(_) => ranges.push(Range { start, decision }),
        }
    }
    ranges
}

/// An instruction, counted from the end of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Label(usize);

#[derive(Default)]
struct Emitter {
    backwards: Vec<sock_filter>,
    answers: Vec<(u32, Label)>,
    checks: Vec<(Decision, Label)>,
}

impl Emitter {
    /// Code that finds the range of the number in the accumulator.
    fn search(&mut self, ranges: &[Range]) -> Label {
        match ranges {
            [] => self.answer(ANSWER_KILL_PROCESS),
            [only] => self.decision(&only.decision),
            // One number that differs from its surroundings needs one comparison instead of two.
            [before, one, after] if before.decision == after.decision && one.start + 1 == after.start => {
                let elsewhere = self.decision(&after.decision);
                let here = self.decision(&one.decision);
                self.branch(JUMP_EQUAL, one.start, here, elsewhere)
            }
            _ => {
                // An odd lower part is made of such triples.
                let (lower, upper) = ranges.split_at((ranges.len() / 2) | 1);
                let boundary = upper.first().map_or(0, |range| range.start);
                let upper = self.search(upper);
                let lower = self.search(lower);
                self.branch(JUMP_NOT_LESS, boundary, upper, lower)
            }
        }
    }

    fn decision(&mut self, decision: &Decision) -> Label {
        let clauses = match decision {
            Decision::Fixed(verdict) => return self.answer(answer(*verdict)),
            Decision::Ordered(clauses) => clauses,
        };
        if let Some((_, label)) = self.checks.iter().find(|(known, _)| known == decision) {
            return *label;
        }
        let label = self.clauses(clauses);
        self.checks.push((decision.clone(), label));
        label
    }

    fn clauses(&mut self, clauses: &[&Clause]) -> Label {
        let (last, conditional) = match clauses {
            [conditional @ .., last] if last.tests.is_empty() => (last.verdict, conditional),
            // A list that runs out refuses, as in `Decision::verdict`.
            all => (REFUSE, all),
        };
        let mut next = self.answer(answer(last));
        for clause in conditional.iter().rev() {
            let mut label = self.answer(answer(clause.verdict));
            for test in clause.tests.iter().rev() {
                label = self.test(test, label, next);
            }
            next = label;
        }
        next
    }

    fn test(&mut self, test: &Test, holds: Label, fails: Label) -> Label {
        match test {
            Test::In { argument, mask, values } => {
                let mut label = fails;
                for value in values.iter().rev() {
                    label = self.branch(JUMP_EQUAL, *value, holds, label);
                }
                self.place_next_to(label);
                if *mask != u32::MAX {
                    self.statement(AND, *mask);
                }
                self.statement(LOAD, offset(*argument));
            }
            Test::AnyBit { argument, bits } => {
                self.branch(JUMP_ANY_BIT, *bits, holds, fails);
                self.statement(LOAD, offset(*argument));
            }
        }
        self.here()
    }

    /// An instruction that answers `value`: an existing one in reach, or a new one.
    fn answer(&mut self, value: u32) -> Label {
        // Half the reach is left for what is written before the jump.
        let known = self.answers.iter().find(|(known, label)| *known == value && self.distance(*label) < REACH / 2);
        if let Some((_, label)) = known {
            return *label;
        }
        self.statement(RETURN, value);
        let label = self.here();
        self.answers.retain(|(known, _)| *known != value);
        self.answers.push((value, label));
        label
    }

    /// A conditional jump; both targets are brought into reach.
    fn branch(&mut self, code: u16, operand: u32, holds: Label, fails: Label) -> Label {
        let holds = self.in_reach(holds);
        let fails = self.in_reach(fails);
        let (jt, jf) = (self.distance(holds), self.distance(fails));
        // `in_reach` has made both smaller than REACH.
        let short = |distance: usize| u8::try_from(distance).unwrap_or(u8::MAX);
        self.backwards.push(sock_filter { code, jt: short(jt), jf: short(jf), k: operand });
        self.here()
    }

    /// `label`, or a jump to it that is near.
    fn in_reach(&mut self, label: Label) -> Label {
        // One less, because the other target of the branch may still get a jump.
        if self.distance(label) < REACH {
            return label;
        }
        self.jump(label)
    }

    /// Makes sure that the next statement runs into `label`.
    fn place_next_to(&mut self, label: Label) {
        if label != self.here() {
            self.jump(label);
        }
    }

    fn jump(&mut self, label: Label) -> Label {
        let distance = u32::try_from(self.distance(label)).unwrap_or(u32::MAX);
        self.backwards.push(sock_filter { code: JUMP, jt: 0, jf: 0, k: distance });
        self.here()
    }

    fn statement(&mut self, code: u16, operand: u32) {
        self.backwards.push(sock_filter { code, jt: 0, jf: 0, k: operand });
    }

    /// The instruction written last, which is the first to run.
    fn here(&self) -> Label {
        Label(self.backwards.len())
    }

    /// How many instructions lie between the one written next and `label`.
    fn distance(&self, label: Label) -> usize {
        self.backwards.len() - label.0
    }
}

/// Where the low half of an argument lies; both architectures are little-endian.
fn offset(argument: u8) -> u32 {
    OFFSET_ARGUMENTS + 8 * u32::from(argument)
}

fn answer(verdict: Verdict) -> u32 {
    match verdict {
        Verdict::Allow => ANSWER_ALLOW,
        Verdict::Errno(errno) => ANSWER_ERRNO | (errno as u32 & 0xffff),
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;
    use proptest::prelude::*;

    use super::super::argument;
    use super::super::interpret::{Answer, Call, single};
    use super::super::rule::ALLOW;
    use super::*;

    static CLAUSES: [&[Clause]; 6] = [
        argument::CLONE,
        argument::SOCKET,
        argument::SOCKETPAIR,
        argument::IOCTL,
        argument::PERSONALITY,
        argument::PID_FIRST,
    ];

    /// Few or many kinds of decisions, so that programs get long and their parts far from each other.
    fn decision(kind: u8) -> Option<Decision> {
        Some(match kind {
            0 => return None,
            1..=6 => Decision::Ordered(CLAUSES[usize::from(kind) - 1].iter().collect()),
            7 => Decision::Fixed(ALLOW),
            _ => Decision::Fixed(Verdict::Errno(Errno::from_raw(i32::from(kind)))),
        })
    }

    fn as_answer(verdict: Verdict) -> Answer {
        match verdict {
            Verdict::Allow => Answer::Allow,
            Verdict::Errno(errno) => Answer::Errno(errno as u32),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_table_is_written_as_a_program_that_means_the_same(
            kinds in (2_u8..60).prop_flat_map(|kinds| prop::collection::vec(0..kinds, 0..1200)),
            value in prop::sample::select(vec![0_u64, 1, 2, 10, 16, 0x5412, 0x7e02_0000, u64::MAX]),
        ) {
            let program = program(Arch::Aarch64, kinds.iter().map(|kind| decision(*kind)), REFUSE);
            let arguments = [value; 6];
            for (number, kind) in (0..).zip(kinds.iter().chain([&0; 3])) {
                let (answer, _) = single(&program, &Call::new(Arch::Aarch64, number, arguments));
                let expected = match decision(*kind) {
                    None if number as usize >= kinds.len() => REFUSE,
                    None => continue,
                    Some(decision) => decision.verdict(&arguments),
                };
                prop_assert_eq!(answer, as_answer(expected), "number {} of {} instructions", number, program.len());
            }
        }
    }

    #[test]
    fn parts_farther_apart_than_a_jump_reaches_are_connected() {
        let kinds: Vec<u8> = (0..1000_u32).map(|number| (number * 7 % 59 + 1).try_into().expect("small")).collect();
        let program = program(Arch::X86_64, kinds.iter().map(|kind| decision(*kind)), REFUSE);
        assert!(program.len() > 4 * REACH, "{} instructions are not long enough", program.len());
        assert!(program.iter().any(|instruction| instruction.code == JUMP), "no jump beyond the reach");
        for (number, kind) in (0..).zip(&kinds) {
            let (answer, _) = single(&program, &Call::new(Arch::X86_64, number, [2, 1, 6, 0, 0, 0]));
            let expected = decision(*kind).expect("a decision").verdict(&[2, 1, 6, 0, 0, 0]);
            assert_eq!(answer, as_answer(expected), "number {number}");
        }
    }
}
