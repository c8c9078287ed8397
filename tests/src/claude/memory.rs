//! Memory stores: listed, read and changed under preconditions.

use std::fmt::Write as _;

use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::error::ApiError;
use super::plane::ControlPlane;
use super::request::Incoming;
use super::work::page_of;

/// Largest content, in bytes.
const CONTENT_BYTES: usize = 102_400;
/// Longest path, in bytes, and most segments of one.
const PATH_BYTES: usize = 1024;
const PATH_SEGMENTS: usize = 20;

/// A memory store.
#[derive(Debug, Clone)]
pub struct MemoryStore {
    /// `memstore_…`.
    pub id: String,
    /// In the order of creation.
    pub memories: Vec<Memory>,
}

/// A memory.
#[derive(Debug, Clone)]
pub struct Memory {
    /// `mem_…`.
    pub id: String,
    /// From the root of the store.
    pub path: String,
    /// Its text.
    pub content: String,
    version: String,
    created_at: String,
    updated_at: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    path: String,
    content: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Update {
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    path: Option<String>,
    #[serde(default)]
    precondition: Option<Precondition>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Precondition {
    r#type: String,
    content_sha256: String,
}

impl ControlPlane {
    /// Adds an empty store, and returns its id.
    pub fn create_store(&mut self) -> String {
        let id = self.next_id("memstore_");
        self.memory_stores.push(MemoryStore { id: id.clone(), memories: Vec::new() });
        id
    }

    /// A store.
    ///
    /// # Errors
    /// 404.
    pub fn store(&mut self, id: &str) -> Result<&mut MemoryStore, ApiError> {
        let found = self.memory_stores.iter_mut().find(|store| store.id == id);
        found.ok_or_else(|| ApiError::not_found(format!("memory store {id} not found")))
    }

    /// Adds a memory.
    ///
    /// # Errors
    /// 400 for a path or content that is refused, 404, 409 for a path that is taken.
    pub fn add_memory(&mut self, store_id: &str, path: &str, content: &str) -> Result<Value, ApiError> {
        check_path(path)?;
        check_content(content)?;
        let (id, version, stamp) = (self.next_id("mem_"), self.next_id("memver_"), self.stamp());
        let store = self.store(store_id)?;
        if let Some(taken) = store.memories.iter().find(|memory| memory.path == path) {
            return Err(ApiError::new(409, "memory_path_conflict_error", format!("path: {path} is taken"))
                .with("conflicting_memory_id", json!(taken.id)));
        }
        let memory = Memory {
            id,
            path: path.to_owned(),
            content: content.to_owned(),
            version,
            created_at: stamp.clone(),
            updated_at: stamp,
        };
        let shown = memory.json(store_id, true);
        store.memories.push(memory);
        Ok(shown)
    }

    pub(super) fn post_memory(&mut self, store_id: &str, incoming: &Incoming) -> Result<Value, ApiError> {
        let create: Create = incoming.typed()?;
        self.add_memory(store_id, &create.path, &create.content)
    }

    pub(super) fn list_memories(&mut self, store_id: &str, incoming: &Incoming) -> Result<Value, ApiError> {
        let full = is_full(incoming)?;
        let limit = incoming.number("limit", 1, if full { 20 } else { 100 })?.unwrap_or(20);
        let prefix = incoming.parameter("path_prefix").unwrap_or("/");
        if !prefix.ends_with('/') {
            return Err(ApiError::invalid("path_prefix: must end with /"));
        }
        let store = self.store(store_id)?;
        let mut memories: Vec<&Memory> =
            store.memories.iter().filter(|memory| memory.path.starts_with(prefix)).collect();
        memories.sort_by(|one, other| one.path.cmp(&other.path));
        let all: Vec<Value> = memories.into_iter().map(|memory| memory.json(store_id, full)).collect();
        page_of(&all, Some(limit), 100, incoming.parameter("page"))
    }

    pub(super) fn get_memory(&mut self, store_id: &str, id: &str, incoming: &Incoming) -> Result<Value, ApiError> {
        let full = is_full(incoming)?;
        Ok(self.store(store_id)?.memory(id)?.json(store_id, full))
    }

    pub(super) fn update_memory(&mut self, store_id: &str, id: &str, incoming: &Incoming) -> Result<Value, ApiError> {
        let update: Update = incoming.typed()?;
        let (version, stamp) = (self.next_id("memver_"), self.stamp());
        let store = self.store(store_id)?;
        if let Some(path) = &update.path {
            check_path(path)?;
            let taken = store.memories.iter().find(|memory| memory.path == *path && memory.id != id);
            if let Some(taken) = taken {
                return Err(ApiError::new(409, "memory_path_conflict_error", format!("path: {path} is taken"))
                    .with("conflicting_memory_id", json!(taken.id)));
            }
        }
        let memory = store.memory(id)?;
        if let Some(precondition) = &update.precondition {
            if precondition.r#type != "content_sha256" {
                return Err(ApiError::invalid(format!("precondition.type: {:?} is not known", precondition.r#type)));
            }
            memory.check(&precondition.content_sha256)?;
        }
        if let Some(content) = update.content {
            check_content(&content)?;
            memory.content = content;
        }
        if let Some(path) = update.path {
            memory.path = path;
        }
        memory.version = version;
        memory.updated_at = stamp;
        Ok(memory.json(store_id, true))
    }

    pub(super) fn delete_memory(&mut self, store_id: &str, id: &str, incoming: &Incoming) -> Result<Value, ApiError> {
        let store = self.store(store_id)?;
        let memory = store.memory(id)?;
        if let Some(expected) = incoming.parameter("expected_content_sha256") {
            memory.check(expected)?;
        }
        store.memories.retain(|memory| memory.id != id);
        Ok(json!({"type": "memory_deleted", "id": id}))
    }
}

impl MemoryStore {
    fn memory(&mut self, id: &str) -> Result<&mut Memory, ApiError> {
        let found = self.memories.iter_mut().find(|memory| memory.id == id);
        found.ok_or_else(|| ApiError::not_found(format!("memory {id} not found")))
    }
}

impl Memory {
    /// SHA-256 of the content, in hexadecimal.
    #[must_use]
    pub fn sha256(&self) -> String {
        Sha256::digest(self.content.as_bytes()).iter().fold(String::new(), |mut text, byte| {
            // Writing into a String cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    fn check(&self, expected: &str) -> Result<(), ApiError> {
        if self.sha256() == expected {
            return Ok(());
        }
        Err(ApiError::new(409, "memory_precondition_failed_error", format!("memory {} has other content", self.id)))
    }

    fn json(&self, store_id: &str, full: bool) -> Value {
        json!({
            "type": "memory",
            "id": self.id,
            "memory_store_id": store_id,
            "memory_version_id": self.version,
            "path": self.path,
            "content": full.then_some(&self.content),
            "content_sha256": self.sha256(),
            "content_size_bytes": self.content.len(),
            "created_at": self.created_at,
            "updated_at": self.updated_at,
        })
    }
}

fn is_full(incoming: &Incoming) -> Result<bool, ApiError> {
    match incoming.parameter("view") {
        None | Some("basic") => Ok(false),
        Some("full") => Ok(true),
        Some(other) => Err(ApiError::invalid(format!("view: must be basic or full, not {other:?}"))),
    }
}

fn check_path(path: &str) -> Result<(), ApiError> {
    let refuse = |why: &str| Err(ApiError::invalid(format!("path: {path:?} {why}")));
    let Some(rest) = path.strip_prefix('/') else { return refuse("must begin with /") };
    let segments: Vec<&str> = rest.split('/').collect();
    if path.len() > PATH_BYTES || segments.len() > PATH_SEGMENTS {
        return refuse("is too long");
    }
    if segments.iter().any(|segment| matches!(*segment, "" | "." | "..")) {
        return refuse("has an empty, . or .. segment");
    }
    if path.chars().any(|one| one.is_control() || one == '\u{2028}' || one == '\u{2029}') {
        return refuse("has a control character");
    }
    Ok(())
}

fn check_content(content: &str) -> Result<(), ApiError> {
    if content.len() > CONTENT_BYTES {
        return Err(ApiError::invalid(format!("content: {} bytes, limit {CONTENT_BYTES}", content.len())));
    }
    Ok(())
}
