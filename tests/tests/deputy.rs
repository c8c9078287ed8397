//! Confused deputy: the runner and the launcher work with names that the image or the workload chose. None of these names
//! may lead them to a file of the host.
#![forbid(unsafe_code)]

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use sandbox_runner_tests::host::{self, Snapshot};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::{PROBER, Rootfs, shared_directory};
use sandbox_runner_tests::runner::{Caller, Exec, Finished};
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

/// Case 4: a working directory named by the caller that leads out through the image or through proc.
#[test]
fn given_working_directory_never_leads_out() {
    needs_root!();
    let _host = host::shared();
    let target = Target::new();
    let rootfs = Rootfs::with_link("escape", target.path());
    let kept = target.path().join("kept");
    for name in [
        "/escape",
        "/escape/..",
        "/proc/1/root",
        "/proc/1/cwd",
        "/proc/self/fd/7",
        "/proc/self/root/..",
        "../../../..",
        "/../..",
    ] {
        let exec = Exec::in_rootfs(Caller::Root, rootfs.path()).option("--workdir", name);

        let relative = exec.prober(["read", "kept"]);
        let by_path = exec.prober(["read", kept.strip_prefix("/").expect("absolute").to_str().expect("UTF-8")]);

        for finished in [relative, by_path] {
            assert_ne!(finished.code(), 0, "{name} leads out: {}", finished.text());
            assert!(!finished.text().contains("untouched"), "{name} leads out");
        }
    }
    target.assert_untouched();
}

/// Case 5: files that are written or bound for every sandbox, replaced by links in the image.
#[test]
fn generated_files_do_not_follow_links_of_the_image() {
    needs_root!();
    let _host = host::shared();
    let target = Target::new();
    let rootfs = Rootfs::with_prober();
    for name in ["hosts", "resolv.conf", "hostname"] {
        symlink(target.path().join(name), rootfs.path().join("etc").join(name)).expect("a link");
    }
    symlink(target.path(), rootfs.path().join("run/sandbox-runner")).expect("a link");

    let finished = Exec::in_rootfs(Caller::Root, rootfs.path()).prober(["read", "/etc/hosts"]);

    assert!(!finished.text().contains("untouched"), "a file of the host is shown inside");
    target.assert_untouched();
}

/// Case 6: output is kept in a directory the sandbox can see; it must not be able to put a link there.
#[test]
fn spool_directory_cannot_be_changed_from_inside() {
    needs_root!();
    let _host = host::shared();
    let rootfs = Rootfs::with_prober();
    let exec = Exec::in_rootfs(Caller::Root, rootfs.path());

    for name in ["/run/sandbox-runner/output/planted", "/run/sandbox-runner/planted"] {
        let finished = exec.prober(["write", name, "x"]);
        // The parent may be an ordinary private directory; the spool itself is not.
        if name.contains("/output/") {
            assert_ne!(finished.code(), 0, "{name} was written");
        }
    }
    let listing = exec.prober(["list", "/run/sandbox-runner"]);
    assert!(!listing.text().contains("sock"), "a socket of the runner is visible inside: {}", listing.text());
}

/// Case 7: what the workload leaves in its tree is removed by a process with rights over it.
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

/// Case 8: the root filesystem and the state directory are names, too.
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
