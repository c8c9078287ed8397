//! The `edit` tool: replaces a text in a file, once and only if it is unique, or everywhere.
//!
//! Both texts are literal and compared byte by byte, so line ends stay what they are. The file is replaced only if it is
//! still the one that was read; otherwise nothing is written.

use std::io::Read;

use memchr::memmem;

use crate::tool::{
    Context,
    failure::ToolFailure,
    input::Input,
    intent::Notebook,
    path::{PathError, RequestedPath, Roots, SandboxFile, errno},
    replace::{ReplaceError, replace},
    write::refuse_read_only,
};

/// The input of `edit`.
pub(crate) struct Request {
    path: RequestedPath,
    old: String,
    new: String,
    everywhere: bool,
}

impl Request {
    pub(crate) fn from_input(input: &mut Input) -> Result<Self, ToolFailure> {
        Ok(Self {
            path: input.required_path("file_path")?,
            old: input.required_nonempty("old_string")?,
            new: input.required_text("new_string")?,
            everywhere: input.optional_flag("replace_all")?,
        })
    }

    pub(crate) fn into_path(self) -> RequestedPath {
        self.path
    }

    fn name(&self) -> String {
        self.path.as_str().to_owned()
    }

    fn failure(&self, source: PathError) -> ToolFailure {
        ToolFailure::Path { tool: "edit", path: self.name(), source }
    }
}

pub(crate) fn run(request: &Request, roots: &Roots, context: &Context) -> Result<String, ToolFailure> {
    let limits = &context.limits;
    let place = roots.resolve(&request.path).map_err(|error| request.failure(error))?;
    refuse_read_only("edit", request.path.as_str(), &place)?;
    let opened = place.open_file().map_err(|error| request.failure(error))?;
    let status = opened.status;
    let text = load(request, opened, limits.max_text_bytes)?;
    let (changed, count) = substitute(request, text.as_bytes(), limits.max_edit_result_bytes)?;
    let done = format!("edited {} ({count} replacement(s))", request.path.as_str());
    let written = replace(&place, &changed, Some(&status), &Notebook::new(context, &done));
    match written {
        Ok(()) => Ok(done),
        Err(ReplaceError::Path(source)) => Err(request.failure(source)),
        Err(ReplaceError::Changed) => Err(ToolFailure::EditConflict { path: request.name() }),
    }
}

fn load(request: &Request, opened: SandboxFile, limit: u64) -> Result<String, ToolFailure> {
    let too_large = |size| ToolFailure::EditTooLarge { path: request.name(), size, limit };
    let size = u64::try_from(opened.status.st_size).unwrap_or(0);
    if size > limit {
        return Err(too_large(size));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1);
    opened.file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| request.failure(errno(&error).into()))?;
    if bytes.len() as u64 > limit {
        return Err(too_large(bytes.len() as u64));
    }
    String::from_utf8(bytes).map_err(|_| ToolFailure::EditNotText { path: request.name() })
}

/// The new text and how often the old one was found, without overlaps.
fn substitute(request: &Request, text: &[u8], limit: u64) -> Result<(Vec<u8>, usize), ToolFailure> {
    let (old, new) = (request.old.as_bytes(), request.new.as_bytes());
    let places: Vec<usize> = memmem::find_iter(text, old).collect();
    let count = places.len();
    match count {
        0 => return Err(ToolFailure::NotFound { path: request.name() }),
        1 => {}
        _ if request.everywhere => {}
        _ => return Err(ToolFailure::NotUnique { path: request.name(), count }),
    }
    // The places do not overlap and lie in `text`, so the difference cannot be negative.
    let kept = text.len() - count * old.len();
    let size = (kept as u64).saturating_add((count as u64).saturating_mul(new.len() as u64));
    if size > limit {
        return Err(ToolFailure::EditResultTooLarge { path: request.name(), size, limit });
    }
    let mut changed = Vec::with_capacity(usize::try_from(size).unwrap_or_default());
    let mut behind = 0;
    for place in places {
        changed.extend_from_slice(&text[behind..place]);
        changed.extend_from_slice(new);
        behind = place + old.len();
    }
    changed.extend_from_slice(&text[behind..]);
    Ok((changed, count))
}

#[cfg(test)]
#[path = "edit_tests.rs"]
mod tests;
