//! The other end of a sandbox's control socket with nothing between us and process 1: calls of an agent, one by one.

use std::path::Path;

use anyhow::{Context, bail};
use prost::Message;
use proto::init::v1::{
    AcknowledgeExit, Bash, CallFinished, Exec, Frame, Hello, OutputMode, Request, StartCall, Stream, Tool, ToolResult,
    content_block, frame, outcome, request, start_call,
};

use crate::launcher::Connection;

/// Largest packet of the protocol.
const LARGEST_PACKET: usize = 128 * 1024;

/// A connection to process 1 of one sandbox.
#[derive(Debug)]
pub struct Keeper {
    connection: Connection,
    requests: u64,
    calls: u64,
    /// What was told and not asked for yet.
    events: Vec<frame::Body>,
}

impl Keeper {
    /// Connects with the runner's uid and greets.
    ///
    /// # Errors
    /// When process 1 does not welcome us.
    pub fn connect(socket: &Path) -> anyhow::Result<Self> {
        let connection = Connection::open(socket)?;
        let mut keeper = Self { connection, requests: 0, calls: 0, events: Vec::new() };
        match keeper.ask(request::Body::Hello(Hello { major: 1 }))? {
            frame::Body::Welcome(_) => Ok(keeper),
            other => bail!("no welcome but {other:?}"),
        }
    }

    fn receive(&self) -> anyhow::Result<Frame> {
        let packet = self.connection.receive_up_to(LARGEST_PACKET).context("receiving")?;
        if packet.is_empty() {
            bail!("process 1 closed the connection");
        }
        Ok(Frame::decode(packet.as_slice())?)
    }

    /// Sends a request and waits for its answer. What else is told meanwhile is kept.
    ///
    /// # Errors
    /// When the connection ends.
    pub fn ask(&mut self, body: request::Body) -> anyhow::Result<frame::Body> {
        self.requests += 1;
        let request = Request { request_id: self.requests, generation: 1, body: Some(body) };
        self.connection.send(&request.encode_to_vec()).context("sending")?;
        loop {
            let frame = self.receive()?;
            let body = frame.body.context("an empty frame")?;
            if frame.request_id == self.requests {
                return Ok(body);
            }
            self.events.push(body);
        }
    }

    /// Starts a call and returns its id.
    ///
    /// # Errors
    /// When it is refused.
    pub fn start(&mut self, work: start_call::Work, timeout_ms: u64) -> anyhow::Result<String> {
        self.calls += 1;
        let call_id = format!("call-{}", self.calls);
        let start = StartCall {
            staged_input_bytes: 0,
            call_id: call_id.clone(),
            start_immediately: true,
            timeout_ms,
            grace_ms: 500,
            output_mode: OutputMode::Merged.into(),
            inline_limit_bytes: 65_536,
            spool_head_bytes: 4 << 20,
            spool_tail_bytes: 1 << 20,
            work: Some(work),
        };
        match self.ask(request::Body::StartCall(start))? {
            frame::Body::CallPrepared(_) => Ok(call_id),
            // A short call may be over before anything else is said of it.
            event @ (frame::Body::CallStarted(_) | frame::Body::CallFinished(_)) => {
                self.events.push(event);
                Ok(call_id)
            }
            other => bail!("not started but {other:?}"),
        }
    }

    /// Waits for the end of a call and acknowledges it.
    ///
    /// # Errors
    /// When the connection ends before the call does.
    pub fn finish(&mut self, call_id: &str) -> anyhow::Result<Finished> {
        let end = |event: &frame::Body| match event {
            frame::Body::CallFinished(finished) if finished.call_id == call_id => Some(finished.clone()),
            _ => None,
        };
        let finished = loop {
            if let Some(finished) = self.events.iter().find_map(end) {
                break finished;
            }
            let body = self.receive()?.body.context("an empty frame")?;
            self.events.push(body);
        };
        self.events.clear();
        self.ask(request::Body::AcknowledgeExit(AcknowledgeExit { call_id: call_id.to_owned() }))?;
        Ok(Finished(finished))
    }

    /// Runs a command in the persistent shell, for a minute at most.
    ///
    /// # Panics
    /// When it cannot be run or does not end: these calls are what a test is about.
    pub fn bash(&mut self, command: &str) -> Finished {
        let work = start_call::Work::Bash(Bash { command: command.to_owned(), restart: false });
        self.run(work)
    }

    /// Runs a program.
    ///
    /// # Panics
    /// As [`Keeper::bash`].
    pub fn exec(&mut self, argv: &[&str]) -> Finished {
        let argv = argv.iter().map(|argument| argument.as_bytes().to_vec()).collect();
        self.run(start_call::Work::Exec(Exec { argv, ..Exec::default() }))
    }

    /// Runs a file tool.
    ///
    /// # Panics
    /// As [`Keeper::bash`].
    pub fn tool(&mut self, name: &str, input: &serde_json::Value) -> Finished {
        self.run(start_call::Work::Tool(Tool { name: name.to_owned(), input_json: input.to_string().into_bytes() }))
    }

    fn run(&mut self, work: start_call::Work) -> Finished {
        let call_id = self.start(work, 60_000).expect("the call is taken");
        self.finish(&call_id).expect("the call ends")
    }
}

/// A call that is over.
#[derive(Debug, Clone)]
pub struct Finished(pub CallFinished);

impl Finished {
    /// Exit code; `None` when it did not end by itself.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        match self.0.outcome.as_ref()?.kind.as_ref()? {
            outcome::Kind::Exited(exited) => Some(exited.code),
            _ => None,
        }
    }

    /// What it printed, as far as that is short.
    #[must_use]
    pub fn text(&self) -> String {
        let printed = self.0.streams.iter().find(|stream| stream.stream() == Stream::Stdout);
        printed.map(|stream| String::from_utf8_lossy(&stream.inline).into_owned()).unwrap_or_default()
    }

    /// Bytes that it printed, whether they were kept or not.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.streams.iter().map(|stream| stream.total_bytes).sum()
    }

    /// The text of a file tool, and whether it is an error; `None` when the tool did not answer.
    #[must_use]
    pub fn answer(&self) -> Option<(String, bool)> {
        let stream = self.0.streams.iter().find(|stream| stream.stream() == Stream::Result)?;
        let result = ToolResult::decode(stream.inline.as_slice()).ok()?;
        match result.content.first()?.kind.as_ref()? {
            content_block::Kind::Text(text) => Some((text.clone(), result.is_error)),
            _ => None,
        }
    }
}
