//! `sandbox-runner journal inspect`: what is written down, and what the next runner would begin with. Works beside a daemon.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::{complain, embedded, print, say};
use crate::config::units::display_size;
use crate::journal::{RecordReport, Recovery, Report, SegmentReport, inspect};

#[derive(Debug, Args)]
pub(super) struct JournalArguments {
    #[command(subcommand)]
    command: JournalCommand,
}

#[derive(Debug, Subcommand)]
enum JournalCommand {
    /// Print segments, records and what would be recovered; never inputs or outputs of calls
    Inspect(InspectArguments),
}

#[derive(Debug, Args)]
struct InspectArguments {
    /// Directory of the journal [default: journal in the state directory]
    #[arg(value_name = "DIRECTORY", conflicts_with = "state_dir")]
    directory: Option<PathBuf>,
    /// State directory of the daemon [default: /var/lib/sandbox-runner for root, else below the home]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub(super) fn run(arguments: &JournalArguments) -> ExitCode {
    let JournalCommand::Inspect(arguments) = &arguments.command;
    let directory = arguments
        .directory
        .clone()
        .unwrap_or_else(|| embedded::home(arguments.state_dir.as_deref()).state.join("journal"));
    match inspect(&directory) {
        Ok(report) => {
            let text = if arguments.json { json(&report) } else { Ok(text(&report)) };
            match text {
                Ok(text) => print(text.trim_end()),
                Err(error) => {
                    say(&format!("sandbox-runner: the journal cannot be shown: {error}"));
                    return ExitCode::FAILURE;
                }
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn json(report: &Report) -> serde_json::Result<String> {
    serde_json::to_string_pretty(report)
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    let mut line = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    line("SEGMENTS".into());
    for segment in &report.segments {
        line(segment_line(segment));
    }
    for leftover in &report.leftovers {
        line(format!("  {leftover}  does not count"));
    }
    line("RECORDS".into());
    for record in &report.records {
        line(record_line(record));
    }
    let bytes: usize = report.records.iter().map(|record| record.bytes).sum();
    line(format!("  {} records, {}", report.records.len(), size(bytes)));
    line("RECOVERY".into());
    recovery_lines(&report.recovery).into_iter().for_each(&mut line);
    text
}

fn segment_line(segment: &SegmentReport) -> String {
    format!(
        "  {}  {:<7}  {} records from {}, {} of {} used, state {}, boot {}{}",
        segment.file,
        segment.role,
        segment.records,
        segment.first_lsn,
        display_size(segment.used_bytes),
        display_size(segment.file_bytes),
        segment.state_id,
        segment.boot_id,
        if segment.torn { ", ends torn" } else { "" },
    )
}

fn record_line(record: &RecordReport) -> String {
    let mut line = format!("  {:>8}  {:<15}  {:>8}", record.lsn, record.kind, size(record.bytes));
    for (name, id) in [("session", &record.session_id), ("call", &record.call_id)] {
        if let Some(id) = id {
            let _ = write!(line, "  {name} {id}");
        }
    }
    line
}

fn recovery_lines(recovery: &Recovery) -> Vec<String> {
    let mut lines = vec![format!(
        "  events through {}, term {}, epoch floor {}, {} tombstones",
        recovery.events_through, recovery.term, recovery.epoch_floor, recovery.tombstones
    )];
    lines.push(format!("  {} open sessions", recovery.sessions.len()));
    for session in &recovery.sessions {
        let sandbox = session.sandbox_id.as_deref().unwrap_or("none yet");
        let (id, epoch) = (&session.session_id, session.epoch);
        lines.push(format!("    {id}  epoch {epoch}, sandbox {sandbox}, {} acknowledged calls", session.acknowledged));
    }
    let count = |phase: &str| recovery.calls.iter().filter(|call| call.phase == phase).count();
    let (accepted, started, finished) = (count("accepted"), count("started"), count("finished"));
    lines.push(format!("  calls: {accepted} accepted, {started} started, {finished} finished and not acknowledged"));
    for call in &recovery.calls {
        let cancelled = if call.cancelled { ", cancelled" } else { "" };
        lines.push(format!(
            "    {}  {} {}{cancelled}, session {}",
            call.call_id, call.tool, call.phase, call.session_id
        ));
    }
    if recovery.ignored_records > 0 {
        lines.push(format!("  {} records make no sense and are ignored", recovery.ignored_records));
    }
    if recovery.torn_tail {
        lines.push(
            "  the last record is torn, or being written at this moment; nobody was told that it is there".into(),
        );
    }
    lines
}

fn size(bytes: usize) -> String {
    display_size(u64::try_from(bytes).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{FileJournal, Journal, Record};
    use crate::work::{CallId, CancelMode};

    #[test]
    fn records_and_recovery_are_shown_beside_an_open_journal() {
        let directory = tempfile::tempdir().unwrap();
        let (journal, _) = FileJournal::open(directory.path(), "state", "boot").unwrap();
        let record = Record::Cancelled { call_id: CallId::new("call-1").unwrap(), mode: CancelMode::Kill };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(journal.append(record)).unwrap();

        let report = inspect(directory.path()).unwrap();
        let text = text(&report);
        assert!(text.contains("cancelled") && text.contains("call call-1"), "{text}");
        assert!(text.contains("1 tombstones") && text.contains("state state, boot boot"), "{text}");
        let value: serde_json::Value = serde_json::from_str(&json(&report).unwrap()).unwrap();
        assert_eq!(value["recovery"]["tombstones"], 1);
        drop(journal);
    }
}
