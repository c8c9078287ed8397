//! `sandbox-runner status`, `ps`, `inspect`, `kill` and `logs`: what a running daemon is doing, and ending parts of it.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use proto::admin::v1 as wire;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

mod status;
mod work;

use super::admin_link::{AdminArguments, AdminClient, AdminError, with_daemon};
use super::{outcome, print};
use crate::config::units::display_size;

#[derive(Debug, Args)]
pub(super) struct PsArguments {
    #[command(flatten)]
    daemon: AdminArguments,
}

#[derive(Debug, Args)]
pub(super) struct StatusArguments {
    #[command(flatten)]
    daemon: AdminArguments,
}

#[derive(Debug, Args)]
pub(super) struct InspectArguments {
    #[command(flatten)]
    target: Seen,
    #[command(flatten)]
    daemon: AdminArguments,
}

#[derive(Debug, Args)]
pub(super) struct KillArguments {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    daemon: AdminArguments,
}

#[derive(Debug, Args)]
pub(super) struct LogsArguments {
    /// The call
    #[arg(value_name = "CALL")]
    call: String,
    /// Which stream
    #[arg(long, value_enum, default_value_t = StreamChoice::Stdout)]
    stream: StreamChoice,
    /// First byte wanted
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    offset: u64,
    /// Go on until the call has ended
    #[arg(short = 'f', long)]
    follow: bool,
    #[command(flatten)]
    daemon: AdminArguments,
}

/// A session or a call.
#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
struct Target {
    /// A session
    #[arg(long, value_name = "ID")]
    session: Option<String>,
    /// A call
    #[arg(long, value_name = "ID")]
    call: Option<String>,
}

