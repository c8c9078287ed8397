//! What the host is short of, and which work is therefore not taken.

use super::{Code, ToolFailure, ToolInput};

/// What a host can be short of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resource {
    /// Space or files of a file system.
    Disk,
    /// Memory: processes wait for it.
    Memory,
    /// Block devices: processes wait for them.
    Io,
    /// Processors: processes wait for them.
    Processor,
    /// Descriptors of this process.
    Descriptors,
}

/// What is not taken because of it. Each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Closed {
    /// New sessions.
    Sessions,
    /// Calls that may write.
    Writing,
    /// Calls.
    Calls,
}

/// Something that the host is short of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    /// Of what.
    pub resource: Resource,
    /// What is not taken.
    pub closed: Closed,
    /// What was measured and what is needed, for people; names no path.
    pub measured: String,
}

/// A measured number, for people and for collectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gauge {
    /// In the form `name{label="value"}`.
    pub name: String,
    /// The number.
    pub value: u64,
}

/// How the host stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pressure {
    /// What it is short of.
    pub shortages: Vec<Shortage>,
    /// What was measured.
    pub gauges: Vec<Gauge>,
}

impl Pressure {
    /// Why no session is opened, if that is so.
    #[must_use]
    pub fn session_refusal(&self) -> Option<ToolFailure> {
        self.worst(Closed::Sessions).map(|shortage| refusal(shortage, "new sessions"))
    }

    /// Why this call is not taken, if that is so.
    #[must_use]
    pub fn call_refusal(&self, input: &ToolInput) -> Option<ToolFailure> {
        match self.worst(Closed::Writing)? {
            shortage if shortage.closed == Closed::Calls => Some(refusal(shortage, "calls")),
            shortage if input.may_write() => Some(refusal(shortage, "calls that may write")),
            _ => None,
        }
    }

    /// Whether it is short of this.
    #[must_use]
    pub fn is_short_of(&self, resource: Resource) -> bool {
        self.shortages.iter().any(|shortage| shortage.resource == resource)
    }

    fn worst(&self, least: Closed) -> Option<&Shortage> {
        self.shortages.iter().filter(|shortage| shortage.closed >= least).max_by_key(|shortage| shortage.closed)
    }
}

fn refusal(shortage: &Shortage, what: &str) -> ToolFailure {
    let code = match shortage.resource {
        Resource::Disk => Code::DiskLow,
        Resource::Memory => Code::MemoryPressure,
        Resource::Descriptors => Code::FdLow,
        Resource::Io | Resource::Processor => Code::Capacity,
    };
    ToolFailure::new(
        code,
        format!("this runner takes no {what} now: {}", shortage.measured),
        "try again later, or place the work on another runner; its operator must look at the host",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::{BashInput, GlobInput};

    fn short(resource: Resource, closed: Closed) -> Pressure {
        let measured = "3 MiB are free, 5 MiB are needed".to_owned();
        Pressure { shortages: vec![Shortage { resource, closed, measured }], gauges: Vec::new() }
    }

    fn bash() -> ToolInput {
        ToolInput::Bash(BashInput { command: Some("true".into()), restart: false })
    }

    fn glob() -> ToolInput {
        ToolInput::Glob(GlobInput { pattern: "*".into(), path: None })
    }

    #[test]
    fn each_degree_closes_what_the_one_before_closes() {
        use Closed::{Calls, Sessions, Writing};
        for (closed, expected) in
            [(Sessions, [true, false, false]), (Writing, [true, true, false]), (Calls, [true, true, true])]
        {
            let pressure = short(Resource::Disk, closed);
            let refused = [
                pressure.session_refusal().is_some(),
                pressure.call_refusal(&bash()).is_some(),
                pressure.call_refusal(&glob()).is_some(),
            ];
            assert_eq!(refused, expected, "{closed:?}");
        }
        let none = Pressure::default();
        assert!(none.session_refusal().is_none() && none.call_refusal(&bash()).is_none());
    }

    #[test]
    fn refusals_name_what_was_measured_and_may_be_tried_again() {
        let codes = [
            (Resource::Disk, Code::DiskLow),
            (Resource::Memory, Code::MemoryPressure),
            (Resource::Descriptors, Code::FdLow),
            (Resource::Io, Code::Capacity),
            (Resource::Processor, Code::Capacity),
        ];
        for (resource, code) in codes {
            let failure = short(resource, Closed::Sessions).session_refusal().expect("refused");
            assert_eq!((failure.code, failure.retryable), (code, true));
            assert_eq!(failure.message, "this runner takes no new sessions now: 3 MiB are free, 5 MiB are needed");
        }
    }
}
