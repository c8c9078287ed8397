//! Events that are posted, with their types and their checks, and the parts of events that a model emits.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;

/// An event that somebody posts.
#[derive(Debug, Clone)]
pub enum Posted {
    /// `user.tool_result`, or `user.custom_tool_result` when `custom`.
    Result(PostedResult),
    /// `user.message`.
    Message {
        /// Its blocks.
        content: Vec<Value>,
    },
    /// `user.interrupt`.
    Interrupt {
        /// One thread, or all.
        thread: Option<String>,
    },
    /// `user.tool_confirmation`.
    Confirmation(Confirmation),
}

/// The answer to a call.
#[derive(Debug, Clone, PartialEq)]
pub struct PostedResult {
    /// Whether it answers `agent.custom_tool_use`.
    pub custom: bool,
    /// Id of the event that it answers.
    pub tool_use_id: String,
    /// Whether the tool failed.
    pub is_error: bool,
    /// Its blocks.
    pub content: Vec<Value>,
}

impl PostedResult {
    /// The text of all text blocks.
    #[must_use]
    pub fn text(&self) -> String {
        self.content.iter().filter_map(|block| block["text"].as_str()).collect()
    }
}

/// The verdict about a call that waits for one.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confirmation {
    /// The call.
    pub tool_use_id: String,
    /// `allow` or `deny`.
    pub result: Verdict,
    /// Why not.
    #[serde(default)]
    pub deny_message: Option<String>,
}

