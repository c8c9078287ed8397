//! Everything that the control plane knows, as plain data: environments, credentials, the queue, sessions, stores.
//!
//! Nothing in here waits or talks. What time brings, lapsed leases above all, is applied by [`ControlPlane::tick`], which
//! whoever locks the state calls first. Ids are counted, so a run that does the same has the same ids.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::error::ApiError;
use super::fault::Fault;
use super::memory::MemoryStore;
use super::request::{Credential, Incoming, Recorded};
use super::route::Route;
use super::session::Session;
use super::skill::Skill;
use super::work::{Token, Work};

/// 2026-01-01T00:00:00Z, where the clock of a control plane begins, in seconds since 1970.
const EPOCH_SECONDS: i64 = 1_767_225_600;
/// `anthropic-version` values that are known.
const VERSIONS: &[&str] = &["2023-06-01", "2026-10-21"];

/// What can be set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Lease that a heartbeat gets, unless it asks for another. The API's default is said to be 300.
    pub ttl_seconds: u64,
    /// Bounds for a lease that a heartbeat asks for.
    pub ttl_bounds: (u64, u64),
    /// Rest between two `ping` frames of a stream.
    pub ping_every: Duration,
    /// Largest page of a history, whatever is asked for.
    pub page_limit: usize,
    /// What a second result for one call gets.
    pub second_result: SecondResult,
    /// When an interrupt ends the calls that run.
    pub interrupt: Interrupt,
    /// Largest body of a posted event, in bytes.
    pub max_event_bytes: usize,
    /// Environment that deliveries name in place of their own, as where a proxy mixes two up.
    pub delivered_as: Option<String>,
    /// Header `date` of every answer; absent: the time.
    pub date: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ttl_seconds: 300,
            ttl_bounds: (1, 600),
            ping_every: Duration::from_secs(2),
            page_limit: 1000,
            second_result: SecondResult::Refused,
            interrupt: Interrupt::WaitsForCalls,
            max_event_bytes: 32 << 20,
            delivered_as: None,
            date: None,
        }
    }
}

/// What a second result for one call gets. What the real API does is not documented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecondResult {
    /// 400.
    Refused,
    /// 200 with the first one; nothing changes.
    Ignored,
}

/// When an interrupt ends the calls that run. The documentation allows both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupt {
    /// The turn ends when the worker has answered what runs.
    WaitsForCalls,
    /// The turn ends at once: the server answers what runs, and results that come later are refused.
    AtOnce,
}

/// An environment of type `self_hosted`.
#[derive(Debug, Clone)]
pub struct Environment {
    /// `env_…`.
    pub id: String,
    /// Unique among the environments.
    pub name: String,
    /// Keys that are valid.
    pub keys: Vec<String>,
    /// When it was created.
    pub created_at: String,
    /// When it was archived.
    pub archived_at: Option<String>,
    /// Workers by id, with the time of their last poll.
    pub workers: BTreeMap<String, Duration>,
}

/// The state of a control plane.
#[derive(Debug)]
pub struct ControlPlane {
    /// What can be set.
    pub settings: Settings,
    /// In the order of creation.
    pub environments: Vec<Environment>,
    /// The key of the organisation.
    pub api_key: String,
    /// Work items in the order of creation.
    pub work: Vec<Work>,
    /// Tokens of work items, old ones too.
    pub tokens: Vec<Token>,
    /// In the order of creation.
    pub sessions: Vec<Session>,
    /// In the order of creation.
    pub skills: Vec<Skill>,
    /// In the order of creation.
    pub memory_stores: Vec<MemoryStore>,
    /// Faults that are still to happen.
    pub faults: Vec<Fault>,
    /// So many deliveries are still to leave their item in the queue, so that the next poll gets it as well.
    pub duplicate_deliveries: u32,
    /// Every request, in the order in which they arrived.
    pub record: Vec<Recorded>,
    /// Breaches of the protocol that were noticed. Empty after a run of a worker that keeps it.
    pub breaches: Vec<Breach>,
    begun: Instant,
    ahead: Duration,
    last_stamp: Duration,
    numbers: BTreeMap<&'static str, u64>,
}

