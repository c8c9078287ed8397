//! What a tool that replaces a file is about to do, written down where it outlives the tool, and what became of it.
//!
//! A tool that is killed leaves no answer. Its file is the old one or the new one all the same, because the new content takes the name
//! by a rename, and which of the two is found out by comparing: a draft that is still there has not become the file, a
//! file that is the draft has. Inodes are compared where content could not decide, when the new content is that of the old
//! file. Only an overwrite in place is known by its content. Whoever asks is another process of the workload, so
//! the answer is its claim, as every answer of a tool is.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FileStat, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use prost::Message;
use proto::init::v1::{ContentBlock, ToolResult, content_block::Kind};
use sha2::{Digest as _, Sha256};

use crate::tool::path::{Place, Roots, is_regular};
use crate::tool::{Context, edit, input::Input, write};

/// Longest answer that is kept; of a longer one the model hears only that it was done.
const KEPT_ANSWER_BYTES: usize = 4096;
/// An encoded intent and the length before it.
const ENCODED_BYTES: usize = 16 * 1024;
const LENGTH_BYTES: usize = 2;

/// What is about to become of one file.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Intent {
    /// Name of the draft beside the file; empty when the file is overwritten in place.
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) draft: Vec<u8>,
    /// The draft, or the file that is overwritten; all 0 of a draft that may not have been made.
    #[prost(message, required, tag = "2")]
    pub(crate) identity: Identity,
    /// SHA-256 of the whole new content; only of a file that is overwritten in place.
    #[prost(bytes = "vec", tag = "3")]
    pub(crate) content: Vec<u8>,
    /// What the tool answers when it is done.
    #[prost(string, tag = "4")]
    pub(crate) answer: String,
}

/// One version of one file.
#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct Identity {
    #[prost(uint64, tag = "1")]
    device: u64,
    #[prost(uint64, tag = "2")]
    inode: u64,
    #[prost(int64, tag = "3")]
    size: i64,
    /// Moves with every write and cannot be set by a program, unlike the time of modification.
    #[prost(int64, tag = "4")]
    changed_seconds: i64,
    #[prost(int64, tag = "5")]
    changed_nanoseconds: i64,
}

impl From<&FileStat> for Identity {
    fn from(status: &FileStat) -> Self {
        Self {
            device: status.st_dev,
            inode: status.st_ino,
            size: status.st_size,
            changed_seconds: status.st_ctime,
            changed_nanoseconds: status.st_ctime_nsec,
        }
    }
}

impl Identity {
    fn is_same_file(&self, other: &FileStat) -> bool {
        (self.device, self.inode) == (other.st_dev, other.st_ino)
    }
}

/// What was found of a file whose tool was killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// It has the new content.
    Replaced,
    /// It is what it was before.
    Unchanged,
    /// It is neither: something else has touched it since, or it was overwritten in place and not to the end.
    Neither,
}

impl Found {
    fn byte(self) -> u8 {
        match self {
            Self::Neither => 0,
            Self::Replaced => 1,
            Self::Unchanged => 2,
        }
    }

    /// Takes apart what [`settle`] answers: what was found, and the result of the tool.
    #[must_use]
    pub(crate) fn decode(answer: &[u8]) -> Option<(Self, &[u8])> {
        let (first, rest) = answer.split_first()?;
        let found =
            [Self::Neither, Self::Replaced, Self::Unchanged].into_iter().find(|found| found.byte() == *first)?;
        Some((found, rest))
    }
}

/// Where a tool writes down what it is about to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Notebook<'a> {
    file: Option<&'a File>,
    answer: &'a str,
}

impl<'a> Notebook<'a> {
    /// `answer` is what the tool will say when it is done.
    pub(crate) fn new(context: &'a Context, answer: &'a str) -> Self {
        Self { file: context.intents.as_deref(), answer }
    }

    /// Nobody would ask.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self { file: None, answer: "" }
    }

    /// An empty `draft` is about to be made beside the file. Nothing but its name is known of it.
    ///
    /// # Errors
    /// As [`Notebook::will_rename`].
    pub(crate) fn will_create(&self, draft: &OsStr) -> Result<(), Errno> {
        self.note(|| Intent { draft: draft.as_bytes().to_vec(), ..Intent::default() })
    }

    /// The content is about to be written to `draft` beside the file, and then to take its name.
    ///
    /// # Errors
    /// It cannot be written down; then nothing must be done.
    pub(crate) fn will_rename(&self, draft: &OsStr, status: &FileStat) -> Result<(), Errno> {
        self.note(|| Intent { draft: draft.as_bytes().to_vec(), identity: status.into(), ..Intent::default() })
    }

    /// The file is about to be overwritten.
    ///
    /// # Errors
    /// As [`Notebook::will_rename`].
    pub(crate) fn will_overwrite(&self, status: &FileStat, content: &[u8]) -> Result<(), Errno> {
        self.note(|| Intent { identity: status.into(), content: Sha256::digest(content).to_vec(), ..Intent::default() })
    }

    fn note(&self, intent: impl FnOnce() -> Intent) -> Result<(), Errno> {
        let Some(file) = self.file else { return Ok(()) };
        let answer = if self.answer.len() > KEPT_ANSWER_BYTES { "done" } else { self.answer };
        let encoded = Intent { answer: answer.to_owned(), ..intent() }.encode_to_vec();
        let length = u16::try_from(encoded.len()).map_err(|_| Errno::EMSGSIZE)?;
        let bytes = [&length.to_le_bytes(), encoded.as_slice()].concat();
        // One write within a page or two: a process that is killed has made it or not.
        file.write_all_at(&bytes, 0).map_err(|error| crate::tool::path::errno(&error))
    }
}

