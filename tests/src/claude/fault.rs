//! Faults between a worker and the control plane, ordered by endpoint.

use std::time::Duration;

use super::plane::ControlPlane;
use super::route::Endpoint;

/// A fault that is still to happen: after `skip` requests of its endpoint, to the next `times` of them.
#[derive(Debug, Clone)]
pub struct Fault {
    /// The endpoint.
    pub on: Endpoint,
    /// Requests that pass first.
    pub skip: u32,
    /// Requests that it happens to.
    pub times: u32,
    /// What happens.
    pub how: How,
}

/// What happens to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum How {
    /// It is refused with this status and has no effect.
    Status(u16),
    /// The same, with `retry-after` in seconds.
    StatusRetryAfter(u16, u32),
    /// The connection closes before it has an effect.
    LoseRequest,
    /// It has its effect, and the connection closes without an answer.
    LoseResponse,
    /// It has its effect, and the answer is this status.
    StatusAfterEffect(u16),
    /// Its answer stops after so many bytes of the body, and the connection breaks.
    CutBody(usize),
    /// It waits before it has its effect.
    Delay(Duration),
    /// Its answer waits after the effect.
    DelayResponse(Duration),
    /// It has no effect and is never answered.
    Silence,
    /// It has its effect and is never answered.
    SilenceAfterEffect,
}

impl Fault {
    /// A fault of the next request of an endpoint.
    #[must_use]
    pub fn next(on: Endpoint, how: How) -> Self {
        Self { on, skip: 0, times: 1, how }
    }

    /// A fault of this many requests of an endpoint.
    #[must_use]
    pub fn times(on: Endpoint, times: u32, how: How) -> Self {
        Self { on, skip: 0, times, how }
    }

    /// After this many requests that pass.
    #[must_use]
    pub fn after(mut self, skip: u32) -> Self {
        self.skip = skip;
        self
    }
}

impl ControlPlane {
    /// What happens to this request of `endpoint`; counts it.
    pub(super) fn take_fault(&mut self, endpoint: Endpoint) -> Option<How> {
        let position = self.faults.iter().position(|fault| fault.on == endpoint)?;
        let fault = &mut self.faults[position];
        if fault.skip > 0 {
            fault.skip -= 1;
            return None;
        }
        let how = fault.how.clone();
        fault.times = fault.times.saturating_sub(1);
        if fault.times == 0 {
            self.faults.remove(position);
        }
        Some(how)
    }
}
