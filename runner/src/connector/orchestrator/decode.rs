//! Requests of the orchestrator to our own types. Every refusal names the field and what to send instead.

use std::time::Duration;

use prost::Message;
use proto::runner::v1 as pb;
use sha2::{Digest, Sha256};

use crate::work::{
    BashInput, CallId, CallLimits, CancelMode, Code, DrainMode, EditInput, EnvironmentRef, ExecInput, GlobInput,
    GrepInput, Network, OutputMode, RESERVED_PREFIX, ReadInput, RequestDigest, ResourceLimits, SessionClose, SessionId,
    SessionOpen, Stream, Terminal, ToolCall, ToolFailure, ToolInput, WriteInput, limits,
};

/// Longest time that may be asked for; anything longer is a mistake of units.
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);

type Checked<T> = Result<T, ToolFailure>;

/// The id of a session, which must not look like one of a work queue.
pub(super) fn session_id(text: &str) -> Checked<SessionId> {
    let session_id = SessionId::new(text)?;
    if session_id.is_of_queue() { Err(reserved("session_id", text)) } else { Ok(session_id) }
}

/// The id of a call, which must not look like one of a work queue.
pub(super) fn call_id(text: &str) -> Checked<CallId> {
    let call_id = CallId::new(text)?;
    if call_id.is_of_queue() { Err(reserved("call_id", text)) } else { Ok(call_id) }
}

fn reserved(field: &str, text: &str) -> ToolFailure {
    let problem = format!("{text} begins with {RESERVED_PREFIX:?}, which is kept for work queues");
    ToolFailure::invalid(field, problem, "choose an id that begins otherwise")
}

/// Opens a session.
pub(super) fn open(message: &pb::OpenSession) -> Checked<SessionOpen> {
    let session_id = session_id(&message.session_id)?;
    let epoch = epoch(message.epoch)?;
    known::<pb::LeaseLossPolicy>("on_lease_loss", message.on_lease_loss)?;
    if message.on_lease_loss == i32::from(pb::LeaseLossPolicy::Kill) {
        return Err(ToolFailure::unimplemented("on_lease_loss: LEASE_LOSS_POLICY_KILL"));
    }
    let environment = message.environment.clone().unwrap_or_default();
    for (field, present) in [
        ("environment.inline_template", !environment.inline_template.is_empty()),
        ("max_lifetime", message.max_lifetime.is_some()),
        ("secrets", !message.secrets.is_empty()),
        ("mounts", !message.mounts.is_empty()),
    ] {
        if present {
            return Err(ToolFailure::unimplemented(field));
        }
    }
    if message.metadata.len() > 16 {
        let problem = format!("{} entries; at most 16 are allowed", message.metadata.len());
        return Err(ToolFailure::invalid("metadata", problem, "send fewer entries"));
    }
    if message.metadata.iter().any(|(key, value)| key.len() > 63 || value.len() > 255) {
        return Err(ToolFailure::invalid(
            "metadata",
            "an entry is too long",
            "keys 63 bytes, values 255 bytes at most",
        ));
    }
    let network = network(message.network.as_ref())?;
    let asked = message.limits.unwrap_or_default();
    let mut variables: Vec<_> = message.variables.clone().into_iter().collect();
    variables.sort();
    for (name, value) in &variables {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(ToolFailure::invalid(
                "variables",
                format!("{name:?} cannot be set"),
                "names without = and NUL",
            ));
        }
    }
    Ok(SessionOpen {
        session_id,
        epoch,
        digest: digest(&pb::OpenSession { epoch: 0, traceparent: String::new(), ..sorted(message) }, &variables),
        environment: EnvironmentRef { name: environment.name, digest: environment.digest, rootfs: None },
        limits: ResourceLimits {
            cpu_millis: asked.cpu_millis,
            memory_bytes: asked.memory_bytes,
            disk_bytes: asked.disk_bytes,
            pids: asked.pids,
        },
        network,
        variables,
        min_tier: message.min_tier.clone(),
        orphan_timeout: duration("orphan_ttl", message.orphan_ttl.as_ref())?,
        idle_timeout: duration("idle_timeout", message.idle_timeout.as_ref())?,
        max_concurrent_calls: asked.max_concurrent_calls,
        tenant: message.tenant.clone(),
    })
}

