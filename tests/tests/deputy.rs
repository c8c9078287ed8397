//! Confused deputy: the runner and the launcher work with names that the image or the workload chose. None of these names
//! may lead them to a file of the host.
#![forbid(unsafe_code)]

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use proto::init::v1::{Exec as Program, start_call};
use proto::launch::v1::{CreateSandbox, HostRootfs, create_sandbox};
use sandbox_runner_tests::canary::Canaries;
use sandbox_runner_tests::host::{self, Snapshot};
use sandbox_runner_tests::keeper::Keeper;
use sandbox_runner_tests::launcher::{Connection, Launcher, Setup, plain_sandbox};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::{PROBER, Rootfs, shared_directory};
use sandbox_runner_tests::runner::{Caller, Exec, Finished};
use serde_json::json;
use tempfile::TempDir;

/// A directory of the host that a hostile name points to.
struct Target {
    directory: TempDir,
}

impl Target {
    fn new() -> Self {
        let directory = shared_directory("target");
        for name in ["null", "hosts", "resolv.conf", "hostname", "kept"] {
            fs::write(directory.path().join(name), "untouched").expect("a file of our own");
        }
        // Anybody may write here, so that only the deputy's care protects it.
        fs::set_permissions(directory.path(), Permissions::from_mode(0o1777)).expect("chmod");
        Self { directory }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn assert_untouched(&self) {
        let mut names: Vec<_> =
            fs::read_dir(self.path()).expect("listed").flatten().map(|entry| entry.file_name()).collect();
        names.sort();
        assert_eq!(names, ["hostname", "hosts", "kept", "null", "resolv.conf"], "the target was written to");
        for name in names {
            let path = self.path().join(name);
            assert_eq!(fs::read_to_string(&path).expect("readable"), "untouched", "{} was changed", path.display());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        assert!(!mounts.contains(&self.path().display().to_string()), "something is mounted on the target");
    }
}

fn assert_refused(finished: &Finished, names: &[&str]) {
    assert_eq!(finished.code(), 125, "not refused: {} {}", finished.text(), finished.errors());
    for name in names {
        assert!(finished.errors().contains(name), "the message does not name {name}: {}", finished.errors());
    }
}

/// Case 1: directories of the image that the sandbox is mounted on, or that we and the workload trust.
fn assert_link_is_refused(name: &str) {
    needs_root!();
    let _host = host::shared();
    let target = Target::new();
    let rootfs = Rootfs::with_link(name, target.path());

    let finished = Exec::in_rootfs(Caller::Root, rootfs.path()).prober(["exit", "0"]);

    assert_refused(&finished, &[name]);
    target.assert_untouched();
}

#[test]
fn image_whose_dev_is_a_link_is_refused() {
    assert_link_is_refused("dev");
}

#[test]
fn image_whose_proc_is_a_link_is_refused() {
    assert_link_is_refused("proc");
}

#[test]
fn image_whose_sys_is_a_link_is_refused() {
    assert_link_is_refused("sys");
}

#[test]
fn image_whose_etc_is_a_link_is_refused() {
    assert_link_is_refused("etc");
}

#[test]
fn image_whose_tmp_is_a_link_is_refused() {
    assert_link_is_refused("tmp");
}

#[test]
fn image_whose_run_is_a_link_is_refused() {
    assert_link_is_refused("run");
}

#[test]
fn image_whose_workspace_is_a_link_is_refused() {
    assert_link_is_refused("workspace");
}

/// Case 2: the same with a link that is relative, and one to a harmless place of the image itself.
#[test]
fn image_whose_special_directory_is_a_relative_link_is_refused() {
    needs_root!();
    let _host = host::shared();
    for target in ["../../../../../../../../tmp", "usr", "proc/1/root/tmp"] {
        let rootfs = Rootfs::with_link("dev", Path::new(target));

        let finished = Exec::in_rootfs(Caller::Root, rootfs.path()).prober(["exit", "0"]);

        assert_refused(&finished, &["dev"]);
    }
}

/// Case 3: a file stands where a directory is mounted.
#[test]
fn image_with_a_file_in_place_of_a_special_directory_is_refused() {
    needs_root!();
    let _host = host::shared();
    for name in ["dev", "proc", "tmp"] {
        let rootfs = Rootfs::with_prober();
        fs::remove_dir(rootfs.path().join(name)).expect("an empty directory of our own");
        fs::write(rootfs.path().join(name), "a file").expect("a file of our own");

        let finished = Exec::in_rootfs(Caller::Root, rootfs.path()).prober(["exit", "0"]);

        assert_refused(&finished, &[name]);
    }
}

/// Beside the eight: a working directory named by the caller that leads out through the image or through proc.
#[test]
fn given_working_directory_never_leads_out() {
    needs_root!();
    let _host = host::shared();
    let target = Target::new();
    let rootfs = Rootfs::with_link("escape", target.path());
    let kept = target.path().join("kept");
    let kept = kept.strip_prefix("/").expect("absolute").to_str().expect("UTF-8");
    let within = |name: &str, path: &str| {
        Exec::in_rootfs(Caller::Root, rootfs.path()).option("--workdir", name).prober(["read", path])
    };
    let works = within("/etc", "passwd");
    assert_eq!((works.code(), works.text().as_str()), (0, "root:x:0:0::/root:/bin/sh\n"), "{}", works.errors());

    for name in ["/escape", "/escape/..", "/proc/1/root", "/proc/1/cwd", "/proc/self/fd/7", "../../../.."] {
        assert_refused(&within(name, "kept"), &[if name.starts_with('/') { "working directory" } else { "cwd" }]);
    }
    // Back at the sandbox's own root, where nothing of the host is.
    for name in ["/proc/self/root/..", "/../.."] {
        for path in ["kept", kept] {
            let finished = within(name, path);
            assert_eq!((finished.code(), finished.text().as_str()), (1, ""), "{name} leads out: {}", finished.errors());
            assert!(finished.errors().contains("No such file or directory"), "{name}: {}", finished.errors());
        }
        assert_eq!(within(name, "etc/passwd").code(), 0, "{name} leads nowhere");
    }
    target.assert_untouched();
}

/// Case 4: files that programs expect to be made for them, replaced by links in the image, and the directory of our own.
#[test]
fn files_of_etc_and_our_own_directory_do_not_follow_links_of_the_image() {
    needs_root!();
    let _host = host::shared();
    let target = Target::new();
    let rootfs = Rootfs::with_prober();
    let names = ["hosts", "resolv.conf", "hostname"];
    for name in names {
        symlink(target.path().join(name), rootfs.path().join("etc").join(name)).expect("a link");
    }

    for name in names {
        let path = format!("/etc/{name}");
        for arguments in [vec!["read", &path], vec!["write", &path, "changed"]] {
            let finished = Exec::in_rootfs(Caller::Root, rootfs.path()).prober(arguments);
            assert_eq!((finished.code(), finished.text().as_str()), (1, ""), "{path}: {}", finished.errors());
            assert!(finished.errors().contains("No such file or directory"), "{path}: {}", finished.errors());
        }
    }
    symlink(target.path(), rootfs.path().join("run/sandbox-runner")).expect("a link");
    let refused = Exec::in_rootfs(Caller::Root, rootfs.path()).prober(["exit", "0"]);
    assert_refused(&refused, &["/run/sandbox-runner"]);
    target.assert_untouched();
}

/// Case 5: output is kept in a directory the sandbox can see; it must not be able to put a link there.
#[test]
fn spool_directory_cannot_be_changed_from_inside() {
    needs_root!();
    let _host = host::shared();
    let rootfs = Rootfs::with_prober();
    let exec = Exec::in_rootfs(Caller::Root, rootfs.path());
    let output = "/run/sandbox-runner/output";

    let listing = exec.prober(["list", "/run/sandbox-runner"]);
    assert!(listing.text().lines().any(|name| name == "output"), "{} {}", listing.text(), listing.errors());
    assert!(!listing.text().contains("sock"), "a socket of the runner is visible inside: {}", listing.text());
    assert_eq!(exec.prober(["list", output]).code(), 0, "the spool is not there, so nothing below is tried");
    for (path, reason) in [
        (format!("{output}/planted"), "Read-only file system"),
        ("/run/sandbox-runner/planted".into(), "Permission denied"),
    ] {
        let written = exec.prober(["write", &path, "x"]);
        assert_eq!(written.code(), 1, "{path} was written");
        assert!(written.errors().contains(reason), "{path}: {}", written.errors());
    }
}

/// Case 6: what the workload leaves in its tree is removed by a process with rights over it.
#[test]
fn removal_does_not_follow_links_of_the_workload() {
    needs_root!();
    let _host = host::exclusive();
    let target = Target::new();
    let exec = Exec::new(Caller::Root);
    let warm = exec.run(["true"]);
    assert_eq!(warm.code(), 0, "{}", warm.errors());
    let before = Snapshot::take(&[exec.state_directory()]);
    let script = format!(
        "cd /workspace; ln -s {target} direct; ln -s / root; mkdir -p a/b; ln -s ../../../../../../../.. a/b/up; \
         rm -rf a/c; ln -s {target} a/c; mkdir locked; touch locked/file; chmod 000 locked; \
         i=0; while [ $i -lt 300 ]; do mkdir d || break; cd d || break; i=$((i+1)); done; ln -s {target} end; \
         cd /; mkdir /etc/x; ln -s {target} /etc/x/y; mkfifo /workspace/fifo; exit 0",
        target = target.path().display()
    );

    let finished = exec.run(["sh", "-c", &script]);

    assert_eq!(finished.code(), 0, "{}", finished.errors());
    host::assert_restored(&before, &[exec.state_directory()], Duration::from_secs(20));
    target.assert_untouched();
}

/// Beside the eight: the root filesystem and the state directory are names, too.
#[test]
fn unusable_roots_and_state_directories_are_refused_with_their_name() {
    needs_root!();
    let _host = host::shared();
    let rootfs = Rootfs::with_prober();
    let file = rootfs.path().join("etc/passwd");
    for root in [Path::new("/no/such/rootfs"), &file] {
        let finished = Exec::in_rootfs(Caller::Root, root).prober(["exit", "0"]);
        assert_refused(&finished, &[root.to_str().expect("UTF-8")]);
    }

    let shared = shared_directory("unsafe");
    fs::set_permissions(shared.path(), Permissions::from_mode(0o1777)).expect("chmod");
    let finished =
        Exec::in_rootfs(Caller::Root, rootfs.path()).option("--state-dir", shared.path()).prober(["exit", "0"]);
    assert_ne!(finished.code(), 0, "a state directory that anybody can write to was used");
}

/// A sandbox of a launcher, and a connection to its process 1.
struct Session {
    keeper: Keeper,
    connection: Connection,
    launcher: Launcher,
    _rootfs: Rootfs,
}

impl Session {
    fn start(root: create_sandbox::Rootfs) -> Self {
        let rootfs = Rootfs::with_prober();
        let launcher = Setup::new(1, rootfs.path()).start().expect("the launcher starts");
        let connection = Connection::greeted(&launcher.setup().socket()).expect("served");
        let sandbox = CreateSandbox { rootfs: Some(root), ..plain_sandbox("deputy") };
        let created = connection.create(sandbox).expect("a sandbox");
        let [_, run] = launcher.setup().directories();
        let keeper = Keeper::connect(&run.join("sandboxes").join(created.socket_name)).expect("process 1 answers");
        Self { keeper, connection, launcher, _rootfs: rootfs }
    }

    fn end(self) {
        drop((self.keeper, self.connection));
        self.launcher.stop();
    }
}

/// Case 7: file tools, which take paths of the model and follow links of the workload.
#[test]
fn file_tools_find_nothing_of_the_host_by_dotdot_or_through_links() {
    needs_root!();
    let _host = host::shared();
    let (mut canaries, target) = (Canaries::plant(), Target::new());
    let mut session = Session::start(create_sandbox::Rootfs::Host(HostRootfs {}));
    let keeper = &mut session.keeper;
    let kept = target.path().join("kept").display().to_string();
    let made = keeper.bash(&format!(
        "cd /workspace && echo inside > own && ln -s own link && ln -s / root && ln -s /proc/1/root first && \
         ln -s /proc/self/root self && ln -s {kept} file && ln -s {} folder && ln -s ../../../../.. up",
        target.path().display()
    ));
    assert_eq!(made.code(), Some(0), "{made:?}");
    // A link by itself is fine, so what is refused below is refused for where it leads.
    let own = keeper.tool("read", &json!({"file_path": "/workspace/link"}));
    assert_eq!(own.answer(), Some(("inside\n".to_owned(), false)), "{own:?}");

    let hidden: Vec<String> =
        canaries.files().iter().map(|file| file.display().to_string()).chain([kept.clone()]).collect();
    let roots = [
        "",
        "../../../../../../..",
        "/workspace/root",
        "/workspace/first",
        "/workspace/self",
        "/workspace/up",
        "/proc/1/root",
    ];
    let reached = roots.iter().flat_map(|root| hidden.iter().map(move |file| format!("{root}{file}")));
    let reached: Vec<String> = reached.chain(["/workspace/file".into(), "/workspace/folder/kept".into()]).collect();
    for path in &reached {
        let folder = path.rsplit_once('/').map(|(folder, _)| folder).filter(|folder| *folder != "/workspace");
        for (tool, input) in [
            ("read", json!({"file_path": path})),
            ("edit", json!({"file_path": path, "old_string": "e", "new_string": "E", "replace_all": true})),
            ("glob", json!({"pattern": "**/*", "path": folder.unwrap_or("/workspace/folder")})),
            ("grep", json!({"pattern": "secret|untouched", "path": path})),
        ] {
            let (text, is_error) = keeper.tool(tool, &input).answer().expect("an answer");
            assert!(is_error, "{tool} {path}: {text}");
        }
    }
    // Inside, such a place may be made; on the host nothing may be.
    for path in &reached {
        keeper.tool("write", &json!({"file_path": path, "content": "changed"}));
    }

    session.end();
    canaries.assert_untouched();
    target.assert_untouched();
}

/// Beside the eight: what has no end, or never answers, is an error of the tool that reads it.
#[test]
fn files_without_an_end_are_refused_by_the_file_tools() {
    needs_root!();
    let _host = host::shared();
    let mut session = Session::start(create_sandbox::Rootfs::Host(HostRootfs {}));
    let keeper = &mut session.keeper;
    let made = keeper.bash("cd /workspace && mkfifo fifo && truncate -s 1T sparse && ln -s /proc/kmsg log");
    assert_eq!(made.code(), Some(0), "{made:?}");

    for path in ["/workspace/fifo", "/workspace/sparse", "/workspace/log", "/proc/kmsg", "/dev/zero", "/dev/ptmx"] {
        for (tool, input) in [
            ("read", json!({"file_path": path})),
            ("edit", json!({"file_path": path, "old_string": "a", "new_string": "b"})),
        ] {
            let (text, is_error) = keeper.tool(tool, &input).answer().expect("an answer");
            assert!(is_error, "{tool} {path}: {text}");
        }
    }
    let works = keeper.tool("write", &json!({"file_path": "/workspace/alive", "content": "yes"}));
    assert!(matches!(works.answer(), Some((_, false))), "{works:?}");
    session.end();
}

/// Case 8: the same while the workload exchanges a directory for a link under the tools' hands.
#[test]
fn file_tools_are_not_led_out_by_a_link_that_changes_meanwhile() {
    needs_root!();
    let _host = host::shared();
    let target = Target::new();
    let mut session = Session::start(create_sandbox::Rootfs::Directory("allowed".to_owned()));
    let keeper = &mut session.keeper;
    let argv = [PROBER, "flip", "/workspace/race", target.path().to_str().expect("UTF-8")];
    let argv = argv.map(|argument| argument.as_bytes().to_vec()).to_vec();
    keeper.start(start_call::Work::Exec(Program { argv, ..Program::default() }), 0).expect("the call is taken");
    let path = "/workspace/race/real/kept";

    let mut done = [0, 0];
    let mut refused = 0;
    for round in 0..5000 {
        let calls = [
            ("write", json!({"file_path": path, "content": format!("round {round}\n")})),
            ("edit", json!({"file_path": path, "old_string": "round", "new_string": "turn"})),
        ];
        for ((tool, input), done) in calls.iter().zip(&mut done) {
            match keeper.tool(tool, input).answer().expect("an answer") {
                (_, false) => *done += 1,
                (_, true) => refused += 1,
            }
        }
        if round >= 50 && done.iter().all(|done| *done > 10) && refused > 10 {
            break;
        }
    }

    session.end();
    target.assert_untouched();
    assert!(done.iter().all(|done| *done > 0), "the tools never met the directory: {done:?}");
    assert!(refused > 0, "the tools never met the link");
}

/// Beside the eight: the root filesystem is never written to, whatever the workload does to its files.
#[test]
fn writes_stay_in_the_sandbox() {
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            sandbox_runner_tests::skip!("{obstacle}");
        }
        let _host = host::shared();
        let rootfs = Rootfs::owned_by(caller.uid());
        let before = rootfs.listing();
        let exec = Exec::in_rootfs(caller, rootfs.path());

        let finished = exec.run([PROBER, "write", "/etc/passwd", "changed"]);

        assert_eq!(finished.code(), 0, "{caller:?}: the sandbox's own root is writable: {}", finished.errors());
        assert_eq!(rootfs.listing(), before, "{caller:?}");
        assert_eq!(
            exec.prober(["read", "/etc/passwd"]).text(),
            "root:x:0:0::/root:/bin/sh\n",
            "{caller:?}: a new sandbox is new"
        );
    }
}
