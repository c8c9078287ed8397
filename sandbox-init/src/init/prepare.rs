//! From a `StartCall` to a prepared call: every field is checked here and nowhere else.
//!
//! The runner is trusted with more than the workload, but what it sends was computed from what a model wrote, so
//! lengths, ids and bytes are checked as if they came from anybody. A refusal names the field.

use std::collections::BTreeMap;

use proto::init::v1::{self, InputChunk, OutputMode, StartCall, start_call};
use sha2::{Digest as _, Sha256};

use super::stream::{INLINE_LIMIT, Retention, TAIL_LIMIT};

/// Longest call id.
const CALL_ID_LIMIT: usize = 128;
/// Longest input that is sent in pieces.
const INPUT_LIMIT: usize = 16 * 1024 * 1024;
/// Calls whose input is being sent in pieces, and bytes of all of them together. Beyond either the chunk is refused.
const STAGED_CALLS_LIMIT: usize = 8;
const STAGED_BYTES_LIMIT: usize = 24 * 1024 * 1024;
/// Largest piece.
const CHUNK_LIMIT: usize = 96 * 1024;
/// Longest time between SIGTERM and SIGKILL, milliseconds.
const GRACE_LIMIT_MS: u64 = 600_000;
const GRACE_DEFAULT_MS: u64 = 2_000;

/// Why a request was refused. Becomes a `Failure`.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// A field is not what it must be.
    #[error("{field} {problem}")]
    Field { field: &'static str, problem: String },
    /// A field is too long.
    #[error("{field} is {actual} bytes, limit is {limit}")]
    TooLarge { field: &'static str, actual: usize, limit: usize },
    /// There is no such call, or it is in another phase.
    #[error("call_id {call_id} names no {wanted} call")]
    Unknown { call_id: String, wanted: &'static str },
    /// The id was used for something else.
    #[error("call_id {call_id} was used for a different call")]
    Reused { call_id: String },
    /// There is no room for another call.
    #[error("{0}")]
    Busy(String),
    /// This process 1 cannot do that.
    #[error("{0}")]
    NotSupported(String),
}

impl Refusal {
    /// The code of the protocol.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Refusal::Field { .. } => "INVALID_FIELD",
            Refusal::TooLarge { .. } => "TOO_LARGE",
            Refusal::Unknown { .. } => "CALL_UNKNOWN",
            Refusal::Reused { .. } => "CALL_ID_REUSED",
            Refusal::Busy(_) => "CALL_BUSY",
            Refusal::NotSupported(_) => "NOT_SUPPORTED",
        }
    }

    /// A field that is not what it must be.
    pub(crate) fn field(field: &'static str, problem: impl Into<String>) -> Self {
        Refusal::Field { field, problem: problem.into() }
    }
}

/// What a call runs.
#[derive(Clone, Debug)]
pub(crate) enum Work {
    /// A command text for the shell.
    Bash { command: String, restart: bool },
    /// A program.
    Exec(Exec),
    /// A built-in tool.
    Tool { name: String, input_json: Vec<u8> },
}

/// A program of its own.
#[derive(Clone, Debug)]
pub(crate) struct Exec {
    pub(crate) argv: Vec<Vec<u8>>,
    pub(crate) environment: Vec<Vec<u8>>,
    pub(crate) working_directory: Option<Vec<u8>>,
    pub(crate) stdin: bool,
    /// Columns and rows.
    pub(crate) terminal: Option<(u16, u16)>,
}

/// A call whose every field was checked.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) call_id: String,
    /// Tells a repeated request from another one with the same id. Input that was sent ahead is not part of it: it is gone
    /// when the request is repeated.
    pub(crate) digest: [u8; 32],
    pub(crate) timeout_ms: u64,
    pub(crate) grace_ms: u64,
    pub(crate) separate: bool,
    pub(crate) retention: Retention,
    pub(crate) work: Work,
}

/// Inputs that arrive in pieces.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    inputs: BTreeMap<String, Vec<u8>>,
}