/// A session, a call or a work item.
#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
struct Seen {
    /// A session
    #[arg(long, value_name = "ID")]
    session: Option<String>,
    /// A call
    #[arg(long, value_name = "ID")]
    call: Option<String>,
    /// A work item of a queue
    #[arg(long, value_name = "ID")]
    work: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StreamChoice {
    /// Standard output, and standard error where both share a pipe
    Stdout,
    /// Standard error where it has a pipe of its own
    Stderr,
    /// What a terminal printed
    Terminal,
    /// The encoded result of a file tool
    Result,
}

/// Shows how the daemon stands.
pub(super) fn status(arguments: &StatusArguments) -> ExitCode {
    let json = arguments.daemon.json;
    with_daemon(&arguments.daemon, |mut daemon| async move {
        let status = daemon.status(wire::StatusRequest {}).await?.into_inner();
        if json {
            print(&status::json(&status).to_string());
        } else {
            print(status::text(&status).trim_end());
        }
        Ok(())
    })
}

/// Lists sessions and calls.
pub(super) fn ps(arguments: &PsArguments) -> ExitCode {
    let json = arguments.daemon.json;
    with_daemon(&arguments.daemon, |mut daemon| async move {
        let list = daemon.list_sessions(wire::ListSessionsRequest {}).await?.into_inner();
        if json {
            let session = |session: &wire::Session| {
                let mut value = session_json(session);
                let own = list.work_items.iter().filter(|item| item.session_id == session.session_id);
                value["work_items"] = own.map(work::json).collect();
                value
            };
            // A session is opened with its first call; until then its work item stands alone.
            let is_alone = |item: &&wire::WorkItem| !list.sessions.iter().any(|one| one.session_id == item.session_id);
            let alone = list.work_items.iter().filter(is_alone).map(|item| json!({ "work_items": [work::json(item)] }));
            print(&Value::Array(list.sessions.iter().map(session).chain(alone).collect()).to_string());
        } else {
            print(table(&list.sessions).trim_end());
            if !list.work_items.is_empty() {
                print(&format!("\n{}", work::table(&list.work_items).trim_end()));
            }
        }
        Ok(())
    })
}

/// Shows one session or call in full.
pub(super) fn inspect(arguments: &InspectArguments) -> ExitCode {
    let (target, json) = (arguments.target.clone(), arguments.daemon.json);
    with_daemon(&arguments.daemon, |mut daemon| async move {
        let target = match (target.session, target.call, target.work) {
            (Some(session), _, _) => wire::inspect_request::Target::SessionId(session),
            (_, Some(call), _) => wire::inspect_request::Target::CallId(call),
            (_, _, work) => wire::inspect_request::Target::WorkId(work.unwrap_or_default()),
        };
        let answer = daemon.inspect(wire::InspectRequest { target: Some(target) }).await?.into_inner();
        let receipt = answer.receipt.unwrap_or_default();
        let items = &answer.work_items;
        if json {
            let mut value = json!({});
            if let Some(session) = &answer.session {
                value = session_json(session);
                value["receipt"] = receipt_json(&receipt);
                value["slots"] = answer.slots.as_ref().map_or(Value::Null, slots_json);
            }
            value["work_items"] = items.iter().map(work::json).collect();
            print(&value.to_string());
        } else {
            let session = answer.session.as_ref().map(|session| full(session, &receipt)).unwrap_or_default();
            let items: String = items.iter().map(work::lines).collect();
            let left: String = answer.slots.iter().flat_map(|list| &list.slots).map(left_line).collect();
            print(format!("{items}{session}{left}").trim_end());
        }
        Ok(())
    })
}

/// Ends a session or call.
pub(super) fn kill(arguments: &KillArguments) -> ExitCode {
    let (target, json) = (arguments.target.clone(), arguments.daemon.json);
    with_daemon(&arguments.daemon, |mut daemon| async move {
        let target = match (target.session, target.call) {
            (Some(session), _) => wire::kill_request::Target::SessionId(session),
            (None, call) => wire::kill_request::Target::CallId(call.unwrap_or_default()),
        };
        daemon.kill(wire::KillRequest { target: Some(target) }).await?;
        if json {
            print("{}");
        }
        Ok(())
    })
}

/// Prints output of a call.
pub(super) fn logs(arguments: &LogsArguments) -> ExitCode {
    let stream = match arguments.stream {
        StreamChoice::Stdout => "stdout",
        StreamChoice::Stderr => "stderr",
        StreamChoice::Terminal => "terminal",
        StreamChoice::Result => "result",
    };
    let request = wire::LogsRequest {
        call_id: arguments.call.clone(),
        stream: stream.to_owned(),
        offset: arguments.offset,
        follow: arguments.follow,
    };
    let json = arguments.daemon.json;
    with_daemon(&arguments.daemon, |daemon| copy_output(daemon, request, json))
}

async fn copy_output(mut daemon: AdminClient, request: wire::LogsRequest, json: bool) -> Result<(), AdminError> {
    let mut pieces = daemon.logs(request).await?.into_inner();
    let mut output = tokio::io::stdout();
    while let Some(piece) = pieces.message().await? {
        if json {
            let line = json!({ "offset": piece.offset, "data": outcome::text_or_base64(&piece.data) });
            output.write_all(format!("{line}\n").as_bytes()).await?;
        } else {
            output.write_all(&piece.data).await?;
        }
        output.flush().await?;
    }
    Ok(())
}

fn table(sessions: &[wire::Session]) -> String {
    let mut text = format!("{:<36} {:<8} {:<10} {:<36} {:<8} OUTPUT\n", "SESSION", "PHASE", "TOOL", "CALL", "STATE");
    for session in sessions {
        let name = outcome::printable(&session.session_id);
        if session.calls.is_empty() {
            text += &format!("{name:<36} {:<8}\n", session.phase);
        }
        for call in &session.calls {
            let state = if call.outcome.is_empty() { &call.phase } else { &call.outcome };
            text += &format!(
                "{name:<36} {:<8} {:<10} {:<36} {:<8} {}\n",
                session.phase,
                call.tool,
                outcome::printable(&call.call_id),
                outcome::printable(state),
                display_size(call.output_bytes),
            );
        }
    }
    text
}

fn full(session: &wire::Session, receipt: &wire::Receipt) -> String {
    let limits = session.limits.unwrap_or_default();
    let mut text = format!(
        "session      {}\nphase        {}\nsandbox      {}\nenvironment  {}\nlimits       {} memory, {} processors, {} \
         processes, {} disk\ntier         {}\n",
        outcome::printable(&session.session_id),
        session.phase,
        session.sandbox_id,
        if session.environment.is_empty() { "default" } else { &session.environment },
        display_size(limits.memory_bytes),
        format_args!("{}.{:03}", limits.cpu_millis / 1000, limits.cpu_millis % 1000),
        limits.pids,
        display_size(limits.disk_bytes),
        if receipt.tier.is_empty() { "not measured" } else { &receipt.tier },
    );
    for layer in &receipt.layers {
        let enforced = if layer.enforced.is_empty() { "MISSING" } else { &layer.enforced };
        text += &format!("  {:<24} {}\n", layer.name, outcome::printable(enforced));
    }
    for call in &session.calls {
        let state = if call.outcome.is_empty() { &call.phase } else { &call.outcome };
        let (name, state) = (outcome::printable(&call.call_id), outcome::printable(state));
        text += &format!("call         {name} {} {state}, {} of output\n", call.tool, display_size(call.output_bytes));
    }
    text
}

fn left_line(slot: &wire::Slot) -> String {
    let pids: Vec<String> = slot.pids.iter().map(u32::to_string).collect();
    format!("left running by {}: {}\n", outcome::printable(&slot.call_id), pids.join(" "))
}

fn slots_json(list: &wire::SlotList) -> Value {
    list.slots.iter().map(|slot| json!({ "call_id": slot.call_id, "pids": slot.pids })).collect()
}

fn session_json(session: &wire::Session) -> Value {
    let limits = session.limits.unwrap_or_default();
    json!({
        "session_id": session.session_id,
        "epoch": session.epoch,
        "phase": session.phase,
        "sandbox_id": session.sandbox_id,
        "environment": session.environment,
        "tenant": session.tenant,
        "limits": {
            "cpu_millis": limits.cpu_millis,
            "memory_bytes": limits.memory_bytes,
            "disk_bytes": limits.disk_bytes,
            "pids": limits.pids,
        },
        "calls": session.calls.iter().map(|call| json!({
            "call_id": call.call_id,
            "tool": call.tool,
            "phase": call.phase,
            "outcome": call.outcome,
            "output_bytes": call.output_bytes,
        })).collect::<Vec<_>>(),
    })
}

fn receipt_json(receipt: &wire::Receipt) -> Value {
    json!({
        "tier": receipt.tier,
        "switched_off": receipt.switched_off,
        "layers": receipt.layers.iter().map(|layer| json!({
            "name": layer.name,
            "requested": layer.requested,
            "enforced": layer.enforced,
            "errno": layer.errno,
        })).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> wire::Session {
        let call = wire::Call {
            call_id: "c\u{1b}[2J".into(),
            tool: "bash".into(),
            phase: "running".into(),
            outcome: String::new(),
            output_bytes: 2048,
        };
        wire::Session { session_id: "s1".into(), phase: "ready".into(), calls: vec![call], ..Default::default() }
    }

    #[test]
    fn table_shows_running_calls_and_steers_no_terminal() {
        let text = table(&[session(), wire::Session { session_id: "idle".into(), ..Default::default() }]);

        assert!(text.contains("2 KiB") && text.contains("running") && text.contains("idle"), "{text}");
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn missing_layers_are_shown_as_missing() {
        let layer = wire::Layer { name: "seccomp".into(), requested: "standard".into(), ..Default::default() };
        let text = full(&session(), &wire::Receipt { layers: vec![layer], ..Default::default() });

        assert!(text.contains("seccomp                  MISSING"), "{text}");
        assert!(text.contains("tier         not measured"), "{text}");
    }
}
