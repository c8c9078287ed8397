//! The input of a tool, from JSON that a model has written. A mistake is answered to the model by tool and field; keys that
//! are not known are passed over, as the toolset says.

use std::time::Duration;

use serde_json::{Map, Value};

use crate::work::{BashInput, CallLimits, EditInput, GlobInput, GrepInput, ReadInput, ToolInput, WriteInput, limits};

/// The tools that run here. Every other one belongs to somebody else.
pub(super) const TOOLS: [&str; 6] = ["bash", "read", "write", "edit", "glob", "grep"];

/// Reads the input of `tool`, one of [`TOOLS`]. A command may ask for `longest` at most; what asks for more gets that.
///
/// # Errors
/// The text for the model.
pub(super) fn read(tool: &str, input: &Value, longest: Duration) -> Result<(ToolInput, CallLimits), String> {
    let Value::Object(fields) = input else { return Err(format!("{tool}: the input is not an object")) };
    let fields = Fields { tool, fields };
    let mut timeout = limits::FILE_TOOL_TIMEOUT;
    let input = match tool {
        "bash" => {
            timeout = fields.milliseconds("timeout_ms")?.unwrap_or(limits::BASH_TIMEOUT).min(longest);
            let (command, restart) = (fields.optional("command")?, fields.flag("restart")?);
            ToolInput::Bash(BashInput { command, restart })
        }
        "read" => {
            let (file_path, view_range) = (fields.required("file_path")?, fields.range("view_range")?);
            ToolInput::Read(ReadInput { file_path, view_range })
        }
        "write" => {
            let (file_path, content) = (fields.required("file_path")?, fields.text("content")?);
            ToolInput::Write(WriteInput { file_path, content })
        }
        "edit" => ToolInput::Edit(EditInput {
            file_path: fields.required("file_path")?,
            old_string: fields.required("old_string")?,
            new_string: fields.text("new_string")?,
            replace_all: fields.flag("replace_all")?,
        }),
        "glob" => ToolInput::Glob(GlobInput { pattern: fields.required("pattern")?, path: fields.optional("path")? }),
        "grep" => ToolInput::Grep(GrepInput { pattern: fields.required("pattern")?, path: fields.optional("path")? }),
        other => return Err(format!("{other}: is no tool of this runner")),
    };
    input.validate().map_err(|failure| format!("{}; {}", failure.message, failure.remediation))?;
    Ok((input, CallLimits { timeout: Some(timeout), ..CallLimits::default() }))
}

struct Fields<'f> {
    tool: &'f str,
    fields: &'f Map<String, Value>,
}