impl Staging {
    /// Takes one piece.
    pub(crate) fn add(&mut self, chunk: InputChunk) -> Result<(), Refusal> {
        check_call_id(&chunk.call_id)?;
        if chunk.data.len() > CHUNK_LIMIT {
            return Err(Refusal::TooLarge { field: "input_chunk.data", actual: chunk.data.len(), limit: CHUNK_LIMIT });
        }
        let total: usize = self.inputs.values().map(Vec::len).sum();
        if total.saturating_add(chunk.data.len()) > STAGED_BYTES_LIMIT
            || (!self.inputs.contains_key(&chunk.call_id) && self.inputs.len() >= STAGED_CALLS_LIMIT)
        {
            return Err(Refusal::Busy("too much input is waiting for its StartCall".to_owned()));
        }
        // A first piece starts anew: the runner may have lost the connection half-way.
        if chunk.offset == 0 {
            self.inputs.remove(&chunk.call_id);
        }
        let input = self.inputs.entry(chunk.call_id).or_default();
        if input.len() as u64 != chunk.offset {
            let problem = format!("is {}, expected {}", chunk.offset, input.len());
            return Err(Refusal::field("input_chunk.offset", problem));
        }
        let length = input.len().saturating_add(chunk.data.len());
        if length > INPUT_LIMIT {
            return Err(Refusal::TooLarge { field: "input_chunk.data", actual: length, limit: INPUT_LIMIT });
        }
        input.extend_from_slice(&chunk.data);
        Ok(())
    }

    /// The input that was staged for a call.
    pub(crate) fn get(&self, call_id: &str) -> Option<&[u8]> {
        self.inputs.get(call_id).map(Vec::as_slice)
    }

    /// Forgets the input of a call.
    pub(crate) fn remove(&mut self, call_id: &str) {
        self.inputs.remove(call_id);
    }
}

/// Checks a `StartCall`.
pub(crate) fn prepare(start: StartCall, staged: Option<&[u8]>) -> Result<Plan, Refusal> {
    check_call_id(&start.call_id)?;
    let arrived = staged.map_or(0, <[u8]>::len) as u64;
    if start.staged_input_bytes != 0 && start.staged_input_bytes != arrived {
        let problem = format!("is {}, but {arrived} bytes have arrived", start.staged_input_bytes);
        return Err(Refusal::field("staged_input_bytes", problem));
    }
    let inline = usize::try_from(start.inline_limit_bytes).unwrap_or(usize::MAX);
    if inline > INLINE_LIMIT {
        return Err(Refusal::TooLarge { field: "inline_limit_bytes", actual: inline, limit: INLINE_LIMIT });
    }
    let digest = Sha256::digest(prost::Message::encode_to_vec(&start)).into();
    let separate = match OutputMode::try_from(start.output_mode) {
        Ok(OutputMode::Unspecified | OutputMode::Merged) => false,
        Ok(OutputMode::Separate) => true,
        Err(_) => return Err(Refusal::field("output_mode", format!("has the unknown value {}", start.output_mode))),
    };
    let work = match start.work {
        Some(start_call::Work::Bash(bash)) => bash_work(bash, staged)?,
        Some(start_call::Work::Exec(exec)) => Work::Exec(exec_work(exec)?),
        Some(start_call::Work::Tool(tool)) => tool_work(tool, staged)?,
        None => return Err(Refusal::field("work", "is missing")),
    };
    Ok(Plan {
        call_id: start.call_id,
        digest,
        timeout_ms: start.timeout_ms,
        grace_ms: if start.grace_ms == 0 { GRACE_DEFAULT_MS } else { start.grace_ms.min(GRACE_LIMIT_MS) },
        separate,
        retention: Retention {
            inline,
            memory: inline,
            head: start.spool_head_bytes.max(start.inline_limit_bytes.into()),
            tail: usize::try_from(start.spool_tail_bytes).unwrap_or(usize::MAX).min(TAIL_LIMIT),
        },
        work,
    })
}

fn bash_work(bash: v1::Bash, staged: Option<&[u8]>) -> Result<Work, Refusal> {
    let command = match staged {
        Some(bytes) if bash.command.is_empty() => String::from_utf8(bytes.to_vec())
            .map_err(|_| Refusal::field("input_chunk.data", "is a command that is not UTF-8"))?,
        Some(_) => return Err(Refusal::field("bash.command", "was sent twice, here and in input_chunk")),
        None => bash.command,
    };
    if command.contains('\0') {
        return Err(Refusal::field("bash.command", "contains a NUL byte"));
    }
    Ok(Work::Bash { command, restart: bash.restart })
}

