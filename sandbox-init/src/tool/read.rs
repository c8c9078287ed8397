//! The `read` tool: a text, a range of its lines, an image or a PDF document.
//!
//! Texts are returned as they are, without line numbers, and only when they are UTF-8. A range is streamed, so a large file
//! costs no memory, and holes of a sparse file are skipped: they contain no line ends.
//!
//! Images and documents are chosen by the extension of the name, and the content is checked: a file that is not what its
//! name says is an error here rather than an unreadable picture in the conversation, which nobody could take out again.
//! The media type that is reported is that of the content.

use std::{
    fs::File,
    io::{Read, Seek},
    path::Path,
    time::Instant,
};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};
use proto::init::v1::content_block::Kind;
use serde_json::Value;

use crate::tool::{
    Limits,
    failure::ToolFailure,
    input::Input,
    media,
    path::{PathError, RequestedPath, Roots, SandboxFile, errno},
};

const CHUNK_BYTES: usize = 64 * 1024;

/// The input of `read`.
pub(crate) struct Request {
    path: RequestedPath,
    range: Option<Range>,
}

/// Lines counted from 1, both ends included; an `end` of 0 or less is the end of the file.
#[derive(Clone, Copy)]
struct Range {
    start: i64,
    end: i64,
}

impl Request {
    pub(crate) fn from_input(input: &mut Input) -> Result<Self, ToolFailure> {
        let path = input.required_path("file_path")?;
        let range = input.optional_value("view_range").map(|value| Range::parse(&value)).transpose()?;
        Ok(Self { path, range })
    }

    fn failure(&self, source: impl Into<PathError>) -> ToolFailure {
        ToolFailure::Path { tool: "read", path: self.name(), source: source.into() }
    }

    fn io_failure(&self, error: &std::io::Error) -> ToolFailure {
        self.failure(errno(error))
    }

    fn name(&self) -> String {
        self.path.as_str().to_owned()
    }
}

impl Range {
    /// A `start` of 0 is taken as 1: models that count from 0 mean the first line.
    fn parse(value: &Value) -> Result<Self, ToolFailure> {
        let numbers: Option<Vec<i64>> = value.as_array().and_then(|list| list.iter().map(Value::as_i64).collect());
        match numbers.as_deref() {
            Some([start, _]) if *start < 0 => Err(ToolFailure::RangeStart),
            Some([start, end]) => Ok(Self { start: *start, end: *end }),
            _ => Err(ToolFailure::RangeShape),
        }
    }

    fn first(self) -> i64 {
        self.start.max(1)
    }

    fn contains_after(self, line: i64) -> bool {
        self.end <= 0 || line <= self.end
    }
}

pub(crate) fn run(request: &Request, roots: &Roots, limits: &Limits) -> Result<Kind, ToolFailure> {
    let place = roots.resolve(&request.path).map_err(|error| request.failure(error))?;
    let opened = place.open_file().map_err(|error| request.failure(error))?;
    match Format::of(request.path.as_str()) {
        Some(_) if request.range.is_some() => Err(ToolFailure::RangeOnMedia),
        Some((format, extension)) => read_media(request, opened, format, extension, limits),
        None => read_text(request, opened, limits).map(Kind::Text),
    }
}

fn read_text(request: &Request, opened: SandboxFile, limits: &Limits) -> Result<String, ToolFailure> {
    let bytes = match request.range {
        Some(range) => Lines { request, range, limits, file: opened.file }.read()?,
        None => {
            let limit = limits.max_text_bytes;
            read_whole(request, opened, limit)?.map_err(|size| ToolFailure::ReadTooLarge {
                path: request.name(),
                size,
                limit,
            })?
        }
    };
    String::from_utf8(bytes).map_err(|_| ToolFailure::ReadNotText { path: request.name() })
}

/// The whole file, or its size when that is over the limit. The size before reading is a hint only: the file may grow.
fn read_whole(request: &Request, opened: SandboxFile, limit: u64) -> Result<Result<Vec<u8>, u64>, ToolFailure> {
    let size = u64::try_from(opened.status.st_size).unwrap_or(0);
    if size > limit {
        return Ok(Err(size));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1);
    opened.file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| request.io_failure(&error))?;
    let length = bytes.len() as u64;
    Ok(if length > limit { Err(length) } else { Ok(bytes) })
}

/// Reads a range of lines in pieces.
struct Lines<'a> {
    request: &'a Request,
    range: Range,
    limits: &'a Limits,
    file: File,
}

