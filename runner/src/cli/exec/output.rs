//! Output of the command on its way to ours: as it arrives, or kept for `--json`.

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;

use super::ExecError;
use crate::cli::{outcome, say};
use crate::sandbox::live::LiveSandbox;
use crate::work::{CallEnd, CallEvent, CallId, CallObserver, Receipt, Sandbox, Stream, StreamLengths, limits};

/// Output of one stream kept for `--json`; more is cut and marked.
const LARGEST_JSON_STREAM: usize = 16 << 20;

/// What is known of the call.
#[derive(Debug, Default)]
pub(super) struct CallState {
    lengths: StreamLengths,
    end: Option<Box<CallEnd>>,
}

pub(super) struct Observer(pub(super) watch::Sender<CallState>);

impl CallObserver for Observer {
    fn observe(&self, event: CallEvent) {
        self.0.send_modify(|state| match event {
            CallEvent::Started { .. } => {}
            CallEvent::OutputAdvanced(lengths) => state.lengths.merge(&lengths),
            CallEvent::Finished(end) => state.end = Some(end),
        });
    }
}

/// Prints output until the call is over and everything is printed.
pub(super) async fn follow(
    sandbox: &LiveSandbox,
    call_id: &CallId,
    mut progress: watch::Receiver<CallState>,
    output: &mut Output,
) -> Result<CallEnd, ExecError> {
    let lost = sandbox.lost();
    tokio::pin!(lost);
    loop {
        let (lengths, end) = {
            let mut state = progress.borrow_and_update().lengths;
            let end = progress.borrow().end.clone();
            for summary in end.iter().flat_map(|end| &end.streams) {
                state.advance(summary.stream, summary.total_bytes);
            }
            (state, end)
        };
        for stream in [Stream::Stdout, Stream::Stderr, Stream::Terminal] {
            if let Some(inline) = end.as_ref().and_then(|end| inline(end, stream)) {
                output.print_rest(stream, inline).await?;
            }
            tokio::select! {
                printed = print_up_to(sandbox, call_id, stream, lengths.get(stream), output) => printed?,
                reason = &mut lost => return Err(ExecError::Lost(reason)),
            }
        }
        if let Some(end) = end {
            return Ok(sandbox.explain(*end).await);
        }
        tokio::select! {
            changed = progress.changed() => {
                changed.map_err(|_| ExecError::Lost("the connection to it has ended".into()))?;
            }
            reason = &mut lost => return Err(ExecError::Lost(reason)),
        }
    }
}

fn inline(end: &CallEnd, stream: Stream) -> Option<&[u8]> {
    end.streams.iter().find(|summary| summary.stream == stream)?.inline.as_deref()
}

async fn print_up_to(
    sandbox: &LiveSandbox,
    call_id: &CallId,
    stream: Stream,
    total: u64,
    output: &mut Output,
) -> Result<(), ExecError> {
    while output.position(stream) < total {
        let from = output.position(stream);
        let chunk = sandbox.read_output(call_id, stream, from, limits::CHUNK_BYTES).await.map_err(ExecError::Call)?;
        if chunk.offset > from {
            output.dropped[index(stream)] += chunk.offset - from;
        }
        if chunk.bytes.is_empty() {
            output.skip_to(stream, if chunk.end { total } else { chunk.offset });
            return Ok(());
        }
        output.print(stream, chunk.offset, &chunk.bytes).await?;
    }
    Ok(())
}

/// Where output goes, and how much of it is already there.
pub(super) struct Output {
    json: bool,
    positions: [u64; 2],
    kept: [Vec<u8>; 2],
    cut: [bool; 2],
    /// Bytes that were gone before they could be printed.
    dropped: [u64; 2],
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { json, positions: [0; 2], kept: [Vec::new(), Vec::new()], cut: [false; 2], dropped: [0; 2] }
    }

    fn position(&self, stream: Stream) -> u64 {
        self.positions[index(stream)]
    }

    fn skip_to(&mut self, stream: Stream, position: u64) {
        self.positions[index(stream)] = position;
    }

    /// `whole` is the whole stream; what is already printed is not printed again.
    async fn print_rest(&mut self, stream: Stream, whole: &[u8]) -> Result<(), ExecError> {
        let from = usize::try_from(self.position(stream)).unwrap_or(usize::MAX);
        match whole.get(from..) {
            Some(rest) if !rest.is_empty() => self.print(stream, from as u64, rest).await,
            _ => Ok(()),
        }
    }

    async fn print(&mut self, stream: Stream, offset: u64, bytes: &[u8]) -> Result<(), ExecError> {
        self.skip_to(stream, offset + bytes.len() as u64);
        if self.json {
            let kept = &mut self.kept[index(stream)];
            let room = LARGEST_JSON_STREAM - kept.len();
            kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
            self.cut[index(stream)] |= bytes.len() > room;
            return Ok(());
        }
        match stream {
            Stream::Stderr => write_all(tokio::io::stderr(), bytes).await,
            _ => write_all(tokio::io::stdout(), bytes).await,
        }
    }

    pub(super) async fn finish(&self, end: &CallEnd, receipt: &Receipt) -> Result<(), ExecError> {
        for (name, dropped) in ["standard output", "standard error"].into_iter().zip(self.dropped) {
            // Once: a flood has a hole at every look, and whoever does not read our notes must not be held up by them.
            if dropped > 0 {
                say(&format!(
                    "sandbox-runner: note: {dropped} bytes of {name} were dropped: they were written faster than read, and \
                     exceed what a quarter of --disk keeps"
                ));
            }
        }
        if !self.json {
            return Ok(());
        }
        let mut value = outcome::to_json(end, receipt);
        for (name, kept, cut) in [("stdout", &self.kept[0], self.cut[0]), ("stderr", &self.kept[1], self.cut[1])] {
            value[name] = outcome::text_or_base64(kept);
            value[format!("{name}_truncated")] = cut.into();
        }
        write_all(tokio::io::stdout(), format!("{value}\n").as_bytes()).await
    }
}

/// A call in a terminal has that one stream, which goes where standard output goes.
fn index(stream: Stream) -> usize {
    usize::from(stream == Stream::Stderr)
}

async fn write_all(mut target: impl AsyncWrite + Unpin, bytes: &[u8]) -> Result<(), ExecError> {
    target.write_all(bytes).await.map_err(ExecError::Output)?;
    target.flush().await.map_err(ExecError::Output)
}
