//! Which connector hears what the sessions say: whoever has placed a session, which its id tells.

use std::collections::HashSet;

use tokio::sync::{mpsc, watch};

use crate::work::{SessionId, Update};

/// Waiting for one connector.
const QUEUED_UPDATES: usize = 1024;

/// Where updates go.
pub(super) struct Routes {
    orchestrator: Option<mpsc::Sender<Update>>,
    queues: Vec<(String, mpsc::Sender<Update>)>,
    sessions: HashSet<SessionId>,
    count: watch::Sender<usize>,
}

impl Routes {
    /// No routes yet, and the number of the orchestrator's sessions.
    pub(super) fn new() -> (Self, watch::Receiver<usize>) {
        let (count, counted) = watch::channel(0);
        (Self { orchestrator: None, queues: Vec::new(), sessions: HashSet::new(), count }, counted)
    }

    /// What the orchestrator hears.
    pub(super) fn orchestrator(&mut self) -> mpsc::Receiver<Update> {
        let (sender, receiver) = mpsc::channel(QUEUED_UPDATES);
        self.orchestrator = Some(sender);
        receiver
    }

    /// What a queue hears whose sessions and calls have ids that begin with `scope`.
    pub(super) fn queue(&mut self, scope: String) -> mpsc::Receiver<Update> {
        let (sender, receiver) = mpsc::channel(QUEUED_UPDATES);
        self.queues.push((scope, sender));
        receiver
    }

    /// Passes everything on until nothing comes any more. Every connector drains what it hears at all times.
    pub(super) async fn run(mut self, mut updates: mpsc::Receiver<Update>) {
        while let Some(update) = updates.recv().await {
            self.pass_on(update).await;
        }
    }

    async fn pass_on(&mut self, update: Update) {
        let Some(id) = id_of(&update) else {
            let everybody = self.orchestrator.iter().chain(self.queues.iter().map(|(_, queue)| queue));
            for connector in everybody {
                // A connector that has ended hears nothing more.
                let _ = connector.send(update.clone()).await;
            }
            return;
        };
        let queue = self.queues.iter().find(|(scope, _)| id.starts_with(scope.as_str()));
        let connector = match queue {
            Some((_, queue)) => Some(queue.clone()),
            // Of a queue that is not served any more: its results are in the journal.
            None if id.starts_with(crate::work::RESERVED_PREFIX) => None,
            None => {
                self.count(&update);
                self.orchestrator.clone()
            }
        };
        if let Some(connector) = connector {
            // As above.
            let _ = connector.send(update).await;
        }
    }

    fn count(&mut self, update: &Update) {
        match update {
            Update::SessionRestored { session_id, .. } | Update::SessionOpened { session_id, .. } => {
                self.sessions.insert(session_id.clone());
            }
            Update::SessionEnded { session_id, .. } => {
                self.sessions.remove(session_id);
            }
            _ => return,
        }
        let now = self.sessions.len();
        self.count.send_if_modified(|count| std::mem::replace(count, now) != now);
    }
}

/// The id that says whom an update concerns; `None`: everybody.
fn id_of(update: &Update) -> Option<&str> {
    match update {
        Update::Restored | Update::Drained { .. } => None,
        Update::SessionRestored { session_id, .. }
        | Update::SessionOpened { session_id, .. }
        | Update::SessionEnded { session_id, .. } => Some(session_id.as_str()),
        Update::CallRestored { call_id, .. }
        | Update::CallAccepted { call_id, .. }
        | Update::CallStarted { call_id, .. }
        | Update::OutputAdvanced { call_id, .. }
        | Update::CallFinished { call_id, .. }
        | Update::CancelNoted { call_id, .. }
        | Update::StdinAccepted { call_id, .. } => Some(call_id.as_str()),
        Update::Refused { session_id, call_id, .. } => {
            call_id.as_ref().map(|id| id.as_str()).or(session_id.as_ref().map(|id| id.as_str()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::{CallId, Receipt, Replay, SessionEnd};

    fn opened(id: &str) -> Update {
        let session_id = SessionId::new(id).expect("an id");
        Update::SessionOpened { session_id, epoch: 1, receipt: Receipt::default(), replay: Replay::First }
    }

    fn noted(id: &str) -> Update {
        Update::CancelNoted { call_id: CallId::new(id).expect("an id"), epoch: 1, phase: None }
    }

    #[tokio::test]
    async fn each_connector_hears_of_its_own_and_all_of_what_concerns_all() {
        let (mut routes, count) = Routes::new();
        let mut link = routes.orchestrator();
        let mut first = routes.queue("claude:env_1:".into());
        let mut second = routes.queue("claude:env_11:".into());
        let ended =
            Update::SessionEnded { session_id: SessionId::new("s").expect("an id"), epoch: 1, end: SessionEnd::Closed };

        let said =
            [opened("s"), opened("claude:env_1:s"), noted("claude:env_11:c"), noted("claude:gone:c"), Update::Restored];
        for update in said {
            routes.pass_on(update).await;
        }
        assert_eq!(*count.borrow(), 1);
        routes.pass_on(ended.clone()).await;
        assert_eq!(*count.borrow(), 0);
        drop(routes);

        assert_eq!([link.recv().await, link.recv().await], [Some(opened("s")), Some(Update::Restored)]);
        assert_eq!([link.recv().await, link.recv().await], [Some(ended), None]);
        assert_eq!([first.recv().await, first.recv().await], [Some(opened("claude:env_1:s")), Some(Update::Restored)]);
        assert_eq!(
            [second.recv().await, second.recv().await],
            [Some(noted("claude:env_11:c")), Some(Update::Restored)]
        );
    }
}
