//! The new link of a new certificate: made, greeted and welcomed before the old one is left.
//!
//! TLS looks at certificates when a connection is made and never again, so a link would outlive its certificate. In
//! TLS 1.3 a server that refuses ours says so after our side is done: only its Welcome shows that the new link holds. Until
//! then the old one is kept and read, and when the new one fails it goes on as if nothing had been tried.

use futures_util::FutureExt;
use tokio::time::{Instant, timeout};
use tonic::Streaming;
use tonic::transport::Channel;
use tracing::{debug, info, warn};

use proto::runner::v1 as pb;
use proto::runner::v1::runner_frame::Body;

use super::codec::Incoming;
use super::link::{FAREWELL, HANDSHAKE, Link, control};
use super::task::{Ended, PENDING, Task};
use super::{LinkError, encode};
use crate::connector::backoff::draw;
use crate::connector::transport::{TransportError, connect};
use crate::work::BoxFuture;

/// Least time between two attempts; as much again is drawn, so that a thousand runners do not come together.
const TRY_AGAIN: std::time::Duration = std::time::Duration::from_secs(5);
/// Frames of the old link that are taken at last, at most; what is beyond is sent again.
const LAST_FRAMES: usize = 1024;

/// A connection that is being made.
pub(super) type Successor = BoxFuture<'static, Result<Connected, TransportError>>;

/// A connection made with certificates of this digest.
pub(super) struct Connected {
    channel: Channel,
    certificate: [u8; 32],
}

/// Why a link is not served any more.
pub(super) enum Turn {
    /// It is over.
    Over(Ended),
    /// The connection for the next one is there.
    Successor(Connected),
}

impl Task {
    /// Begins to make a connection when the certificates are others than those of this link.
    pub(super) fn connect_successor_if_due(&mut self, link: &mut Link) {
        if !link.live || link.successor.is_some() || link.next_try.is_some() {
            return;
        }
        let credentials = self.credentials.borrow().clone();
        if credentials.digest() == link.certificate {
            return;
        }
        info!("making a new link with the new certificate");
        let target = self.settings.target.clone();
        link.successor = Some(Box::pin(async move {
            let channel = connect(&target, credentials.config.clone()).await?;
            Ok(Connected { channel, certificate: credentials.digest() })
        }));
    }

    pub(super) fn put_off_successor(&self, link: &mut Link, error: &LinkError) {
        let delay = TRY_AGAIN.mul_f64(1.0 + draw());
        let delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        warn!(error = %error, delay_ms, "no new link with the new certificate, the old link stays");
        link.next_try = Instant::now().checked_add(delay);
    }

    /// The new link, when the orchestrator takes it.
    pub(super) async fn try_to_take_over(
        &mut self,
        connected: Connected,
        old: &mut Link,
        old_incoming: &mut Streaming<Incoming>,
    ) -> Option<(Link, Streaming<Incoming>)> {
        let late = || LinkError::Ended("the orchestrator did not greet the new link in time".to_owned());
        let taken = timeout(HANDSHAKE, self.take_over(connected, old, old_incoming)).await;
        match taken.unwrap_or_else(|_| Err(late())) {
            Ok(next) => Some(next),
            Err(error) => {
                self.put_off_successor(old, &error);
                None
            }
        }
    }

    /// Greets on the new connection and waits for the answer. Meanwhile nothing is sent on the old link, and what comes
    /// there is taken: an orchestrator that has not seen the greeting yet goes on there.
    async fn take_over(
        &mut self,
        connected: Connected,
        old: &mut Link,
        old_incoming: &mut Streaming<Incoming>,
    ) -> Result<(Link, Streaming<Incoming>), LinkError> {
        let (lanes, outgoing) = super::outgoing::lanes();
        let greeting = self.greet(&lanes, pb::HelloReason::CertRotation)?;
        let mut next = Link::new(lanes, greeting, connected.certificate, self.ports.progress.count());
        let opening = super::open_link(self.settings.target.host.clone(), connected.channel, outgoing);
        tokio::pin!(opening);
        let mut stream: Option<Streaming<Incoming>> = None;
        let mut old_open = true;
        loop {
            let reading = self.pending.len() < PENDING;
            tokio::select! {
                opened = &mut opening, if stream.is_none() => stream = Some(opened?),
                frame = message(&mut stream), if stream.is_some() => {
                    let frame = frame.map_err(|status| LinkError::ended(&self.settings.target.host, &status))?;
                    let frame = frame.ok_or_else(|| LinkError::Ended("the orchestrator closed it".to_owned()))?;
                    // Before the Welcome counts: credit of the old link is a number of the old link, and what it allows
                    // must not be taken for an allowance of the new one.
                    self.take_last_frames(old, old_incoming);
                    self.incoming_obeyed(frame, &mut next).await?;
                    if next.welcomed {
                        break;
                    }
                    if next.ended.is_some() {
                        return Err(LinkError::Ended("the orchestrator sent it away".to_owned()));
                    }
                }
                frame = old_incoming.message(), if old_open && reading => match frame {
                    Ok(Some(frame)) => self.incoming_obeyed(frame, old).await?,
                    // That is its right: it has the new one.
                    Ok(None) | Err(_) => old_open = false,
                },
                event = self.next_event() => {
                    self.take(event);
                    if self.is_stopping() {
                        return Err(LinkError::Ended("the runner is stopping".to_owned()));
                    }
                }
            }
        }
        // Those name frames of the old link, and their requests are sent again.
        self.replies.retain(|body| !matches!(body, Body::RequestRefused(_) | Body::Unsupported(_)));
        let stream = stream.ok_or_else(|| LinkError::Ended("a welcome without a stream".to_owned()))?;
        Ok((next, stream))
    }

    /// What has arrived on the old link and was not read yet.
    fn take_last_frames(&mut self, old: &mut Link, old_incoming: &mut Streaming<Incoming>) {
        for _ in 0..LAST_FRAMES {
            if self.pending.len() >= PENDING {
                return;
            }
            let Some(Ok(Some(frame))) = old_incoming.message().now_or_never() else { return };
            if let Err(error) = self.incoming(frame, old) {
                debug!(error = %error, "the last frames of the old link are not usable");
                return;
            }
        }
    }

    /// Says goodbye on the old link, beside everything else.
    pub(super) fn leave_behind(&self, old: Link, mut incoming: Streaming<Incoming>) {
        info!("the new link is welcome, leaving the old one");
        let goodbye = pb::Goodbye {
            reason: "new certificate".to_owned(),
            sandboxes_kept: true,
            back_within: Some(encode::time(std::time::Duration::ZERO)),
            last_event_seq: self.outbox.next_seq() - 1,
        };
        // An orchestrator that has closed it already needs no goodbye.
        let _ = control(&old.lanes, Body::Goodbye(goodbye));
        drop(old);
        tokio::spawn(timeout(FAREWELL, async move { while let Ok(Some(_)) = incoming.message().await {} }));
    }
}

async fn message(stream: &mut Option<Streaming<Incoming>>) -> Result<Option<Incoming>, tonic::Status> {
    match stream {
        Some(stream) => stream.message().await,
        None => std::future::pending().await,
    }
}

/// Resolves with the connection that is being made, if one is.
pub(super) async fn connected(successor: &mut Option<Successor>) -> Result<Connected, TransportError> {
    match successor {
        Some(successor) => successor.await,
        None => std::future::pending().await,
    }
}
