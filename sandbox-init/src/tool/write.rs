//! The `write` tool: makes a text the content of a file, with the directories above it.
//!
//! Follows a link at the end of the path to where it points, even if nothing is there yet, as long as that is inside.

use crate::tool::{
    Context,
    failure::ToolFailure,
    input::Input,
    intent::Notebook,
    path::{PathError, Place, RequestedPath, Roots, lossy},
    replace::{ReplaceError, replace},
};

/// The input of `write`.
pub(crate) struct Request {
    path: RequestedPath,
    content: String,
}

impl Request {
    pub(crate) fn from_input(input: &mut Input) -> Result<Self, ToolFailure> {
        Ok(Self { path: input.required_path("file_path")?, content: input.required_text("content")? })
    }

    pub(crate) fn into_path(self) -> RequestedPath {
        self.path
    }
}

pub(crate) fn run(request: &Request, roots: &Roots, context: &Context) -> Result<String, ToolFailure> {
    let path = request.path.as_str();
    let failure = |source: PathError| ToolFailure::Path { tool: "write", path: path.to_owned(), source };
    let place = roots.resolve(&request.path).map_err(failure)?;
    refuse_read_only("write", path, &place)?;
    let done = format!("wrote {} bytes to {path}", request.content.len());
    let written = replace(&place, request.content.as_bytes(), None, &Notebook::new(context, &done));
    match written {
        Ok(()) => Ok(done),
        Err(ReplaceError::Path(source)) => Err(failure(source)),
        // Without an expectation nothing can differ from it; the words of the kernel for a file that went away.
        Err(ReplaceError::Changed) => Err(failure(nix::errno::Errno::ESTALE.into())),
    }
}

/// Says no for a place in a read-only root.
pub(crate) fn refuse_read_only(tool: &'static str, path: &str, place: &Place) -> Result<(), ToolFailure> {
    match &place.read_only_root {
        None => Ok(()),
        Some(root) => Err(ToolFailure::ReadOnly { tool, path: path.to_owned(), root: lossy(root.as_os_str()) }),
    }
}

#[cfg(test)]
#[path = "write_tests.rs"]
mod tests;