/// Forgets what was written down. To be called before each call, by whoever made the file.
///
/// # Errors
/// What the kernel says; then the tool must not run.
pub(crate) fn clear(file: &File) -> Result<(), Errno> {
    file.write_all_at(&[0; LENGTH_BYTES], 0).map_err(|error| crate::tool::path::errno(&error))
}

/// The encoded intent that is written down, if one is. The file belongs to the workload as well: at most 16 KiB are read.
pub(crate) fn read(file: &File) -> Option<Vec<u8>> {
    let mut length = [0; LENGTH_BYTES];
    file.read_exact_at(&mut length, 0).ok()?;
    let length = usize::from(u16::from_le_bytes(length));
    if length == 0 || length > ENCODED_BYTES {
        return None;
    }
    let mut encoded = vec![0; length];
    file.read_exact_at(&mut encoded, LENGTH_BYTES as u64).ok()?;
    Some(encoded)
}

/// Finds out what became of the intent of a `name` call that was killed, and removes the draft it left.
///
/// The answer is one byte for what was found, and the encoded result of the tool when it was done.
pub(crate) fn settle(name: &str, input_json: &[u8], intent: &[u8], context: &Context) -> Vec<u8> {
    let intent = Intent::decode(intent).unwrap_or_default();
    let found = place_of(name, input_json, context).map_or(Found::Neither, |place| find(&place, &intent));
    let mut answer = vec![found.byte()];
    if found == Found::Replaced {
        let content = vec![ContentBlock { kind: Some(Kind::Text(intent.answer)) }];
        answer.extend(ToolResult { is_error: false, content }.encode_to_vec());
    }
    answer
}

fn place_of(name: &str, input_json: &[u8], context: &Context) -> Option<Place> {
    let roots = Roots::open(context).ok()?;
    let path = match name {
        "write" => write::Request::from_input(&mut Input::parse("write", input_json).ok()?).ok()?.into_path(),
        "edit" => edit::Request::from_input(&mut Input::parse("edit", input_json).ok()?).ok()?.into_path(),
        _ => return None,
    };
    roots.resolve(&path).ok()
}

fn find(place: &Place, intent: &Intent) -> Found {
    let Some(slot) = &place.slot else { return Found::Neither };
    let look = |name: &OsStr| fstatat(&slot.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW).ok();
    let now = look(&slot.name);
    if intent.draft.is_empty() {
        return now.map_or(Found::Neither, |now| find_overwritten(place, &now, intent));
    }
    if now.is_some_and(|now| intent.identity.is_same_file(&now)) {
        return Found::Replaced;
    }
    let draft = OsStr::from_bytes(&intent.draft);
    if intent.identity == Identity::default() {
        // It was made, or not, and nothing was written to it. A name that was drawn is nobody else's, and an empty file is no loss.
        if look(draft).is_some_and(|draft| is_regular(&draft) && draft.st_size == 0) {
            let _ = unlinkat(&slot.directory, draft, UnlinkatFlags::NoRemoveDir);
        }
        return Found::Unchanged;
    }
    if !look(draft).is_some_and(|draft| intent.identity.is_same_file(&draft)) {
        return Found::Neither;
    }
    // What was found stands, whether or not it can be removed.
    let _ = unlinkat(&slot.directory, draft, UnlinkatFlags::NoRemoveDir);
    Found::Unchanged
}

fn find_overwritten(place: &Place, now: &FileStat, intent: &Intent) -> Found {
    if !is_regular(now) || !intent.identity.is_same_file(now) {
        return Found::Neither;
    }
    if intent.identity == Identity::from(now) {
        return Found::Unchanged;
    }
    match place.open_file().ok().and_then(|opened| digest(opened.file)) {
        Some(content) if content == intent.content => Found::Replaced,
        _ => Found::Neither,
    }
}

fn digest(mut file: File) -> Option<Vec<u8>> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Some(hasher.finalize().to_vec()),
            Ok(length) => hasher.update(buffer.get(..length)?),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
#[path = "intent_tests.rs"]
mod tests;
