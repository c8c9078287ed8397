//! Measures the isolation of this host: makes a throw-away sandbox, attacks it from inside, and believes only what held.
//!
//! The attacks are a built-in tool of process 1, run as the workload. Their report comes out of a sandbox and is bounded
//! and parsed like everything else from there; it can make a receipt worse, never better.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::control::ControlError;
use super::live::LiveSandbox;
use super::receipt::{self, LAYERS};
use super::spec::{Limits, Spec};
use super::{CreateError, HostSandboxes};
use crate::work::{CallEnd, CallEvent, CallObserver, Content, Layer, Receipt, Sandbox};

/// How the names of sandboxes that are only measured begin.
pub(super) const THROW_AWAY: &str = "doctor-";
const PROBE: &str = "probe";
const PROBE_TIME: Duration = Duration::from_secs(60);
const MOST_ATTEMPTS: usize = 512;

/// One attack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// The layer that has to stop it.
    pub layer: String,
    /// What was tried.
    pub attempt: String,
    /// errno it failed with; 0 when it succeeded or failed silently.
    #[serde(default)]
    pub errno: i32,
    /// The layer held.
    pub held: bool,
    /// In words.
    #[serde(default)]
    pub detail: String,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measurement {
    /// The launcher's report, less every layer that did not hold.
    pub receipt: Receipt,
    /// Every attack.
    pub attempts: Vec<Attempt>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// No sandbox.
    #[error("the throw-away sandbox could not be made")]
    Create(#[from] CreateError),
    /// The attacks did not start.
    #[error("the attacks could not be started")]
    Start(#[source] ControlError),
    /// They did not end.
    #[error("the throw-away sandbox was lost during the attacks: {0}")]
    Lost(String),
    /// They ended without a report.
    #[error("the attacks ended without a report: {0}")]
    NoReport(String),
    /// Their report is not one.
    #[error("the report of the attacks cannot be read")]
    Report(#[source] serde_json::Error),
}

#[derive(Deserialize)]
struct Report {
    attempts: Vec<Attempt>,
}

/// Makes a throw-away sandbox, attacks it, and remembers the result for the receipts of later sandboxes.
///
/// # Errors
/// [`MeasureError`]; the sandbox is gone in any case.
pub async fn measure(sandboxes: &HostSandboxes) -> Result<Measurement, MeasureError> {
    let mut spec = Spec::throw_away(format!("{THROW_AWAY}{}", uuid::Uuid::new_v4().simple()));
    // Small enough that the attacks reach every limit in two seconds; the attacks count on these numbers.
    spec.limits = Limits { memory_bytes: 192 << 20, cpu_millis: 500, pids: 64, disk_bytes: 64 << 20 };
    let sandbox = sandboxes.create_live(&spec).await?;
    let attempts = attack(&sandbox).await;
    let reported = sandbox.receipt();
    sandbox.close(Duration::ZERO).await;
    let attempts = attempts?;
    let receipt = apply(reported, &attempts, sandbox.id_count(), sandboxes.host().rootless);
    sandboxes.remember(&attempts, &receipt);
    Ok(Measurement { receipt, attempts })
}

/// Takes away every layer that an attack got through, and computes the tier again.
pub fn apply(mut receipt: Receipt, attempts: &[Attempt], id_count: u32, rootless: bool) -> Receipt {
    for attempt in attempts.iter().filter(|attempt| !attempt.held) {
        if let Some(layer) = receipt.layers.iter_mut().find(|layer| layer.name == attempt.layer) {
            // An attack that went through has no errno; that of the launcher says why the layer is missing.
            let errno = if attempt.errno == 0 { layer.errno } else { attempt.errno };
            *layer = Layer { enforced: String::new(), errno, ..layer.clone() };
        }
    }
    receipt.tier = receipt::tier(&receipt.layers, id_count, rootless).to_string();
    receipt
}

async fn attack(sandbox: &LiveSandbox) -> Result<Vec<Attempt>, MeasureError> {
    let (sender, mut end) = watch::channel(None);
    sandbox
        .control()
        .start_tool(PROBE, PROBE, PROBE_TIME, Arc::new(EndObserver(sender)))
        .await
        .map_err(MeasureError::Start)?;
    let ended = tokio::select! {
        ended = wait_for_end(&mut end) => ended,
        reason = sandbox.lost() => return Err(MeasureError::Lost(reason)),
    };
    let ended = ended.ok_or_else(|| MeasureError::Lost("the connection to it has ended".into()))?;
    parse(&ended)
}

async fn wait_for_end(end: &mut watch::Receiver<Option<Box<CallEnd>>>) -> Option<Box<CallEnd>> {
    end.wait_for(Option::is_some).await.ok().and_then(|end| end.clone())
}

fn parse(end: &CallEnd) -> Result<Vec<Attempt>, MeasureError> {
    let no_report = || MeasureError::NoReport(format!("{:?}, {}", end.outcome, said(end)));
    let result = end.result.as_ref().filter(|result| !result.is_error).ok_or_else(no_report)?;
    let text = result.content.iter().find_map(|content| match content {
        Content::Text(text) => Some(text),
        _ => None,
    });
    let report: Report = serde_json::from_str(text.ok_or_else(no_report)?).map_err(MeasureError::Report)?;
    if report.attempts.is_empty() || report.attempts.len() > MOST_ATTEMPTS {
        return Err(MeasureError::NoReport(format!("{} attacks", report.attempts.len())));
    }
    Ok(report.attempts.into_iter().filter(|attempt| LAYERS.iter().any(|(name, _)| *name == attempt.layer)).collect())
}

/// What the attacks said instead.
fn said(end: &CallEnd) -> String {
    let text = end.result.iter().flat_map(|result| &result.content).find_map(|content| match content {
        Content::Text(text) => Some(text.chars().take(200).filter(|character| !character.is_control()).collect()),
        _ => None,
    });
    text.unwrap_or_else(|| "no result".to_owned())
}

struct EndObserver(watch::Sender<Option<Box<CallEnd>>>);

impl CallObserver for EndObserver {
    fn observe(&self, event: CallEvent) {
        if let CallEvent::Finished(end) = event {
            self.0.send_replace(Some(end));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::launch::{HostReport, ReportedLayer};
    use crate::work::{Outcome, ToolResult};

    fn full() -> Receipt {
        let reported: Vec<_> = LAYERS
            .iter()
            .map(|(name, _)| ReportedLayer {
                name: (*name).to_owned(),
                requested: "yes".into(),
                enforced: Some("yes".into()),
                errno: 0,
            })
            .collect();
        receipt::receipt(&reported, 65_536, &HostReport::default())
    }

    fn attempt(layer: &str, held: bool) -> Attempt {
        Attempt { layer: layer.into(), attempt: "try".into(), errno: 1, held, detail: String::new() }
    }

    fn end_with(text: &str) -> CallEnd {
        let result = ToolResult { is_error: false, content: vec![Content::Text(text.into())] };
        CallEnd { result: Some(result), ..CallEnd::without_output(Outcome::Exited { code: 0 }) }
    }

    #[test]
    fn layer_that_an_attack_got_through_is_missing_and_lowers_the_tier() {
        let attempts = [attempt("seccomp", true), attempt("seccomp", false), attempt("landlock", true)];

        let receipt = apply(full(), &attempts, 65_536, false);

        let layer = |name: &str| receipt.layers.iter().find(|layer| layer.name == name).expect("listed");
        assert_eq!(layer("seccomp").enforced, "");
        assert_eq!(layer("landlock").enforced, "yes");
        assert_eq!(receipt.tier, "provider");
    }

    #[test]
    fn attacks_that_held_change_nothing() {
        assert_eq!(apply(full(), &[attempt("seccomp", true)], 65_536, false), full());
    }

    #[test]
    fn report_is_read_and_unknown_layers_are_left_out() {
        let text = r#"{"attempts":[{"layer":"seccomp","attempt":"bpf","errno":1,"held":true,"detail":"EPERM"},
                       {"layer":"astrology","attempt":"stars","held":false}]}"#;

        let attempts = parse(&end_with(text)).expect("a report");

        assert_eq!(attempts.len(), 1);
        assert_eq!((attempts[0].errno, attempts[0].held), (1, true));
    }

    #[test]
    fn report_without_attacks_or_with_nonsense_is_no_measurement() {
        assert!(matches!(parse(&end_with(r#"{"attempts":[]}"#)), Err(MeasureError::NoReport(_))));
        assert!(matches!(parse(&end_with("all good, trust me")), Err(MeasureError::Report(_))));
        assert!(matches!(parse(&CallEnd::without_output(Outcome::Exited { code: 0 })), Err(MeasureError::NoReport(_))));
    }
}
