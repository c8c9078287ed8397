//! Reads a section of a configuration key by key, and says what is wrong with every one of them.

use std::path::Path;

use serde::de::DeserializeOwned;
use toml::{Table, Value};

use super::problem::Problem;

/// Takes keys out of a table and remembers what was wrong, and which keys exist, so that the rest is unknown.
pub(super) struct Reader<'a> {
    file: &'a Path,
    section: String,
    table: Table,
    known: Vec<&'static str>,
    pub(super) problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a Path, section: &str, table: Table) -> Self {
        Self { file, section: section.to_owned(), table, known: Vec::new(), problems: Vec::new() }
    }

    pub(super) fn take<T: DeserializeOwned>(&mut self, key: &'static str, expected: &str) -> Option<T> {
        self.known.push(key);
        let value = self.table.remove(key)?;
        let kind = value.type_str();
        match value.try_into() {
            Ok(value) => Some(value),
            Err(_) => {
                self.report(key, format!("this {kind} is not what belongs here"), format!("write {expected}"));
                None
            }
        }
    }

    pub(super) fn section(&mut self, name: &'static str) -> Option<Reader<'a>> {
        self.known.push(name);
        match self.table.remove(name)? {
            Value::Table(table) => Some(Reader::new(self.file, name, table)),
            _ => {
                self.report(name, "is not a section".into(), format!("write [{name}] on a line of its own"));
                None
            }
        }
    }

    /// Every section of a list, with its number in the names of its keys. A single section is a list of one.
    pub(super) fn read_sections<T>(&mut self, name: &'static str, read: impl Fn(&mut Reader<'_>) -> T) -> Vec<T> {
        self.known.push(name);
        let tables = match self.table.remove(name) {
            None => return Vec::new(),
            Some(Value::Table(table)) => vec![Value::Table(table)],
            Some(Value::Array(tables)) => tables,
            Some(_) => {
                self.report(name, "is not a section".into(), format!("write [[{name}]] on a line of its own"));
                return Vec::new();
            }
        };
        let mut values = Vec::new();
        for (number, table) in tables.into_iter().enumerate() {
            let section = format!("{name}[{number}]");
            match table {
                Value::Table(table) => {
                    let mut reader = Reader::new(self.file, &section, table);
                    values.push(read(&mut reader));
                    self.close(reader);
                }
                _ => self.report(&section, "is not a section".into(), format!("write [[{name}]] on a line of its own")),
            }
        }
        values
    }

    pub(super) fn read_section<T: Default>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&mut Reader<'_>) -> T,
    ) -> T {
        let Some(mut section) = self.section(name) else { return T::default() };
        let value = read(&mut section);
        self.close(section);
        value
    }

    pub(super) fn close(&mut self, section: Reader<'_>) {
        self.problems.extend(section.finish());
    }

    pub(super) fn finish(mut self) -> Vec<Problem> {
        for key in self.table.keys().cloned().collect::<Vec<_>>() {
            let fix = match nearest(&key, &self.known) {
                Some(known) => format!("did you mean {known}?"),
                None => format!("remove it; known here: {}", self.known.join(", ")),
            };
            self.report(&key, "is not a known key".into(), fix);
        }
        self.problems
    }

    pub(super) fn report(&mut self, key: &str, what: String, fix: String) {
        let key = if self.section.is_empty() { key.to_owned() } else { format!("{}.{key}", self.section) };
        self.problems.push(Problem { file: self.file.to_path_buf(), key, what, fix });
    }
}

/// The known key that differs least, if it differs little.
fn nearest<'k>(key: &str, known: &[&'k str]) -> Option<&'k str> {
    known
        .iter()
        .map(|candidate| (distance(key, candidate), *candidate))
        .min()
        .filter(|(far, _)| *far <= 3)
        .map(|(_, k)| k)
}

/// Number of single-byte changes between two short names.
fn distance(left: &str, right: &str) -> usize {
    let (left, right) = (left.as_bytes(), right.as_bytes());
    if left.len() > 64 || right.len() > 64 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (line, byte) in left.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = line + 1;
        for (column, other) in right.iter().enumerate() {
            let changed = diagonal + usize::from(byte != other);
            diagonal = row[column + 1];
            row[column + 1] = changed.min(row[column] + 1).min(diagonal + 1);
        }
    }
    row[right.len()]
}
