//! A workspace for the tests of the tools.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use proptest::prelude::*;
use proto::init::v1::{ToolResult, content_block::Kind};
use serde_json::Value;
use tempfile::TempDir;

use crate::tool::{Context, run};

/// A directory `workspace` next to a directory `outside`, and a context for the former.
pub(crate) struct Workspace {
    directory: TempDir,
    pub(crate) context: Context,
}

impl Workspace {
    pub(crate) fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("sandbox-init-tools-").tempdir().expect("temporary directory");
        for name in ["workspace", "outside"] {
            fs::create_dir(directory.path().join(name)).expect("directory");
        }
        let context = Context::new(directory.path().join("workspace").canonicalize().expect("canonical"));
        Self { directory, context }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.context.working_directory
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    pub(crate) fn outside(&self) -> PathBuf {
        self.directory.path().canonicalize().expect("canonical").join("outside")
    }

    pub(crate) fn put(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("parent")).expect("directories");
        fs::write(&path, content).expect("file");
        path
    }

    pub(crate) fn content(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect("file")
    }

    pub(crate) fn mode(&self, name: &str) -> u32 {
        fs::metadata(self.path(name)).expect("metadata").permissions().mode() & 0o7777
    }

    pub(crate) fn call(&self, tool: &str, input: &Value) -> ToolResult {
        run(tool, input.to_string().as_bytes(), &self.context)
    }

    /// The text of a call that has to succeed.
    pub(crate) fn ok(&self, tool: &str, input: &Value) -> String {
        let (text, is_error) = texts(self.call(tool, input));
        assert!(!is_error, "{tool} {input} failed: {text}");
        text
    }

    /// The text of a call that has to fail.
    pub(crate) fn error(&self, tool: &str, input: &Value) -> String {
        let (text, is_error) = texts(self.call(tool, input));
        assert!(is_error, "{tool} {input} succeeded: {text}");
        text
    }

    /// Names left in the workspace that a replacement should have removed.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let names = fs::read_dir(self.root()).expect("directory").map(|entry| entry.expect("entry").file_name());
        names.map(|name| name.to_string_lossy().into_owned()).filter(|name| name.starts_with(".tmp-")).collect()
    }
}

/// The only block of a result, as text.
pub(crate) fn texts(result: ToolResult) -> (String, bool) {
    let [block] = result.content.as_slice() else { panic!("not one block: {result:?}") };
    match &block.kind {
        Some(Kind::Text(text)) => (text.clone(), result.is_error),
        other => panic!("not a text: {other:?}"),
    }
}

/// The path of the real ripgrep, for tests that compare with it. Prints a reason when there is none; on a machine that
/// promises it (`CI` is set) that is a failure.
pub(crate) fn ripgrep() -> Option<PathBuf> {
    let found = ["/usr/bin/rg", "/usr/local/bin/rg"].into_iter().map(PathBuf::from).find(|path| path.exists());
    if found.is_none() {
        assert!(std::env::var_os("CI").is_none(), "ripgrep is required where CI is set");
        eprintln!("skipped: no ripgrep in /usr/bin or /usr/local/bin");
    }
    found
}

/// A path of one to three names, tame ones and such as have broken programs.
pub(crate) fn any_path() -> impl Strategy<Value = Vec<u8>> {
    let tame = "[.]?[ab]{1,2}".prop_map(String::into_bytes);
    let wild: Vec<Vec<u8>> = WILD_NAMES.iter().map(|name| name.to_vec()).collect();
    let name = prop_oneof![3 => tame, 2 => prop::sample::select(wild)];
    prop::collection::vec(name, 1..4).prop_map(|names| names.join(&b'/'))
}

const WILD_NAMES: &[&[u8]] =
    &[b"-x", b" ", b"a b", b"a\nb", b"\xff", b"[a]", b"{b}", b"a\\b", b"*", b"!a", b"#a", b"a:1:b", b"b "];