impl Lines<'_> {
    /// The selected lines with the line ends between them, without the one behind the last.
    fn read(mut self) -> Result<Vec<u8>, ToolFailure> {
        let mut selected = Vec::new();
        if self.range.end > 0 && self.range.end < self.range.first() {
            return Ok(selected);
        }
        let started = Instant::now();
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut line = 1;
        loop {
            let length = match self.file.read(&mut chunk) {
                Ok(0) => return Ok(selected),
                Ok(length) => length,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.request.io_failure(&error)),
            };
            if self.select(&chunk[..length], &mut line, &mut selected)? {
                return Ok(selected);
            }
            if line < self.range.first() {
                if chunk[..length].iter().all(|byte| *byte == 0) && !self.skip_hole()? {
                    return Ok(selected);
                }
                if started.elapsed() > self.limits.read_time {
                    return Err(ToolFailure::ReadTimedOut {
                        path: self.request.name(),
                        line: self.range.first(),
                        milliseconds: self.limits.read_time.as_millis(),
                    });
                }
            }
        }
    }

    /// Takes what is wanted of one chunk. True when the range is complete.
    fn select(&self, mut chunk: &[u8], line: &mut i64, selected: &mut Vec<u8>) -> Result<bool, ToolFailure> {
        while !chunk.is_empty() {
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let (content, rest) = chunk.split_at(end.unwrap_or(chunk.len()));
            let wanted = *line >= self.range.first();
            if wanted {
                self.append(content, selected)?;
            }
            if end.is_some() {
                *line += 1;
                if !self.range.contains_after(*line) {
                    return Ok(true);
                }
                if wanted {
                    self.append(b"\n", selected)?;
                }
            }
            chunk = rest.get(1..).unwrap_or_default();
        }
        Ok(false)
    }

    fn append(&self, bytes: &[u8], selected: &mut Vec<u8>) -> Result<(), ToolFailure> {
        let limit = self.limits.max_text_bytes;
        if selected.len() as u64 + bytes.len() as u64 <= limit {
            selected.extend_from_slice(bytes);
            return Ok(());
        }
        let path = self.request.name();
        let Range { start, end } = self.range;
        Err(if start == end || (!selected.contains(&b'\n') && bytes != b"\n") {
            ToolFailure::LineTooLarge { path, line: self.range.first(), limit }
        } else {
            ToolFailure::RangeTooLarge { path, start, end, limit }
        })
    }

    /// Moves to the next data of a sparse file. False when there is none up to its end.
    fn skip_hole(&mut self) -> Result<bool, ToolFailure> {
        let position = self.file.stream_position().map_err(|error| self.request.io_failure(&error))?;
        let Ok(offset) = i64::try_from(position) else { return Ok(false) };
        match lseek(&self.file, offset, Whence::SeekData) {
            Ok(_) => Ok(true),
            Err(Errno::ENXIO) => Ok(false),
            // A file system that cannot say has not moved: read on.
            Err(_) => Ok(true),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Image,
    Pdf,
}

impl Format {
    fn of(path: &str) -> Option<(Self, String)> {
        let extension = Path::new(path).extension()?.to_str()?.to_ascii_lowercase();
        match extension.as_str() {
            "png" | "jpg" | "jpeg" | "gif" | "webp" => Some((Self::Image, extension)),
            "pdf" => Some((Self::Pdf, extension)),
            _ => None,
        }
    }

    /// The media type that the content shows, if it is of this format.
    fn recognise(self, bytes: &[u8]) -> Option<&'static str> {
        match self {
            Self::Image if bytes.starts_with(b"\x89PNG\r\n\x1a\n") => Some("image/png"),
            Self::Image if bytes.starts_with(b"\xff\xd8\xff") => Some("image/jpeg"),
            Self::Image if bytes.starts_with(b"GIF87a") || bytes.starts_with(b"GIF89a") => Some("image/gif"),
            Self::Image if bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP") => Some("image/webp"),
            // Readers accept some bytes in front of the header.
            Self::Pdf if bytes[..bytes.len().min(1024)].windows(5).any(|window| window == b"%PDF-") => {
                Some("application/pdf")
            }
            Self::Image | Self::Pdf => None,
        }
    }
}

fn read_media(
    request: &Request,
    opened: SandboxFile,
    format: Format,
    extension: String,
    limits: &Limits,
) -> Result<Kind, ToolFailure> {
    let (limit, expected) = match format {
        Format::Image => (limits.max_image_bytes, "a PNG, JPEG, GIF or WebP image"),
        Format::Pdf => (limits.max_document_bytes, "a PDF document"),
    };
    let bytes = read_whole(request, opened, limit)?.map_err(|size| ToolFailure::MediaTooLarge {
        path: request.name(),
        size,
        limit,
    })?;
    let Some(media_type) = format.recognise(&bytes) else {
        return Err(ToolFailure::NotMedia { path: request.name(), expected, extension });
    };
    Ok(match format {
        Format::Image => Kind::Image(media(media_type, bytes)),
        Format::Pdf => Kind::Document(media(media_type, bytes)),
    })
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