impl Fields<'_> {
    fn wrong(&self, name: &str, problem: &str) -> String {
        format!("{}: {name} {problem}", self.tool)
    }

    /// Null is the same as absent.
    fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    fn optional(&self, name: &str) -> Result<Option<String>, String> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(self.wrong(name, "must be a string")),
        }
    }

    fn text(&self, name: &str) -> Result<String, String> {
        self.optional(name)?.ok_or_else(|| self.wrong(name, "is required"))
    }

    fn required(&self, name: &str) -> Result<String, String> {
        self.text(name).and_then(|text| if text.is_empty() { Err(self.wrong(name, "is required")) } else { Ok(text) })
    }

    fn flag(&self, name: &str) -> Result<bool, String> {
        match self.get(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(name, "must be true or false")),
        }
    }

    fn milliseconds(&self, name: &str) -> Result<Option<Duration>, String> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match (value.as_u64(), value.as_f64()) {
            (Some(0), _) => Ok(None),
            (Some(milliseconds), _) => Ok(Some(Duration::from_millis(milliseconds))),
            (None, Some(number)) if number >= 0.0 => {
                // A fraction of a millisecond is no time, and what no clock can hold is the longest that is allowed.
                let time = Duration::try_from_secs_f64(number / 1000.0).unwrap_or(Duration::MAX);
                Ok(Some(time).filter(|time| time.as_millis() > 0))
            }
            _ => Err(self.wrong(name, "must be a number of milliseconds that is not negative")),
        }
    }

    fn range(&self, name: &str) -> Result<Option<(i64, i64)>, String> {
        let wrong = || self.wrong(name, "must be [start_line, end_line]");
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(lines)) => match &lines[..] {
                [first, last] => Ok(Some((first.as_i64().ok_or_else(wrong)?, last.as_i64().ok_or_else(wrong)?))),
                _ => Err(wrong()),
            },
            Some(_) => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const LONGEST: Duration = Duration::from_secs(600);

    fn problem(tool: &str, input: Value) -> String {
        read(tool, &input, LONGEST).map(|_| ()).expect_err("a problem")
    }

    #[test]
    fn mistakes_are_named_by_tool_and_field() {
        let rows = [
            ("bash", json!({"command": 3}), "bash: command must be a string"),
            ("bash", json!({"command": "x", "restart": "yes"}), "bash: restart must be true or false"),
            (
                "bash",
                json!({"timeout_ms": -1}),
                "bash: timeout_ms must be a number of milliseconds that is not negative",
            ),
            (
                "bash",
                json!({"timeout_ms": "5"}),
                "bash: timeout_ms must be a number of milliseconds that is not negative",
            ),
            ("bash", json!([]), "bash: the input is not an object"),
            ("read", json!({}), "read: file_path is required"),
            ("read", json!({"file_path": ""}), "read: file_path is required"),
            ("read", json!({"file_path": "f", "view_range": [1]}), "read: view_range must be [start_line, end_line]"),
            ("read", json!({"file_path": "f", "view_range": "1-2"}), "read: view_range must be [start_line, end_line]"),
            ("write", json!({"file_path": "f"}), "write: content is required"),
            ("edit", json!({"file_path": "f", "old_string": "", "new_string": "x"}), "edit: old_string is required"),
            ("glob", json!({"path": "x"}), "glob: pattern is required"),
            ("grep", json!({"pattern": "x", "path": 1}), "grep: path must be a string"),
        ];
        for (tool, input, text) in rows {
            assert_eq!(problem(tool, input), text);
        }
        assert!(problem("bash", json!({"command": "a\u{0}"})).starts_with("bash.command: contains a NUL byte; "));
    }

    #[test]
    fn unknown_keys_nulls_and_an_empty_command_pass() {
        let (input, limits) = read("bash", &json!({"novel": 1, "timeout_ms": null}), LONGEST).expect("good");
        assert!(input == ToolInput::Bash(BashInput::default()), "the tool itself says that a command is required");
        assert_eq!(limits.timeout, Some(limits::BASH_TIMEOUT));
    }

    #[test]
    fn time_of_a_command_is_what_it_asks_for_up_to_what_the_operator_allows() {
        let timeout = |value: Value| {
            let (_, limits) = read("bash", &json!({"command": "x", "timeout_ms": value}), LONGEST).expect("good");
            limits.timeout
        };
        assert_eq!(timeout(json!(500)), Some(Duration::from_millis(500)));
        assert_eq!(timeout(json!(1500.5)), Some(Duration::from_micros(1_500_500)));
        assert_eq!(timeout(json!(0)), Some(limits::BASH_TIMEOUT));
        assert_eq!(timeout(json!(0.2)), Some(limits::BASH_TIMEOUT));
        assert_eq!(timeout(json!(u64::MAX)), Some(LONGEST));
        assert_eq!(timeout(json!(1e300)), Some(LONGEST));
    }

    proptest! {
        #[test]
        fn no_input_makes_it_panic(tool in 0..TOOLS.len(), key in "[a-z_]{1,12}", number in any::<f64>(), text in ".{0,20}") {
            for value in [json!(number), json!(text), json!([number, text]), json!({"x": text})] {
                for name in [key.as_str(), "command", "file_path", "view_range", "timeout_ms", "pattern"] {
                    let _ = read(TOOLS[tool], &json!({ name: value }), LONGEST);
                }
            }
        }
    }
}
