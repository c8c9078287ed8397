//! Takes the fields of a tool's input out of its JSON, and names the field when one is missing or of the wrong type.
//!
//! `null` is the same as absent, keys that nobody asks for are ignored: models send both.

use serde_json::{Map, Value};

use crate::tool::{failure::ToolFailure, path::RequestedPath};

/// The parsed input of one call.
pub(crate) struct Input {
    tool: &'static str,
    fields: Map<String, Value>,
}

impl Input {
    pub(crate) fn parse(tool: &'static str, json: &[u8]) -> Result<Self, ToolFailure> {
        match serde_json::from_slice(json) {
            Ok(Value::Object(fields)) => Ok(Self { tool, fields }),
            Ok(_) => Err(ToolFailure::NotAnObject { tool }),
            Err(source) => Err(ToolFailure::NotJson { tool, source }),
        }
    }

    fn take(&mut self, field: &'static str) -> Option<Value> {
        self.fields.remove(field).filter(|value| !value.is_null())
    }

    fn wrong_type(&self, field: &'static str, expected: &'static str) -> ToolFailure {
        ToolFailure::WrongType { tool: self.tool, field, expected }
    }

    pub(crate) fn optional_text(&mut self, field: &'static str) -> Result<Option<String>, ToolFailure> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong_type(field, "a string")),
        }
    }

    /// A text that may be empty, but must be there.
    pub(crate) fn required_text(&mut self, field: &'static str) -> Result<String, ToolFailure> {
        self.optional_text(field)?.ok_or(ToolFailure::Required { tool: self.tool, field })
    }

    /// A text for which empty means missing.
    pub(crate) fn required_nonempty(&mut self, field: &'static str) -> Result<String, ToolFailure> {
        let text = self.required_text(field)?;
        if text.is_empty() {
            return Err(ToolFailure::Required { tool: self.tool, field });
        }
        Ok(text)
    }

    pub(crate) fn required_path(&mut self, field: &'static str) -> Result<RequestedPath, ToolFailure> {
        let text = self.required_nonempty(field)?;
        RequestedPath::new(text).ok_or(ToolFailure::Nul { tool: self.tool, field })
    }

    /// An absent or empty path is the working directory.
    pub(crate) fn optional_path(&mut self, field: &'static str) -> Result<RequestedPath, ToolFailure> {
        let text = self.optional_text(field)?.filter(|text| !text.is_empty()).unwrap_or_else(|| ".".to_owned());
        RequestedPath::new(text).ok_or(ToolFailure::Nul { tool: self.tool, field })
    }

    pub(crate) fn optional_flag(&mut self, field: &'static str) -> Result<bool, ToolFailure> {
        match self.take(field) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(_) => Err(self.wrong_type(field, "true or false")),
        }
    }

    /// A field as it is; `None` when absent or null.
    pub(crate) fn optional_value(&mut self, field: &'static str) -> Option<Value> {
        self.take(field)
    }
}