/// Maps have no order on the wire, so they are left out of the digest here and put in sorted.
fn sorted(message: &pb::OpenSession) -> pb::OpenSession {
    let (variables, metadata) = Default::default();
    pb::OpenSession { variables, metadata, ..message.clone() }
}

fn digest(message: &impl Message, extra: &[(String, String)]) -> RequestDigest {
    let mut hash = Sha256::new();
    hash.update(message.encode_to_vec());
    for text in extra.iter().flat_map(|(name, value)| [name, value]) {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    RequestDigest(hash.finalize().into())
}

fn network(policy: Option<&pb::NetworkPolicy>) -> Checked<Network> {
    let Some(policy) = policy else { return Ok(Network::None) };
    if !policy.rules.is_empty() {
        return Err(ToolFailure::unimplemented("network.rules"));
    }
    match known::<pb::NetworkMode>("network.mode", policy.mode)? {
        pb::NetworkMode::Unspecified | pb::NetworkMode::None => Ok(Network::None),
        pb::NetworkMode::Rules => Err(ToolFailure::unimplemented("network.mode: NETWORK_MODE_RULES")),
        pb::NetworkMode::Open => Err(ToolFailure::unimplemented("network.mode: NETWORK_MODE_OPEN")),
    }
}

/// Ends a session.
pub(super) fn close(message: &pb::CloseSession) -> Checked<SessionClose> {
    Ok(SessionClose {
        session_id: session_id(&message.session_id)?,
        epoch: epoch(message.epoch)?,
        grace: duration("grace", message.grace.as_ref())?.unwrap_or_default(),
        fenced: false,
    })
}

/// Runs a tool.
pub(super) fn call(message: &pb::Call) -> Checked<ToolCall> {
    let call_id = call_id(&message.call_id)?;
    let session_id = session_id(&message.session_id)?;
    let epoch = epoch(message.epoch)?;
    let output = message.output.unwrap_or_default();
    let output_mode = match known::<pb::OutputMode>("output.mode", output.mode)? {
        pb::OutputMode::Unspecified | pb::OutputMode::Merged => OutputMode::Merged,
        pb::OutputMode::Separate => OutputMode::Separate,
    };
    let Some(input) = &message.input else {
        return Err(ToolFailure::invalid(
            "input",
            "no tool is set, or one that this runner does not know",
            "set one of bash, read, write, edit, glob, grep, exec",
        ));
    };
    let (input, timeout) = tool(input)?;
    let defaults = CallLimits::default();
    let or = |value: u64, default: u64| if value == 0 { default } else { value };
    let limits = CallLimits {
        start_within: duration("start_within", message.start_within.as_ref())?,
        timeout: Some(timeout),
        grace: duration("kill_grace", message.kill_grace.as_ref())?.unwrap_or(defaults.grace),
        spool_head_bytes: or(output.head_bytes, defaults.spool_head_bytes),
        spool_tail_bytes: or(output.tail_bytes, defaults.spool_tail_bytes),
    };
    if limits.spool_head_bytes.saturating_add(limits.spool_tail_bytes) > 64 * 1024 * 1024 {
        let problem = "head_bytes and tail_bytes are more than 64 MiB together";
        return Err(ToolFailure::invalid("output", problem, "ask for less; the rest of a long output is cut out"));
    }
    // Where and for whom a call runs may change with a new placement; what it does may not.
    let identity = pb::Call { epoch: 0, traceparent: String::new(), ..message.clone() };
    let digest = digest(&identity, &[]);
    let quiet = output.quiet;
    Ok(ToolCall { call_id, session_id, epoch, digest, input, limits, output_mode, quiet })
}

fn tool(input: &pb::call::Input) -> Checked<(ToolInput, Duration)> {
    use pb::call::Input;
    let file = |input| Ok((input, limits::FILE_TOOL_TIMEOUT));
    match input.clone() {
        Input::Bash(bash) => {
            let timeout = timeout("bash.timeout_ms", bash.timeout_ms)?;
            Ok((ToolInput::Bash(BashInput { command: bash.command, restart: bash.restart }), timeout))
        }
        Input::Read(read) => {
            let view_range = match read.view_range[..] {
                [] => None,
                [first, last] => Some((first, last)),
                _ => {
                    let problem = format!("{} numbers", read.view_range.len());
                    return Err(ToolFailure::invalid("read.view_range", problem, "send none, or first and last line"));
                }
            };
            if let Some((first, last)) = view_range
                && (first < 1 || (last > 0 && last < first))
            {
                let problem = format!("[{first}, {last}] is not a range of lines");
                let fix = "count lines from 1; an end of 0 or less means the end of the file";
                return Err(ToolFailure::invalid("read.view_range", problem, fix));
            }
            file(ToolInput::Read(ReadInput { file_path: read.file_path, view_range }))
        }
        Input::Write(write) => {
            file(ToolInput::Write(WriteInput { file_path: write.file_path, content: write.content }))
        }
        Input::Edit(edit) => file(ToolInput::Edit(EditInput {
            file_path: edit.file_path,
            old_string: edit.old_string,
            new_string: edit.new_string,
            replace_all: edit.replace_all,
        })),
        Input::Glob(glob) => file(ToolInput::Glob(GlobInput { pattern: glob.pattern, path: glob.path })),
        Input::Grep(grep) => file(ToolInput::Grep(GrepInput { pattern: grep.pattern, path: grep.path })),
        Input::Exec(exec) => {
            let timeout = timeout("exec.timeout_ms", exec.timeout_ms)?;
            let terminal = exec.terminal.map(|size| terminal("exec.terminal", size)).transpose()?;
            let (argv, env, cwd, stdin) = (exec.argv, exec.env, exec.cwd, exec.stdin);
            Ok((ToolInput::Exec(ExecInput { argv, env, cwd, stdin, terminal }), timeout))
        }
    }
}

fn timeout(field: &str, milliseconds: i64) -> Checked<Duration> {
    match u64::try_from(milliseconds) {
        Ok(0) => Ok(limits::BASH_TIMEOUT),
        Ok(milliseconds) if Duration::from_millis(milliseconds) <= LONGEST => Ok(Duration::from_millis(milliseconds)),
        Ok(_) => Err(ToolFailure::invalid(field, "is more than 30 days", "send milliseconds")),
        Err(_) => {
            Err(ToolFailure::invalid(field, "is negative", "send 0 for the default, or a number of milliseconds"))
        }
    }
}

fn terminal(field: &str, size: pb::TerminalSize) -> Checked<Terminal> {
    let side = |name: &str, value: u32, default: u16| match u16::try_from(value) {
        Ok(0) => Ok(default),
        Ok(value) => Ok(value),
        Err(_) => {
            Err(ToolFailure::invalid(&format!("{field}.{name}"), format!("{value} is too large"), "at most 65535"))
        }
    };
    Ok(Terminal { columns: side("columns", size.columns, 80)?, rows: side("rows", size.rows, 24)? })
}

/// Ends a call.
pub(super) fn cancel(message: &pb::CancelCall) -> Checked<(CallId, SessionId, u64, CancelMode)> {
    let mode = match known::<pb::CancelMode>("mode", message.mode)? {
        pb::CancelMode::Unspecified | pb::CancelMode::Interrupt => CancelMode::Interrupt,
        pb::CancelMode::Terminate => CancelMode::Terminate,
        pb::CancelMode::Kill => CancelMode::Kill,
    };
    Ok((call_id(&message.call_id)?, session_id(&message.session_id)?, epoch(message.epoch)?, mode))
}

/// Bytes for standard input.
pub(super) fn stdin(message: pb::WriteStdin) -> Checked<(CallId, u64, Vec<u8>, bool)> {
    if message.data.len() > limits::CHUNK_BYTES {
        let problem = format!("{} bytes; at most {} are allowed", message.data.len(), limits::CHUNK_BYTES);
        return Err(ToolFailure::invalid("data", problem, "send the input in smaller pieces"));
    }
    Ok((call_id(&message.call_id)?, message.offset, message.data, message.eof))
}

/// New size of a terminal.
pub(super) fn resize(message: pb::ResizeTerminal) -> Checked<(CallId, Terminal)> {
    let Some(size) = message.size else {
        return Err(ToolFailure::invalid("size", "is missing", "send the new size"));
    };
    Ok((call_id(&message.call_id)?, terminal("size", size)?))
}

/// How the runner is emptied, and when patience ends.
pub(super) fn drain(message: &pb::Drain) -> Checked<(DrainMode, Option<Duration>)> {
    let mode = match known::<pb::DrainMode>("mode", message.mode)? {
        pb::DrainMode::FinishSessions => DrainMode::FinishSessions,
        pb::DrainMode::Unspecified | pb::DrainMode::FinishCalls => DrainMode::FinishCalls,
        pb::DrainMode::Now => DrainMode::Now,
        pb::DrainMode::Resume => DrainMode::Undo,
    };
    Ok((mode, duration("deadline", message.deadline.as_ref())?))
}

/// Progress of streams.
pub(super) fn stream_acks(acks: &[pb::StreamAck]) -> Checked<Vec<(Stream, u64)>> {
    acks.iter()
        .map(|ack| {
            let stream = match known::<pb::OutputStream>("stream", ack.stream)? {
                pb::OutputStream::Stdout => Stream::Stdout,
                pb::OutputStream::Stderr => Stream::Stderr,
                pb::OutputStream::Terminal => Stream::Terminal,
                pb::OutputStream::Result => Stream::Result,
                pb::OutputStream::Unspecified => {
                    return Err(ToolFailure::invalid("stream", "is not set", "name the stream"));
                }
            };
            Ok((stream, ack.through))
        })
        .collect()
}

/// A time that must be neither negative nor absurd.
pub(super) fn duration(field: &str, value: Option<&prost_types::Duration>) -> Checked<Option<Duration>> {
    let Some(value) = value else { return Ok(None) };
    let time = match (u64::try_from(value.seconds), u32::try_from(value.nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Duration::new(seconds, nanos),
        _ => return Err(ToolFailure::invalid(field, "is negative or malformed", "send a time of 0 or more")),
    };
    if time > LONGEST {
        return Err(ToolFailure::invalid(field, "is more than 30 days", "send a shorter time"));
    }
    Ok(Some(time))
}

fn epoch(epoch: u64) -> Checked<u64> {
    if epoch == 0 {
        return Err(ToolFailure::invalid(
            "epoch",
            "is missing",
            "send the epoch of the session's placement, at least 1",
        ));
    }
    Ok(epoch)
}

fn known<E: TryFrom<i32>>(field: &str, value: i32) -> Checked<E> {
    E::try_from(value).map_err(|_| {
        ToolFailure::new(
            Code::InvalidField,
            format!("{field}: {value} is not a value this runner knows"),
            "use a value of the schema version agreed in Welcome",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(input: pb::call::Input) -> pb::Call {
        pb::Call { call_id: "c".into(), session_id: "s".into(), epoch: 1, input: Some(input), ..Default::default() }
    }

    fn bash(timeout_ms: i64) -> pb::Call {
        message(pb::call::Input::Bash(pb::BashInput { command: Some("true".into()), timeout_ms, ..Default::default() }))
    }

    #[test]
    fn every_bad_call_is_refused_with_the_name_of_its_field() {
        let read = |range: &[i64]| {
            message(pb::call::Input::Read(pb::ReadInput { file_path: "f".into(), view_range: range.to_vec() }))
        };
        let exec =
            pb::ExecInput { terminal: Some(pb::TerminalSize { columns: 70_000, rows: 1 }), ..Default::default() };
        let time = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
        let cases = [
            (pb::Call { call_id: String::new(), ..bash(0) }, "call_id is empty"),
            (pb::Call { session_id: "a b".into(), ..bash(0) }, "session_id contains ' '"),
            (pb::Call { session_id: "claude:e:s".into(), ..bash(0) }, "session_id: claude:e:s begins with \"claude:\""),
            (pb::Call { call_id: "claude:e:c".into(), ..bash(0) }, "call_id: claude:e:c begins with \"claude:\""),
            (pb::Call { epoch: 0, ..bash(0) }, "epoch: is missing"),
            (pb::Call { input: None, ..bash(0) }, "input: no tool is set"),
            (
                pb::Call { output: Some(pb::OutputPolicy { mode: 77, ..Default::default() }), ..bash(0) },
                "output.mode: 77",
            ),
            (bash(-1), "bash.timeout_ms: is negative"),
            (bash(i64::MAX), "bash.timeout_ms: is more than 30 days"),
            (read(&[1]), "read.view_range: 1 numbers"),
            (read(&[0, 5]), "read.view_range: [0, 5]"),
            (read(&[5, 2]), "read.view_range: [5, 2]"),
            (message(pb::call::Input::Exec(exec)), "exec.terminal.columns: 70000"),
            (pb::Call { start_within: time(-1, 0), ..bash(0) }, "start_within: is negative"),
            (pb::Call { kill_grace: time(i64::MAX, 0), ..bash(0) }, "kill_grace: is more than"),
            (
                pb::Call { output: Some(pb::OutputPolicy { head_bytes: u64::MAX, ..Default::default() }), ..bash(0) },
                "output: head_bytes and tail_bytes",
            ),
        ];
        for (message, expected) in cases {
            let failure = call(&message).unwrap_err();
            assert!(failure.message.starts_with(expected), "{} does not start with {expected}", failure.message);
            assert!(!failure.remediation.is_empty());
        }
    }

    #[test]
    fn digest_tells_requests_apart_but_not_placements() {
        let first = call(&bash(0)).unwrap();
        let moved = call(&pb::Call { epoch: 9, ..bash(0) }).unwrap();
        let other = call(&bash(5)).unwrap();
        assert_eq!(first.digest, moved.digest);
        assert_ne!(first.digest, other.digest);
    }

    #[test]
    fn order_of_variables_does_not_change_the_digest_of_a_session_but_values_do() {
        let with = |pairs: &[(&str, &str)]| {
            let variables = pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
            open(&pb::OpenSession { session_id: "s".into(), epoch: 1, variables, ..Default::default() }).unwrap().digest
        };
        assert_eq!(with(&[("A", "1"), ("B", "2")]), with(&[("B", "2"), ("A", "1")]));
        assert_ne!(with(&[("A", "1")]), with(&[("A", "2")]));
        assert_ne!(with(&[("A", "1B")]), with(&[("A1", "B")]));
    }

    #[test]
    fn parts_of_the_schema_that_are_not_built_are_refused_by_name() {
        let base = pb::OpenSession { session_id: "s".into(), epoch: 1, ..Default::default() };
        let open_network = pb::NetworkPolicy { mode: pb::NetworkMode::Open.into(), ..Default::default() };
        let cases = [
            (pb::OpenSession { secrets: vec![pb::SecretBinding::default()], ..base.clone() }, "secrets"),
            (pb::OpenSession { mounts: vec![pb::BlobMount::default()], ..base.clone() }, "mounts"),
            (pb::OpenSession { network: Some(open_network), ..base }, "network.mode: NETWORK_MODE_OPEN"),
        ];
        for (message, field) in cases {
            let failure = open(&message).unwrap_err();
            assert_eq!(failure.code, Code::Unimplemented);
            assert!(failure.message.starts_with(field), "{}", failure.message);
        }
    }
}
