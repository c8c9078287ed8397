//! Keeps an eye on the certificate in use: newer files, its renewal, its end.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, watch};
use tracing::{error, info, warn};

use super::LinkStatus;
use crate::connector::enrollment::Renewal;
use crate::connector::expiry::{Announcer, Expiry};
use crate::connector::tls::{Credentials, Reload, TlsSource, seconds_of};

/// How often the files are looked at, the clock as well, and a renewal that failed is tried again.
const POLL: Duration = Duration::from_secs(60);

/// Watches until nobody uses the certificates any more. What is received is the set for the next link.
pub(super) fn watch(
    source: TlsSource,
    renewal: Option<Renewal>,
    reload: Arc<Notify>,
    status: watch::Sender<LinkStatus>,
) -> watch::Receiver<Credentials> {
    let (sender, receiver) = watch::channel(source.current().clone());
    let renew_at = renewal.as_ref().map(|renewal| renewal.due(source.current()));
    let watcher = Watcher { source: Some(source), renewal, renew_at, announcer: Announcer::default(), sender, status };
    tokio::spawn(watcher.run(reload));
    receiver
}

struct Watcher {
    /// Always there, but while its files are being read.
    source: Option<TlsSource>,
    renewal: Option<Renewal>,
    /// Seconds since 1970.
    renew_at: Option<i64>,
    announcer: Announcer,
    sender: watch::Sender<Credentials>,
    status: watch::Sender<LinkStatus>,
}

impl Watcher {
    async fn run(mut self, reload: Arc<Notify>) {
        loop {
            self.renew_if_due().await;
            self.tell_of_the_end();
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = reload.notified() => {}
                () = self.sender.closed() => return,
            }
            if self.look().await.is_none() {
                return;
            }
        }
    }

    /// Looks at the files again; `None` when that is not possible any more.
    async fn look(&mut self) -> Option<()> {
        let mut source = self.source.take()?;
        // On a thread of its own: certificate files may be on a network file system that hangs.
        let looked = tokio::task::spawn_blocking(move || {
            let result = source.reload(SystemTime::now());
            (source, result)
        });
        let (source, result) = looked.await.ok()?;
        match result {
            Reload::Unchanged => {}
            Reload::Replaced => {
                let current = source.current().clone();
                info!(not_after = current.not_after, "certificate replaced");
                self.renew_at = self.renewal.as_ref().map(|renewal| renewal.due(&current));
                self.status.send_modify(|status| status.certificate.refused.clear());
                // Nobody listens any more only when the connector has ended.
                let _ = self.sender.send(current);
            }
            Reload::Restored => self.status.send_modify(|status| status.certificate.refused.clear()),
            Reload::Kept(problem) => {
                error!(error = &problem as &dyn std::error::Error, "new certificate files refused, old ones stay");
                self.status.send_modify(|status| status.certificate.refused = problem.to_string());
            }
        }
        self.source = Some(source);
        Some(())
    }

    async fn renew_if_due(&mut self) {
        let Some((renewal, current)) = self.renewal.as_ref().zip(self.source.as_ref().map(TlsSource::current)) else {
            return;
        };
        if self.renew_at.is_none_or(|at| seconds_of(SystemTime::now()) < at) {
            return;
        }
        match renewal.renew(current).await {
            Ok(()) => {
                info!("certificate renewed");
                self.status.send_modify(|status| status.certificate.renewal.clear());
                // The next look is not far away, but what was just written need not wait for it.
                let _ = self.look().await;
                // However early the service wants the next renewal: not in a circle.
                let soonest = seconds_of(SystemTime::now() + POLL);
                self.renew_at = self.renew_at.map(|at| at.max(soonest));
            }
            Err(problem) => {
                warn!(error = &problem as &dyn std::error::Error, "certificate not renewed, will try again");
                self.status.send_modify(|status| status.certificate.renewal = problem.to_string());
            }
        }
    }

    /// Puts the end of the certificate into the status, and into the log when it is news.
    fn tell_of_the_end(&mut self) {
        let Some(current) = self.source.as_ref().map(TlsSource::current) else { return };
        let now = seconds_of(SystemTime::now());
        let (not_after, expiry) = (current.not_after, Expiry::of(current.not_before, current.not_after, now));
        self.status.send_modify(|status| {
            (status.certificate.not_after, status.certificate.expiry) = (not_after, expiry);
        });
        if !self.announcer.is_news(expiry, now) {
            return;
        }
        let seconds_left = not_after.saturating_sub(now);
        match expiry {
            Expiry::Good => {}
            Expiry::Late => info!(not_after, seconds_left, "the renewal of the certificate is late"),
            Expiry::Soon => warn!(not_after, seconds_left, "the certificate ends soon"),
            Expiry::Urgent => error!(not_after, seconds_left, "the certificate is about to end"),
            Expiry::Expired => error!(not_after, "the certificate has expired, no new link can be made with it"),
        }
    }
}