/// Something that a worker must not do, though the API may let it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Breach {
    /// A result was posted with the token of a lease that was given away since.
    ResultAfterLeaseLost {
        /// The call.
        tool_use_id: String,
    },
    /// A work item was stopped with the token of a lease that was given away since.
    StopAfterLeaseLost {
        /// The work item.
        work_id: String,
    },
    /// A second result for one call.
    SecondResult {
        /// The call.
        tool_use_id: String,
    },
    /// A result for a call that nobody may run: it was denied, or waits for a confirmation.
    ResultOfGatedCall {
        /// The call.
        tool_use_id: String,
    },
    /// A heartbeat without `expected_last_heartbeat`.
    HeartbeatWithoutComparison {
        /// The work item.
        work_id: String,
    },
}

impl ControlPlane {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self {
            settings: Settings::default(),
            environments: Vec::new(),
            api_key: "sk-ant-api03-mock".to_owned(),
            work: Vec::new(),
            tokens: Vec::new(),
            sessions: Vec::new(),
            skills: Vec::new(),
            memory_stores: Vec::new(),
            faults: Vec::new(),
            duplicate_deliveries: 0,
            record: Vec::new(),
            breaches: Vec::new(),
            begun: Instant::now(),
            ahead: Duration::ZERO,
            last_stamp: Duration::ZERO,
            numbers: BTreeMap::new(),
        }
    }

    /// Time since the start, by a clock that can be moved.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.begun.elapsed() + self.ahead
    }

    /// Moves the clock forward.
    pub fn pass(&mut self, time: Duration) {
        self.ahead += time;
    }

    /// The time as RFC 3339; every call gives a later one.
    pub fn stamp(&mut self) -> String {
        let now = self.now().max(self.last_stamp + Duration::from_micros(1));
        self.last_stamp = Duration::from_micros(u64::try_from(now.as_micros()).expect("less than many years"));
        let seconds = EPOCH_SECONDS + i64::try_from(self.last_stamp.as_secs()).expect("less than many years");
        let nanos = i32::try_from(self.last_stamp.subsec_nanos()).expect("less than 10^9");
        prost_types::Timestamp { seconds, nanos }.to_string()
    }

    /// The next id with this prefix.
    pub fn next_id(&mut self, prefix: &'static str) -> String {
        let number = self.numbers.entry(prefix).or_default();
        *number += 1;
        format!("{prefix}{number}")
    }

    /// Adds an environment with one key.
    ///
    /// # Errors
    /// 409 when there is one of that name.
    pub fn create_environment(&mut self, name: &str) -> Result<Environment, ApiError> {
        if self.environments.iter().any(|known| known.name == name && known.archived_at.is_none()) {
            return Err(ApiError::conflict(format!("name: there is an environment named {name:?}")));
        }
        let environment = Environment {
            id: self.next_id("env_"),
            name: name.to_owned(),
            keys: vec![self.next_id("sk-ant-oat01-mock-")],
            created_at: self.stamp(),
            archived_at: None,
            workers: BTreeMap::new(),
        };
        self.environments.push(environment.clone());
        Ok(environment)
    }

    /// Finds an environment.
    ///
    /// # Errors
    /// 404 when it does not exist or is archived.
    pub fn environment(&mut self, id: &str) -> Result<&mut Environment, ApiError> {
        let found = self.environments.iter_mut().find(|known| known.id == id && known.archived_at.is_none());
        found.ok_or_else(|| ApiError::not_found(format!("environment {id} not found")))
    }

    /// Gives an environment another key, and makes the old ones invalid.
    ///
    /// # Panics
    /// When there is no such environment.
    pub fn rotate_environment_key(&mut self, id: &str) -> String {
        let key = self.next_id("sk-ant-oat01-mock-");
        self.environment(id).expect("a known environment").keys = vec![key.clone()];
        key
    }

    /// Applies what time brings. Returns whether that was anything.
    pub fn tick(&mut self) -> bool {
        self.lapse_leases()
    }

    /// Whose credential a request has.
    #[must_use]
    pub fn credential(&self, incoming: &Incoming) -> Credential {
        if let Some(bearer) = incoming.header("authorization") {
            let Some(token) = bearer.strip_prefix("Bearer ") else { return Credential::Unknown };
            if let Some(environment) = self.environments.iter().find(|known| known.keys.iter().any(|key| key == token))
            {
                return Credential::EnvironmentKey(environment.id.clone());
            }
            return match self.tokens.iter().find(|known| known.value == token && known.valid) {
                Some(token) => {
                    Credential::SessionsToken { work_id: token.work_id.clone(), generation: token.generation }
                }
                None => Credential::Unknown,
            };
        }
        match incoming.header("x-api-key") {
            Some(key) if key == self.api_key => Credential::ApiKey,
            Some(_) => Credential::Unknown,
            None => Credential::None,
        }
    }

    /// Whether a request may be served: one credential that the endpoint takes and that is for this environment, work item or
    /// session, a known version, and the beta header.
    ///
    /// # Errors
    /// 400, 401, 403 or 404.
    pub fn authorise(&self, route: &Route, incoming: &Incoming, credential: &Credential) -> Result<(), ApiError> {
        if incoming.header("authorization").is_some() && incoming.header("x-api-key").is_some() {
            return Err(ApiError::authentication("send one of authorization and x-api-key, not both"));
        }
        let access = route.endpoint.access();
        let allowed = match credential {
            Credential::None => return Err(ApiError::authentication("authorization: a credential is needed")),
            Credential::Unknown => return Err(ApiError::authentication("invalid bearer token")),
            Credential::EnvironmentKey(_) => access.environment_key,
            Credential::SessionsToken { .. } => access.sessions_token,
            Credential::ApiKey => access.api_key,
        };
        if !allowed {
            return Err(ApiError::permission(format!("this credential is not accepted by {:?}", route.endpoint)));
        }
        match incoming.header("anthropic-version") {
            None => return Err(ApiError::invalid("anthropic-version: header is required")),
            Some(version) if !VERSIONS.contains(&version) => {
                return Err(ApiError::invalid(format!("anthropic-version: {version:?} is not a valid version")));
            }
            Some(_) => {}
        }
        let betas: Vec<&str> =
            incoming.header("anthropic-beta").unwrap_or_default().split(',').map(str::trim).collect();
        let needed = route.endpoint.betas();
        if !needed.is_empty() && !needed.iter().any(|beta| betas.contains(beta)) {
            return Err(ApiError::invalid(format!("anthropic-beta: this endpoint needs {}", needed.join(" or "))));
        }
        self.in_scope(incoming, credential)
    }

    /// Whether a credential is for the environment, work item or session of the path.
    fn in_scope(&self, incoming: &Incoming, credential: &Credential) -> Result<(), ApiError> {
        let segments: Vec<&str> = incoming.path.split('/').skip(2).collect();
        let (environment_id, work) = match credential {
            Credential::EnvironmentKey(id) => (id.clone(), None),
            Credential::SessionsToken { work_id, .. } => {
                let work = self.work.iter().find(|known| known.id == *work_id);
                let work = work.ok_or_else(|| ApiError::authentication("the work item of this token is gone"))?;
                (work.environment_id.clone(), Some(work))
            }
            Credential::ApiKey | Credential::None | Credential::Unknown => return Ok(()),
        };
        let fits = match segments.as_slice() {
            ["environments", id, "work", work_id, ..] => {
                *id == environment_id && work.is_none_or(|work| work.id == *work_id)
            }
            ["environments", id, ..] => *id == environment_id,
            ["sessions", id, ..] => {
                let session = self.sessions.iter().find(|known| known.id == *id);
                let session = session.ok_or_else(|| ApiError::not_found(format!("session {id} not found")))?;
                session.environment_id == environment_id && work.is_none_or(|work| work.data_id == session.id)
            }
            ["memory_stores", id, ..] => work.is_some_and(|work| {
                let session = self.sessions.iter().find(|known| known.id == work.data_id);
                session.is_some_and(|session| session.has_store(id))
            }),
            _ => true,
        };
        if fits { Ok(()) } else { Err(ApiError::permission(format!("this credential is not for {}", incoming.path))) }
    }
}

impl Default for ControlPlane {
    fn default() -> Self {
        Self::new()
    }
}
