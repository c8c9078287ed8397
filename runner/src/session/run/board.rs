//! Where sandboxes note what happened to calls: one line per call, latest lengths only.
//!
//! It cannot grow beyond the number of running calls and never makes a writer wait.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use crate::work::{CallEnd, CallEvent, CallId, CallObserver, SessionId, StreamLengths};

/// What happened to one call since the board was last taken.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) session_id: SessionId,
    pub(super) started: Option<(u64, u64)>,
    pub(super) lengths: Option<StreamLengths>,
    pub(super) finished: Option<Box<CallEnd>>,
}

/// All lines.
#[derive(Debug, Default)]
pub(super) struct Board {
    lines: Mutex<HashMap<CallId, Line>>,
    notify: Notify,
}

impl Board {
    /// Resolves when something was noted.
    pub(super) async fn changed(&self) {
        self.notify.notified().await;
    }

    /// Takes every line but those of sessions that are not ready to be told about.
    pub(super) fn take(&self, unready: &HashSet<SessionId>) -> HashMap<CallId, Line> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if unready.is_empty() {
            return std::mem::take(&mut *lines);
        }
        lines.extract_if(|_, line| !unready.contains(&line.session_id)).collect()
    }

    /// An observer that notes the events of one call.
    pub(super) fn observer(board: &Arc<Self>, session_id: SessionId, call_id: CallId) -> Arc<dyn CallObserver> {
        Arc::new(Observer { board: Arc::clone(board), session_id, call_id })
    }
}

struct Observer {
    board: Arc<Board>,
    session_id: SessionId,
    call_id: CallId,
}

impl CallObserver for Observer {
    fn observe(&self, event: CallEvent) {
        let mut lines = self.board.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let line = lines.entry(self.call_id.clone()).or_insert_with(|| Line {
            session_id: self.session_id.clone(),
            started: None,
            lengths: None,
            finished: None,
        });
        match event {
            CallEvent::Started { boottime_ns, shell_generation } => {
                line.started = Some((boottime_ns, shell_generation))
            }
            CallEvent::OutputAdvanced(lengths) => line.lengths.get_or_insert_default().merge(&lengths),
            CallEvent::Finished(end) => line.finished = Some(end),
        }
        drop(lines);
        self.board.notify.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::Stream;

    #[test]
    fn a_flood_of_reports_is_one_line() {
        let board = Arc::new(Board::default());
        let call_id = CallId::new("c").unwrap();
        let observer = Board::observer(&board, SessionId::new("s").unwrap(), call_id.clone());
        for total in 0..10_000 {
            let mut lengths = StreamLengths::default();
            lengths.advance(Stream::Stdout, total);
            observer.observe(CallEvent::OutputAdvanced(lengths));
        }
        let lines = board.take(&HashSet::new());
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[&call_id].lengths.unwrap().get(Stream::Stdout), 9_999);
        assert!(board.take(&HashSet::new()).is_empty());
    }
}