/// What a user says about a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Run it.
    Allow,
    /// Do not.
    Deny,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ToolResultFields {
    tool_use_id: String,
    #[serde(default)]
    is_error: Option<bool>,
    #[serde(default)]
    content: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CustomResultFields {
    custom_tool_use_id: String,
    #[serde(default)]
    is_error: Option<bool>,
    #[serde(default)]
    content: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MessageFields {
    content: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct InterruptFields {
    #[serde(default)]
    session_thread_id: Option<String>,
}

impl Posted {
    /// All events of a request body.
    ///
    /// # Errors
    /// 400 that names the field.
    pub fn parse_all(mut body: serde_json::Map<String, Value>, most_bytes: usize) -> Result<Vec<Self>, ApiError> {
        let Some(Value::Array(events)) = body.remove("events") else {
            return Err(ApiError::invalid("events: must be an array"));
        };
        if let Some(name) = body.keys().next() {
            return Err(ApiError::invalid(format!("{name}: Extra inputs are not permitted")));
        }
        if events.is_empty() {
            return Err(ApiError::invalid("events: must have at least one event"));
        }
        events.into_iter().enumerate().map(|(number, event)| Self::parse(event, number, most_bytes)).collect()
    }

    fn parse(event: Value, number: usize, most_bytes: usize) -> Result<Self, ApiError> {
        let place = format!("events.{number}");
        let length = event.to_string().len();
        if length > most_bytes {
            return Err(ApiError::new(
                413,
                "request_too_large",
                format!("{place}: {length} bytes, limit {most_bytes}"),
            ));
        }
        let Value::Object(mut fields) = event else {
            return Err(ApiError::invalid(format!("{place}: must be an object")));
        };
        let kind = match fields.remove("type") {
            Some(Value::String(kind)) => kind,
            _ => return Err(ApiError::invalid(format!("{place}.type: Field required"))),
        };
        let fields = Value::Object(fields);
        match kind.as_str() {
            "user.tool_result" => {
                let fields: ToolResultFields = read(fields, &place)?;
                Self::result(false, fields.tool_use_id, fields.is_error, fields.content, &place)
            }
            "user.custom_tool_result" => {
                let fields: CustomResultFields = read(fields, &place)?;
                Self::result(true, fields.custom_tool_use_id, fields.is_error, fields.content, &place)
            }
            "user.message" => {
                let fields: MessageFields = read(fields, &place)?;
                check_content(&fields.content, &place)?;
                Ok(Self::Message { content: fields.content })
            }
            "user.interrupt" => {
                let fields: InterruptFields = read(fields, &place)?;
                Ok(Self::Interrupt { thread: fields.session_thread_id })
            }
            "user.tool_confirmation" => Ok(Self::Confirmation(read(fields, &place)?)),
            other => Err(ApiError::invalid(format!("{place}.type: {other:?} cannot be posted"))),
        }
    }

    fn result(
        custom: bool,
        tool_use_id: String,
        is_error: Option<bool>,
        content: Vec<Value>,
        place: &str,
    ) -> Result<Self, ApiError> {
        check_content(&content, place)?;
        Ok(Self::Result(PostedResult { custom, tool_use_id, is_error: is_error.unwrap_or(false), content }))
    }
}

fn read<T: serde::de::DeserializeOwned>(fields: Value, place: &str) -> Result<T, ApiError> {
    serde_json::from_value(fields).map_err(|error| ApiError::invalid(format!("{place}: {error}")))
}

/// Whether each block is one that a session takes.
fn check_content(content: &[Value], place: &str) -> Result<(), ApiError> {
    for (number, block) in content.iter().enumerate() {
        let place = format!("{place}.content.{number}");
        let source = &block["source"];
        match block["type"].as_str() {
            Some("text") => {
                only(block, &["type", "text"], &place)?;
                if block["text"].as_str().is_none_or(str::is_empty) {
                    return Err(ApiError::invalid(format!("{place}.text: text content blocks must be non-empty")));
                }
            }
            Some("image") => {
                only(block, &["type", "source"], &place)?;
                check_source(source, &["image/png", "image/jpeg", "image/gif", "image/webp"], &place)?;
            }
            Some("document") => {
                only(block, &["type", "source", "title", "context"], &place)?;
                check_source(source, &["application/pdf"], &place)?;
            }
            Some("search_result") => {}
            other => return Err(ApiError::invalid(format!("{place}.type: {other:?} is not a block of a session"))),
        }
    }
    Ok(())
}

fn only(block: &Value, known: &[&str], place: &str) -> Result<(), ApiError> {
    let fields = block.as_object().into_iter().flatten();
    for (name, _) in fields {
        if !known.contains(&name.as_str()) {
            return Err(ApiError::invalid(format!("{place}.{name}: Extra inputs are not permitted")));
        }
    }
    Ok(())
}

fn check_source(source: &Value, media_types: &[&str], place: &str) -> Result<(), ApiError> {
    match source["type"].as_str() {
        Some("base64") => {
            let media_type = source["media_type"].as_str().unwrap_or_default();
            if !media_types.contains(&media_type) {
                return Err(ApiError::invalid(format!("{place}.source.media_type: {media_type:?} is not supported")));
            }
            let data = source["data"].as_str().unwrap_or_default();
            if data.is_empty() || STANDARD.decode(data).is_err() {
                return Err(ApiError::invalid(format!("{place}.source.data: must be base64")));
            }
            Ok(())
        }
        Some("url" | "file" | "text") => Ok(()),
        other => Err(ApiError::invalid(format!("{place}.source.type: {other:?} is not known"))),
    }
}

/// A call that a model makes, and what is expected of its result.
#[derive(Debug, Clone)]
pub struct ToolUse {
    /// Name of the tool.
    pub name: String,
    /// Its input.
    pub input: Value,
    /// Whether it is `agent.custom_tool_use`.
    pub custom: bool,
    /// A thread that is not the primary one.
    pub thread: Option<String>,
    /// `evaluated_permission`, which an older server leaves out.
    pub permission: Option<String>,
    /// What its result must be.
    pub expect: Option<Expect>,
    /// How it goes over the stream.
    pub wire: Wire,
}

impl ToolUse {
    /// A call that is allowed.
    #[must_use]
    pub fn new(name: &str, input: Value) -> Self {
        let permission = Some("allow".to_owned());
        Self { name: name.to_owned(), input, custom: false, thread: None, permission, expect: None, wire: Wire::Whole }
    }

    /// A command.
    #[must_use]
    pub fn bash(command: &str) -> Self {
        Self::new("bash", json!({"command": command}))
    }

    /// A call of a custom tool.
    #[must_use]
    pub fn custom(name: &str, input: Value) -> Self {
        Self { custom: true, permission: None, ..Self::new(name, input) }
    }

    /// With another permission.
    #[must_use]
    pub fn permission(mut self, permission: Option<&str>) -> Self {
        self.permission = permission.map(ToOwned::to_owned);
        self
    }

    /// From a thread that is not the primary one.
    #[must_use]
    pub fn in_thread(mut self, thread: &str) -> Self {
        self.thread = Some(thread.to_owned());
        self
    }

    /// With a check of its result.
    #[must_use]
    pub fn expecting(mut self, expect: Expect) -> Self {
        self.expect = Some(expect);
        self
    }

    /// By another way over the stream.
    #[must_use]
    pub fn over(mut self, wire: Wire) -> Self {
        self.wire = wire;
        self
    }

    pub(super) fn event(&self) -> Value {
        let kind = if self.custom { "agent.custom_tool_use" } else { "agent.tool_use" };
        let mut event = json!({"type": kind, "name": self.name, "input": self.input});
        if let Some(permission) = &self.permission {
            event["evaluated_permission"] = json!(permission);
            event["evaluation"] = match permission.as_str() {
                "ask" => json!({"type": "always_ask"}),
                "deny" => json!({"type": "auto", "evaluated_permission": {"type": "deny", "reason_code": "high_risk"}}),
                _ => json!({"type": "always_allow"}),
            };
        }
        if let Some(thread) = &self.thread {
            event["session_thread_id"] = json!(thread);
        }
        event
    }
}

/// What a result must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// This text, not an error.
    Text(String),
    /// A text that has this in it, not an error.
    Has(String),
    /// This text, as an error.
    Error(String),
    /// A text that has this in it, as an error.
    ErrorHas(String),
    /// One block of this type, not an error.
    Block(String),
}

impl Expect {
    /// What is wrong about a result, if anything.
    #[must_use]
    pub fn mismatch(&self, result: &PostedResult) -> Option<String> {
        let text = result.text();
        let fits = match self {
            Self::Text(wanted) => !result.is_error && text == *wanted,
            Self::Has(wanted) => !result.is_error && text.contains(wanted),
            Self::Error(wanted) => result.is_error && text == *wanted,
            Self::ErrorHas(wanted) => result.is_error && text.contains(wanted),
            Self::Block(kind) => {
                !result.is_error && result.content.len() == 1 && result.content[0]["type"] == kind.as_str()
            }
        };
        (!fits).then(|| format!("expected {self:?}, got is_error {} and {text:?}", result.is_error))
    }
}

/// How an event goes over the streams that are open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wire {
    /// As one frame.
    Whole,
    /// As one frame, written in pieces of this many bytes.
    Pieces(usize),
    /// As one frame with one `data:` line for each line of the indented JSON.
    ManyLines,
    /// As one frame whose `event:` is this, or that has none.
    Named(Option<String>),
    /// Two times.
    Twice,
    /// So many bytes of the frame, then the connection breaks.
    CutAfter(usize),
    /// Not at all: it is only in the history.
    Absent,
}
