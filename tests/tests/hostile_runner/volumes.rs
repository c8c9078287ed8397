//! Directories of the host that the policy names: written only where policy and request both say so, and worth nothing more
//! than their files.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};

use proto::launch::v1::{CreateSandbox, Volume, create_sandbox};
use sandbox_runner_tests::keeper::Keeper;
use sandbox_runner_tests::launcher::{Connection, Launcher, Setup, plain_sandbox};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::rootfs::{PROBER, Rootfs, shared_directory};
use tempfile::TempDir;

use crate::{assert_refusal, kill, list, refused};

/// A launcher with the volumes `open`, which the policy lets sandboxes write, `shown`, which it does not, and `linked`, whose
/// place is a link in the image. In each is a file that anybody may write.
struct Shelf {
    launcher: Launcher,
    _rootfs: Rootfs,
    volumes: TempDir,
    elsewhere: TempDir,
}

const NAMES: [&str; 3] = ["open", "shown", "linked"];

impl Shelf {
    fn new() -> Self {
        let (rootfs, volumes, elsewhere) =
            (Rootfs::with_prober(), shared_directory("volumes"), shared_directory("elsewhere"));
        let mut sections = String::new();
        for name in NAMES {
            let path = volumes.path().join(name);
            fs::create_dir(&path).expect("a directory of our own");
            fs::set_permissions(&path, Permissions::from_mode(0o777)).expect("chmod");
            fs::write(path.join("file"), "kept").expect("a file of our own");
            fs::set_permissions(path.join("file"), Permissions::from_mode(0o666)).expect("chmod");
            sections.push_str(&format!(
                "[volumes.{name}]\npath = \"{}\"\ntarget = \"/mnt/{name}\"\nwritable = {}\n\n",
                path.display(),
                name != "shown",
            ));
        }
        fs::create_dir(rootfs.path().join("mnt")).expect("a directory of our own");
        fs::set_permissions(elsewhere.path(), Permissions::from_mode(0o777)).expect("chmod");
        symlink(elsewhere.path(), rootfs.path().join("mnt/linked")).expect("a link of the image");
        let mut setup = Setup::new(2, rootfs.path());
        setup.policy = setup.policy.replacen("[profiles", &format!("{sections}[profiles"), 1);
        let launcher = setup.start().expect("the launcher starts");
        Self { launcher, _rootfs: rootfs, volumes, elsewhere }
    }

    fn connect(&self) -> Connection {
        Connection::greeted(&self.launcher.setup().socket()).expect("served")
    }

    fn sandbox(volumes: &[(&str, bool)]) -> CreateSandbox {
        let volume = |(name, read_only): &(&str, bool)| Volume { name: (*name).to_owned(), read_only: *read_only };
        let root = create_sandbox::Rootfs::Directory("allowed".to_owned());
        let volumes = volumes.iter().map(volume).collect();
        CreateSandbox { rootfs: Some(root), volumes, ..plain_sandbox("shelf") }
    }

    fn enter(&self, connection: &Connection, volumes: &[(&str, bool)]) -> Keeper {
        let created = connection.create(Self::sandbox(volumes)).expect("a sandbox");
        let [_, run] = self.launcher.setup().directories();
        Keeper::connect(&run.join("sandboxes").join(created.socket_name)).expect("process 1 answers")
    }

    fn content(&self, name: &str) -> String {
        fs::read_to_string(self.volumes.path().join(name).join("file")).expect("the file is there")
    }
}

/// Tries to change the file of a volume and to make another, and says which of the two had an effect.
fn changes(keeper: &mut Keeper, name: &str) -> [bool; 2] {
    ["file", "made"].map(|file| {
        let path = format!("/mnt/{name}/{file}");
        let written = keeper.exec(&[PROBER, "write", &path, "changed"]).code() == Some(0);
        let read = keeper.exec(&[PROBER, "read", &path]).text() == "changed";
        assert_eq!(written, read, "{path}");
        written
    })
}

#[test]
fn volume_is_written_only_where_policy_and_request_allow_it() {
    needs_root!();
    let shelf = Shelf::new();
    let connection = shelf.connect();
    for (name, read_only, expected) in [
        ("open", true, [false; 2]),
        ("shown", true, [false; 2]),
        ("shown", false, [false; 2]),
        ("open", false, [true; 2]),
    ] {
        let mut keeper = shelf.enter(&connection, &[(name, read_only)]);

        let shown = keeper.exec(&[PROBER, "read", &format!("/mnt/{name}/file")]);
        assert_eq!(shown.text(), "kept", "{name} is not there: {shown:?}");
        let changed = changes(&mut keeper, name);

        kill(&connection, "shelf");
        assert_eq!(changed, expected, "{name}, read-only asked for: {read_only}");
        let kept = if expected[0] { "changed" } else { "kept" };
        assert_eq!(shelf.content(name), kept, "{name}, read-only asked for: {read_only}");
    }
}

/// Both volumes in one sandbox, so that the attributes of one are not those of the other.
#[test]
fn volumes_beside_each_other_keep_their_own_rights_and_give_none() {
    needs_root!();
    let shelf = Shelf::new();
    let connection = shelf.connect();
    let mut keeper = shelf.enter(&connection, &[("open", false), ("shown", false)]);

    let table = keeper.exec(&[PROBER, "read", "/proc/self/mountinfo"]).text();
    let changed = ["open", "shown"].map(|name| changes(&mut keeper, name));

    kill(&connection, "shelf");
    assert_eq!(changed, [[true; 2], [false; 2]]);
    for (name, first) in [("open", "rw"), ("shown", "ro")] {
        let line = table.lines().find(|line| line.contains(&format!(" /mnt/{name} "))).expect("a mounted volume");
        let options: Vec<&str> = line.split(' ').nth(5).expect("options").split(',').collect();
        for option in [first, "nosuid", "nodev"] {
            assert!(options.contains(&option), "no {option} in {line}");
        }
    }
}

/// What is mounted on a link would be wherever the image wants it.
#[test]
fn image_with_a_link_in_place_of_a_volume_is_refused() {
    needs_root!();
    let shelf = Shelf::new();
    let connection = shelf.connect();

    let failure = refused(&connection, Shelf::sandbox(&[("linked", false)]));

    assert_refusal(&failure, &["HOST_ERROR"], "/mnt/linked");
    assert_eq!(list(&connection), []);
    assert_eq!(fs::read_dir(shelf.elsewhere.path()).expect("listed").count(), 0);
}
