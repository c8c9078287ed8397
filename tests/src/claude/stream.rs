//! An event stream: what the log of a session says from one entry on, as frames, and a ping now and then.

use std::sync::Arc;

use hyper::body::Bytes;
use serde_json::Value;
use tokio::sync::mpsc;

use super::event::Wire;
use super::history::own;
use super::serve::{Chunk, Shared, broken};
use super::session::{Frame, Logged};

/// Rest between the pieces of a frame, so that they arrive apart.
const APART: std::time::Duration = std::time::Duration::from_millis(3);

/// What a stream does next.
enum Act {
    Send(Vec<u8>),
    Pieces(Vec<u8>, usize),
    End,
    Break,
}

/// Feeds the body of a stream until it ends, breaks, or nobody reads it.
pub(super) async fn feed(
    shared: Arc<Shared>,
    session_id: String,
    thread: Option<String>,
    mut cursor: usize,
    body: mpsc::Sender<Chunk>,
) {
    let mut changed = shared.changed();
    loop {
        changed.mark_unchanged();
        let (acts, ping_every) = {
            let plane = shared.lock();
            let Ok(session) = plane.find_session(&session_id) else { return };
            let primary = session.threads[0].id.as_str();
            let acts: Vec<Act> =
                session.log[cursor..].iter().flat_map(|logged| acts(logged, thread.as_deref(), primary)).collect();
            cursor = session.log.len();
            (acts, plane.settings.ping_every)
        };
        for act in acts {
            let sent = match act {
                Act::Send(bytes) => body.send(Ok(Bytes::from(bytes))).await,
                Act::Pieces(bytes, length) => send_pieces(&body, &bytes, length).await,
                Act::End => return,
                Act::Break => {
                    // What was sent before it is to arrive before the connection breaks.
                    tokio::time::sleep(APART).await;
                    let _ = body.send(Err(broken())).await;
                    return;
                }
            };
            if sent.is_err() {
                return;
            }
        }
        tokio::select! {
            // The sender lives in `shared`.
            _ = changed.changed() => {}
            () = tokio::time::sleep(ping_every) => {
                let ping = Bytes::from_static(b"event: ping\ndata: {\"type\": \"ping\"}\n\n");
                if body.send(Ok(ping)).await.is_err() {
                    return;
                }
            }
            () = body.closed() => return,
        }
    }
}

async fn send_pieces(
    body: &mpsc::Sender<Chunk>,
    bytes: &[u8],
    length: usize,
) -> Result<(), mpsc::error::SendError<Chunk>> {
    for piece in bytes.chunks(length.max(1)) {
        body.send(Ok(Bytes::copy_from_slice(piece))).await?;
        tokio::time::sleep(APART).await;
    }
    Ok(())
}

fn acts(logged: &Logged, thread: Option<&str>, primary: &str) -> Vec<Act> {
    let belongs = match thread {
        None => true,
        Some(thread) if thread == primary => logged.thread.is_none(),
        Some(thread) => logged.event.is_none() || logged.thread.as_deref() == Some(thread),
    };
    if !belongs {
        return Vec::new();
    }
    let event = logged.event.as_ref().map(|event| own(event, thread.is_some()));
    match (&logged.frame, event) {
        (Frame::Raw(bytes), _) => vec![Act::Send(bytes.clone())],
        (Frame::End, _) => vec![Act::End],
        (Frame::Break, _) => vec![Act::Break],
        (Frame::Event(wire), Some(event)) => on_wire(wire, &event),
        (Frame::Event(_), None) => Vec::new(),
    }
}

fn on_wire(wire: &Wire, event: &Value) -> Vec<Act> {
    let name = event["type"].as_str().unwrap_or("message");
    let whole = || frame(Some(name), &event.to_string()).into_bytes();
    match wire {
        Wire::Whole => vec![Act::Send(whole())],
        Wire::Pieces(length) => vec![Act::Pieces(whole(), *length)],
        Wire::ManyLines => {
            let lines = serde_json::to_string_pretty(event).unwrap_or_default();
            vec![Act::Send(frame(Some(name), &lines).into_bytes())]
        }
        Wire::Named(name) => vec![Act::Send(frame(name.as_deref(), &event.to_string()).into_bytes())],
        Wire::Twice => vec![Act::Send(whole()), Act::Send(whole())],
        Wire::CutAfter(bytes) => {
            let mut part = whole();
            part.truncate(*bytes);
            vec![Act::Send(part), Act::Break]
        }
        Wire::Absent => Vec::new(),
    }
}

fn frame(name: Option<&str>, data: &str) -> String {
    let mut frame = String::new();
    if let Some(name) = name {
        frame.push_str("event: ");
        frame.push_str(name);
        frame.push('\n');
    }
    for line in data.lines() {
        frame.push_str("data: ");
        frame.push_str(line);
        frame.push('\n');
    }
    frame.push('\n');
    frame
}