fn tool_work(tool: v1::Tool, staged: Option<&[u8]>) -> Result<Work, Refusal> {
    let known = ["read", "write", "edit", "glob", "grep", "probe"];
    if !known.contains(&tool.name.as_str()) {
        return Err(Refusal::field("tool.name", format!("must be one of {}", known.join(", "))));
    }
    let input_json = match staged {
        Some(bytes) if tool.input_json.is_empty() => bytes.to_vec(),
        Some(_) => return Err(Refusal::field("tool.input_json", "was sent twice, here and in input_chunk")),
        None => tool.input_json,
    };
    Ok(Work::Tool { name: tool.name, input_json })
}

fn exec_work(exec: v1::Exec) -> Result<Exec, Refusal> {
    match exec.argv.first() {
        None => return Err(Refusal::field("exec.argv", "is empty")),
        Some(program) if program.is_empty() => return Err(Refusal::field("exec.argv", "begins with an empty program")),
        Some(_) => {}
    }
    if exec.argv.iter().any(|argument| argument.contains(&0)) {
        return Err(Refusal::field("exec.argv", "contains a NUL byte"));
    }
    for variable in &exec.env {
        if variable.contains(&0) {
            return Err(Refusal::field("exec.env", "contains a NUL byte"));
        }
        if variable.iter().position(|byte| *byte == b'=').unwrap_or(0) == 0 {
            return Err(Refusal::field("exec.env", "has an entry that is not NAME=value"));
        }
    }
    if exec.cwd.contains(&0) || (!exec.cwd.is_empty() && exec.cwd.first() != Some(&b'/')) {
        return Err(Refusal::field("exec.cwd", "is not an absolute path"));
    }
    let terminal = exec.terminal.map(|terminal| window(terminal.columns, terminal.rows)).transpose()?;
    Ok(Exec {
        argv: exec.argv,
        environment: exec.env,
        working_directory: Some(exec.cwd).filter(|cwd| !cwd.is_empty()),
        stdin: exec.stdin,
        terminal,
    })
}

/// Size of a terminal; zero means the usual one.
pub(crate) fn window(columns: u32, rows: u32) -> Result<(u16, u16), Refusal> {
    let side = |value: u32, usual: u16, field| match value {
        0 => Ok(usual),
        value => u16::try_from(value).map_err(|_| Refusal::field(field, format!("is {value}, limit is {}", u16::MAX))),
    };
    Ok((side(columns, 80, "columns")?, side(rows, 24, "rows")?))
}

fn check_call_id(call_id: &str) -> Result<(), Refusal> {
    if call_id.is_empty() || call_id.len() > CALL_ID_LIMIT {
        let problem = format!("is {} bytes long, must be 1 to {CALL_ID_LIMIT}", call_id.len());
        return Err(Refusal::field("call_id", problem));
    }
    if !call_id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.:-".contains(&byte)) {
        return Err(Refusal::field("call_id", "has characters outside [A-Za-z0-9_.:-]"));
    }
    Ok(())
}

