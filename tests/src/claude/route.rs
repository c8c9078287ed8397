//! Which endpoint a request means, and which credentials it takes.

use super::error::ApiError;

/// An endpoint, as faults and records name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "each is the endpoint of its name in the table below")]
pub enum Endpoint {
    Poll,
    Stats,
    ListWork,
    GetWork,
    UpdateWork,
    Ack,
    Heartbeat,
    Stop,
    GetSession,
    ListEvents,
    SendEvents,
    StreamEvents,
    ListThreads,
    GetThread,
    ListThreadEvents,
    StreamThreadEvents,
    ArchiveThread,
    GetSkillVersion,
    SkillContent,
    ListMemories,
    GetMemory,
    CreateMemory,
    UpdateMemory,
    DeleteMemory,
    CreateEnvironment,
    GetEnvironment,
    ArchiveEnvironment,
}

use Endpoint as E;

/// Method, path with `{}` for each id, endpoint. A fixed segment stands before an id in its place.
const TABLE: &[(&str, &str, Endpoint)] = &[
    ("GET", "environments/{}/work/poll", E::Poll),
    ("GET", "environments/{}/work/stats", E::Stats),
    ("GET", "environments/{}/work", E::ListWork),
    ("GET", "environments/{}/work/{}", E::GetWork),
    ("POST", "environments/{}/work/{}", E::UpdateWork),
    ("POST", "environments/{}/work/{}/ack", E::Ack),
    ("POST", "environments/{}/work/{}/heartbeat", E::Heartbeat),
    ("POST", "environments/{}/work/{}/stop", E::Stop),
    ("GET", "sessions/{}", E::GetSession),
    ("GET", "sessions/{}/events", E::ListEvents),
    ("POST", "sessions/{}/events", E::SendEvents),
    ("GET", "sessions/{}/events/stream", E::StreamEvents),
    ("GET", "sessions/{}/threads", E::ListThreads),
    ("GET", "sessions/{}/threads/{}", E::GetThread),
    ("GET", "sessions/{}/threads/{}/events", E::ListThreadEvents),
    ("GET", "sessions/{}/threads/{}/stream", E::StreamThreadEvents),
    ("POST", "sessions/{}/threads/{}/archive", E::ArchiveThread),
    ("GET", "skills/{}/versions/{}", E::GetSkillVersion),
    ("GET", "skills/{}/versions/{}/content", E::SkillContent),
    ("GET", "memory_stores/{}/memories", E::ListMemories),
    ("GET", "memory_stores/{}/memories/{}", E::GetMemory),
    ("POST", "memory_stores/{}/memories", E::CreateMemory),
    ("POST", "memory_stores/{}/memories/{}", E::UpdateMemory),
    ("DELETE", "memory_stores/{}/memories/{}", E::DeleteMemory),
    ("POST", "environments", E::CreateEnvironment),
    ("GET", "environments/{}", E::GetEnvironment),
    ("POST", "environments/{}/archive", E::ArchiveEnvironment),
];

/// Which credentials an endpoint takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// The key of the environment.
    pub environment_key: bool,
    /// The token in the secret of a work item.
    pub sessions_token: bool,
    /// The key of the organisation.
    pub api_key: bool,
}

/// An endpoint with the ids of the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Ids from left to right.
    pub ids: Vec<String>,
}

impl Route {
    /// The route of a request.
    ///
    /// # Errors
    /// 404 for a path that nobody serves, 405 for a method that its path does not have.
    pub fn find(method: &str, path: &str) -> Result<Self, ApiError> {
        let segments: Vec<&str> = path.strip_prefix("/v1/").unwrap_or_default().split('/').collect();
        let mut other_method = false;
        for (wanted, pattern, endpoint) in TABLE {
            let Some(ids) = fit(pattern, &segments) else { continue };
            if *wanted == method {
                return Ok(Self { endpoint: *endpoint, ids });
            }
            other_method = true;
        }
        if other_method {
            return Err(ApiError::new(
                405,
                "invalid_request_error",
                format!("method {method} is not allowed on {path}"),
            ));
        }
        Err(ApiError::not_found(format!("no such endpoint: {path}")))
    }
}

fn fit(pattern: &str, segments: &[&str]) -> Option<Vec<String>> {
    let wanted: Vec<&str> = pattern.split('/').collect();
    if wanted.len() != segments.len() {
        return None;
    }
    let mut ids = Vec::new();
    for (wanted, segment) in wanted.iter().zip(segments) {
        if *wanted == "{}" {
            if segment.is_empty() {
                return None;
            }
            ids.push((*segment).to_owned());
        } else if wanted != segment {
            return None;
        }
    }
    Some(ids)
}

impl Endpoint {
    /// What it takes.
    #[must_use]
    pub fn access(self) -> Access {
        let (environment_key, sessions_token, api_key) = match self {
            E::Poll | E::ListWork => (true, false, false),
            E::Stats => (true, false, true),
            E::Ack | E::Heartbeat => (true, true, false),
            E::GetWork | E::UpdateWork | E::CreateEnvironment | E::GetEnvironment | E::ArchiveEnvironment => {
                (false, false, true)
            }
            E::ListMemories | E::GetMemory | E::CreateMemory | E::UpdateMemory | E::DeleteMemory => (false, true, true),
            E::Stop
            | E::GetSession
            | E::ListEvents
            | E::SendEvents
            | E::StreamEvents
            | E::ListThreads
            | E::GetThread
            | E::ListThreadEvents
            | E::StreamThreadEvents
            | E::ArchiveThread
            | E::GetSkillVersion
            | E::SkillContent => (true, true, true),
        };
        Access { environment_key, sessions_token, api_key }
    }

    /// Values of `anthropic-beta` of which one is needed. Skills need none.
    #[must_use]
    pub fn betas(self) -> &'static [&'static str] {
        match self {
            E::GetSkillVersion | E::SkillContent => &[],
            E::ListMemories | E::GetMemory | E::CreateMemory | E::UpdateMemory | E::DeleteMemory => {
                &["agent-memory-2026-07-22", "managed-agents-2026-04-01"]
            }
            _ => &["managed-agents-2026-04-01"],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_segment_wins_over_an_id_in_its_place() {
        let poll = Route::find("GET", "/v1/environments/env_1/work/poll").unwrap();
        assert_eq!((poll.endpoint, poll.ids), (E::Poll, vec!["env_1".to_owned()]));
        let get = Route::find("GET", "/v1/environments/env_1/work/work_1").unwrap();
        assert_eq!(get.endpoint, E::GetWork);
    }

    #[test]
    fn wrong_method_is_told_apart_from_a_wrong_path() {
        assert_eq!(Route::find("DELETE", "/v1/sessions/s/events").unwrap_err().status, 405);
        assert_eq!(Route::find("GET", "/v1/session/s").unwrap_err().status, 404);
        assert_eq!(Route::find("GET", "/sessions/s").unwrap_err().status, 404);
        assert_eq!(Route::find("GET", "/v1/sessions//events").unwrap_err().status, 404);
    }
}
