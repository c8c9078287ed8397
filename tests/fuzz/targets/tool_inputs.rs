//! Tool input is written by a model that may be told what to write by a hostile page: whatever it says, a tool answers
//! without a panic, reads nothing outside its roots and changes nothing outside its roots.
//!
//! The first byte picks the tool, the rest is its input. A canary lies beside the root and is linked from inside it.
#![no_main]

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use prost::Message;
use sandbox_init::tool::{self, Context, Limits, NAMES};

const CANARY: &str = "canary 5f1c9e: nobody inside may read this";
/// Written files pile up, so the tree is made anew after this many inputs.
const INPUTS_PER_TREE: u32 = 512;

struct Tree {
    outside: PathBuf,
    inputs: u32,
}

impl Tree {
    /// Works in a directory that whoever started the fuzzer made, and removes afterwards.
    fn new() -> Self {
        let base = std::env::var_os("FUZZ_DIRECTORY").map_or_else(std::env::temp_dir, PathBuf::from);
        Self { outside: base.join(format!("sandbox-fuzz-{}", std::process::id())), inputs: 0 }
    }

    fn renew(&mut self) {
        let _ = fs::remove_dir_all(&self.outside);
        let root = self.root();
        fs::create_dir_all(root.join("src/deep")).expect("directories of the fuzzer's own");
        fs::write(self.canary(), CANARY).expect("canary");
        fs::write(root.join("a.txt"), "alpha\nbeta\ngamma\n").expect("file");
        fs::write(root.join("src/main.rs"), "fn main() {}\n").expect("file");
        fs::write(root.join("src/deep/nul"), b"\0\xff\n").expect("file");
        symlink("../canary", root.join("out")).expect("link");
        symlink("..", root.join("up")).expect("link");
        symlink("loop", root.join("loop")).expect("link");
    }

    fn root(&self) -> PathBuf {
        self.outside.join("root")
    }

    fn canary(&self) -> PathBuf {
        self.outside.join("canary")
    }

    fn run(&mut self, name: &str, input: &[u8]) {
        if self.inputs % INPUTS_PER_TREE == 0 {
            self.renew();
        }
        self.inputs += 1;
        let context = Context {
            limits: Limits {
                max_glob_entries: 2_000,
                glob_time: Duration::from_secs(2),
                grep_time: Duration::from_secs(2),
                read_time: Duration::from_secs(2),
                ..Limits::default()
            },
            ..Context::new(self.root())
        };
        let result = tool::run(name, input, &context);
        let answer = result.encode_to_vec();
        // The input may quote the canary itself, and then the answer may, too.
        let secret = b"canary 5f1c9e".as_slice();
        let contains = |text: &[u8]| text.windows(secret.len()).any(|window| window == secret);
        assert!(!contains(&answer) || contains(input), "{name} read the canary");
        assert_eq!(fs::read(self.canary()).ok().as_deref(), Some(CANARY.as_bytes()), "{name} changed the canary");
        let beside = fs::read_dir(&self.outside).map(Iterator::count).unwrap_or_default();
        assert_eq!(beside, 2, "{name} made something outside its root");
    }
}

thread_local! {
    static TREE: RefCell<Tree> = RefCell::new(Tree::new());
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, input)) = bytes.split_first() else { return };
    let name = NAMES[usize::from(*first) % NAMES.len()];
    TREE.with_borrow_mut(|tree| tree.run(name, input));
});
