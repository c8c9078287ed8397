//! Runs filters as the kernel does, for tests: the only way to check the filters of the other architecture.

use seccompiler::sock_filter;

use super::Arch;

/// What the kernel does with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Allow,
    Errno(u32),
    KillProcess,
}

/// `struct seccomp_data`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) audit: u32,
    pub(super) number: u32,
    pub(super) arguments: [u64; 6],
}

impl Call {
    pub(super) fn new(arch: Arch, number: u32, arguments: [u64; 6]) -> Self {
        Self { audit: arch.audit(), number, arguments }
    }

    fn word(&self, offset: u32) -> u32 {
        match offset {
            0 => self.number,
            4 => self.audit,
            16..=60 if offset.is_multiple_of(4) => {
                let argument = self.arguments[(offset as usize - 16) / 8].to_le_bytes();
                let half = offset as usize % 8;
                u32::from_le_bytes(argument[half..half + 4].try_into().expect("four bytes"))
            }
            _ => panic!("the kernel refuses a load from offset {offset}"),
        }
    }
}

/// The answer of filters in the order of loading. The most severe action wins; among equals the filter loaded last.
pub(super) fn stacked(filters: &[&[sock_filter]], call: &Call) -> Answer {
    let severity = |answer: &Answer| match answer {
        Answer::KillProcess => 0,
        Answer::Errno(_) => 1,
        Answer::Allow => 2,
    };
    // `min_by_key` keeps the first of equals, as the kernel's walk from the newest filter does.
    filters.iter().rev().map(|filter| single(filter, call).0).min_by_key(severity).expect("at least one filter")
}

/// The answer of one filter and the number of instructions it took.
pub(super) fn single(filter: &[sock_filter], call: &Call) -> (Answer, usize) {
    let mut accumulator = 0_u32;
    let mut at = 0;
    for steps in 1.. {
        let instruction = &filter[at];
        at += 1;
        let operand = instruction.k;
        let holds = match instruction.code {
            0x06 => return (answer(operand), steps),
            0x20 => {
                accumulator = call.word(operand);
                continue;
            }
            0x54 => {
                accumulator &= operand;
                continue;
            }
            0x05 => {
                at += operand as usize;
                continue;
            }
            0x15 => accumulator == operand,
            0x25 => accumulator > operand,
            0x35 => accumulator >= operand,
            0x45 => accumulator & operand != 0,
            code => panic!("unexpected instruction {code:#x}"),
        };
        at += usize::from(if holds { instruction.jt } else { instruction.jf });
    }
    unreachable!("the loop ends by returning")
}

fn answer(value: u32) -> Answer {
    match value & 0xffff_0000 {
        0x7fff_0000 => Answer::Allow,
        0x0005_0000 => Answer::Errno(value & 0xffff),
        0x8000_0000 => Answer::KillProcess,
        _ => panic!("unexpected answer {value:#x}"),
    }
}
