//! Refusals as the API words them: a status and the error envelope.

use serde_json::{Map, Value, json};

/// A refusal. Its body is `{"type":"error","error":{"type":…,"message":…}}`, and what `extra` holds beside the message.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    /// Status of the answer.
    pub status: u16,
    /// The API's name of the kind, for example `invalid_request_error`.
    pub kind: &'static str,
    /// What is wrong, naming the field.
    pub message: String,
    /// Further members of the error object.
    pub extra: Map<String, Value>,
}

impl ApiError {
    /// A refusal without further members.
    #[must_use]
    pub fn new(status: u16, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), extra: Map::new() }
    }

    /// 400: the request is wrong.
    #[must_use]
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(400, "invalid_request_error", message)
    }

    /// 401: nobody knows the credential.
    #[must_use]
    pub fn authentication(message: impl Into<String>) -> Self {
        Self::new(401, "authentication_error", message)
    }

    /// 403: the credential is not for this.
    #[must_use]
    pub fn permission(message: impl Into<String>) -> Self {
        Self::new(403, "permission_error", message)
    }

    /// 404: there is no such thing.
    #[must_use]
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(404, "not_found_error", message)
    }

    /// 409: not in this state.
    #[must_use]
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(409, "invalid_request_error", message)
    }

    /// The kind that the API gives to a status that a test asked for.
    #[must_use]
    pub fn of_status(status: u16) -> Self {
        let kind = match status {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            529 => "overloaded_error",
            400..=499 => "invalid_request_error",
            _ => "api_error",
        };
        Self::new(status, kind, format!("injected fault: {status}"))
    }

    /// Adds a member to the error object.
    #[must_use]
    pub fn with(mut self, name: &str, value: Value) -> Self {
        self.extra.insert(name.to_owned(), value);
        self
    }

    /// The envelope.
    #[must_use]
    pub fn body(&self) -> Value {
        let mut error = self.extra.clone();
        error.insert("type".to_owned(), json!(self.kind));
        error.insert("message".to_owned(), json!(self.message));
        json!({"type": "error", "error": error})
    }
}
