//! A request as it came, its parts with their types, and the record of it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::error::ApiError;
use super::route::Endpoint;

/// Whose credential a request had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// The key of this environment.
    EnvironmentKey(String),
    /// The token of this work item, and how often its lease had been given away when it was made.
    SessionsToken {
        /// The work item.
        work_id: String,
        /// Generation of the lease.
        generation: u32,
    },
    /// The key of the organisation.
    ApiKey,
    /// None at all.
    None,
    /// One that nobody knows, or that is no longer valid.
    Unknown,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Incoming {
    /// Method in capitals.
    pub method: String,
    /// Path without the query.
    pub path: String,
    /// Parameters in their order, decoded.
    pub query: Vec<(String, String)>,
    /// Headers, names in small letters; several of one name are joined by a comma.
    pub headers: BTreeMap<String, String>,
    /// The body, whole.
    pub body: Vec<u8>,
}

impl Incoming {
    /// A header by its small name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The last parameter of this name.
    #[must_use]
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.query.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// All parameters of this name, as arrays are sent.
    #[must_use]
    pub fn parameters(&self, name: &str) -> Vec<&str> {
        self.query.iter().filter(|(known, _)| known == name).map(|(_, value)| value.as_str()).collect()
    }

    /// A parameter that is a number between two bounds.
    ///
    /// # Errors
    /// 400 that names the parameter.
    pub fn number(&self, name: &str, least: u64, most: u64) -> Result<Option<u64>, ApiError> {
        let Some(text) = self.parameter(name) else { return Ok(None) };
        match text.parse::<u64>() {
            Ok(number) if (least..=most).contains(&number) => Ok(Some(number)),
            _ => Err(ApiError::invalid(format!("{name}: must be a whole number from {least} to {most}, not {text:?}"))),
        }
    }

    /// The body as a JSON object, empty for no body.
    ///
    /// # Errors
    /// 400 for anything else.
    pub fn object(&self) -> Result<serde_json::Map<String, Value>, ApiError> {
        if self.body.is_empty() {
            return Ok(serde_json::Map::new());
        }
        if !self.header("content-type").is_some_and(|kind| kind.starts_with("application/json")) {
            return Err(ApiError::invalid("content-type: must be application/json"));
        }
        match serde_json::from_slice(&self.body) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) => Err(ApiError::invalid("body: must be a JSON object")),
            Err(error) => Err(ApiError::invalid(format!("body: not JSON: {error}"))),
        }
    }

    /// The body as a value of a type.
    ///
    /// # Errors
    /// 400 with what the type says about it.
    pub fn typed<T: serde::de::DeserializeOwned>(&self) -> Result<T, ApiError> {
        serde_json::from_value(Value::Object(self.object()?))
            .map_err(|error| ApiError::invalid(format!("body: {error}")))
    }
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is being served.
    Pending,
    /// It was answered with this status. For a stream: it was opened.
    Answered(u16),
    /// It was applied, and its answer was lost.
    ResponseLost,
    /// It was lost before it had an effect.
    RequestLost,
}

/// One request in the record.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// Position in the record, from 0.
    pub number: usize,
    /// Time since the start of the control plane by its clock.
    pub at: Duration,
    /// What was asked, if anybody serves it.
    pub endpoint: Option<Endpoint>,
    /// The request.
    pub incoming: Incoming,
    /// Whose it was.
    pub credential: Credential,
    /// What became of it.
    pub fate: Fate,
}

impl Recorded {
    /// The body as JSON, null for none.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.incoming.body).unwrap_or(Value::Null)
    }

    /// `POST /v1/…?query`, for comparison and messages.
    #[must_use]
    pub fn line(&self) -> String {
        let query: Vec<String> = self.incoming.query.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mark = if query.is_empty() { "" } else { "?" };
        format!("{} {}{mark}{}", self.incoming.method, self.incoming.path, query.join("&"))
    }
}

/// Splits and decodes a query.
#[must_use]
pub(super) fn parse_query(query: &str) -> Vec<(String, String)> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode(name), decode(value))
        })
        .collect()
}

/// Undoes percent encoding and `+` for a blank. What is not valid stays as it is.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let pair = bytes.get(at + 1..at + 3).and_then(|pair| std::str::from_utf8(pair).ok());
        match (bytes[at], pair.and_then(|pair| u8::from_str_radix(pair, 16).ok())) {
            (b'%', Some(byte)) => {
                decoded.push(byte);
                at += 3;
                continue;
            }
            (b'+', _) => decoded.push(b' '),
            (byte, _) => decoded.push(byte),
        }
        at += 1;
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_is_decoded_once() {
        let query = parse_query("expected_last_heartbeat=2026-01-01T00%3A00%3A01.1Z&types%5B%5D=a&types[]=b&x=%2525&y");
        let wanted = [
            ("expected_last_heartbeat", "2026-01-01T00:00:01.1Z"),
            ("types[]", "a"),
            ("types[]", "b"),
            ("x", "%25"),
            ("y", ""),
        ];
        let wanted: Vec<_> = wanted.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        assert_eq!(query, wanted);
    }
}