/// `defaults` with the entries of `overrides` replacing those of the same name.
pub(crate) fn merge_environment(defaults: &[Vec<u8>], overrides: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let name = |variable: &[u8]| variable.split(|byte| *byte == b'=').next().unwrap_or_default().to_vec();
    let mut merged: Vec<Vec<u8>> = Vec::with_capacity(defaults.len().saturating_add(overrides.len()));
    let replaced: Vec<Vec<u8>> = overrides.iter().map(|variable| name(variable)).collect();
    merged.extend(defaults.iter().filter(|variable| !replaced.contains(&name(variable))).cloned());
    merged.extend(overrides.iter().cloned());
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(work: start_call::Work) -> StartCall {
        StartCall { call_id: "c-1".to_owned(), work: Some(work), ..StartCall::default() }
    }

    fn bash(command: &str) -> StartCall {
        start(start_call::Work::Bash(v1::Bash { command: command.to_owned(), restart: false }))
    }

    fn exec(exec: v1::Exec) -> StartCall {
        start(start_call::Work::Exec(exec))
    }

    #[test]
    fn a_refusal_names_the_field() {
        let argv = vec![b"true".to_vec()];
        let cases = [
            (StartCall { call_id: String::new(), ..bash("") }, "call_id is 0 bytes long, must be 1 to 128"),
            (StartCall { call_id: "a/b".to_owned(), ..bash("") }, "call_id has characters outside [A-Za-z0-9_.:-]"),
            (StartCall { output_mode: 9, ..bash("") }, "output_mode has the unknown value 9"),
            (StartCall { inline_limit_bytes: 65537, ..bash("") }, "inline_limit_bytes is 65537 bytes, limit is 65536"),
            (StartCall { work: None, ..bash("") }, "work is missing"),
            (bash("echo \0"), "bash.command contains a NUL byte"),
            (exec(v1::Exec::default()), "exec.argv is empty"),
            (exec(v1::Exec { argv: vec![vec![]], ..v1::Exec::default() }), "exec.argv begins with an empty program"),
            (
                exec(v1::Exec { argv: argv.clone(), env: vec![b"=x".to_vec()], ..v1::Exec::default() }),
                "exec.env has an entry that is not NAME=value",
            ),
            (exec(v1::Exec { argv, cwd: b"here".to_vec(), ..v1::Exec::default() }), "exec.cwd is not an absolute path"),
            (
                start(start_call::Work::Tool(v1::Tool { name: "rm".to_owned(), input_json: vec![] })),
                "tool.name must be one of read, write, edit, glob, grep, probe",
            ),
        ];
        for (request, expected) in cases {
            assert_eq!(prepare(request, None).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn the_same_request_has_the_same_digest_and_another_request_another() {
        let digest = |request: StartCall, staged: Option<&[u8]>| prepare(request, staged).unwrap().digest;
        assert_eq!(digest(bash("a"), None), digest(bash("a"), None));
        assert_eq!(digest(bash(""), Some(b"a")), digest(bash(""), None));
        assert_ne!(digest(bash("a"), None), digest(bash("b"), None));
    }

    #[test]
    fn pieces_must_arrive_in_order_and_a_first_piece_starts_anew() {
        let chunk = |offset, data: &[u8]| InputChunk { call_id: "c".to_owned(), offset, data: data.to_vec() };
        let mut staging = Staging::default();
        staging.add(chunk(0, b"ab")).unwrap();
        let refused = staging.add(chunk(3, b"d")).unwrap_err();
        assert_eq!(refused.to_string(), "input_chunk.offset is 3, expected 2");
        staging.add(chunk(2, b"c")).unwrap();
        assert_eq!(staging.get("c"), Some(b"abc".as_slice()));
        staging.add(chunk(0, b"x")).unwrap();
        assert_eq!(staging.get("c"), Some(b"x".as_slice()));
    }

    #[test]
    fn a_call_whose_input_has_not_arrived_whole_is_refused() {
        let call = StartCall { staged_input_bytes: 3, ..bash("") };
        assert!(prepare(call.clone(), Some(b"abc")).is_ok());
        for (staged, arrived) in [(Some(b"ab".as_slice()), 2), (None, 0)] {
            let refused = prepare(call.clone(), staged).unwrap_err();
            assert_eq!(refused.to_string(), format!("staged_input_bytes is 3, but {arrived} bytes have arrived"));
        }
    }

    #[test]
    fn staged_input_is_bounded_in_calls_and_bytes() {
        let mut staging = Staging::default();
        for call in 0..STAGED_CALLS_LIMIT {
            staging.add(InputChunk { call_id: format!("c{call}"), offset: 0, data: vec![1] }).unwrap();
        }
        let refused = staging.add(InputChunk { call_id: "more".to_owned(), offset: 0, data: vec![1] }).unwrap_err();
        assert_eq!(refused.code(), "CALL_BUSY");
        let large = InputChunk { call_id: "c0".to_owned(), offset: 0, data: vec![0; CHUNK_LIMIT + 1] };
        assert_eq!(staging.add(large).unwrap_err().code(), "TOO_LARGE");
    }

    #[test]
    fn a_variable_of_the_call_replaces_the_default_of_the_same_name_only() {
        let merged = merge_environment(
            &[b"PATH=/bin".to_vec(), b"PATHS=x".to_vec(), b"HOME=/".to_vec()],
            &[b"PATH=/usr/bin".to_vec()],
        );
        assert_eq!(merged, [b"PATHS=x".to_vec(), b"HOME=/".to_vec(), b"PATH=/usr/bin".to_vec()]);
    }
}
