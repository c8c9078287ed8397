//! A spawner without a sandbox, for tests and measurements: processes of this machine, as this user.
//!
//! Written without `unsafe`: a small bash line puts the descriptors into place that the standard library cannot.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::unistd::Pid;

use crate::init::spawner::{Program, SpawnError, SpawnRequest, Spawned, Spawner};
use crate::sys::child::open_pidfd;

/// Starts ordinary processes. Built-in tools become a script that echoes their input.
#[derive(Debug, Default)]
pub(crate) struct LocalSpawner;

impl Spawner for LocalSpawner {
    fn spawn(&mut self, request: SpawnRequest) -> Result<Spawned, SpawnError> {
        let (argv, environment) = match request.program {
            Program::Execute { argv, environment } => (argv, environment),
            Program::Tool { name, input_json } => {
                let script = format!("printf '%s %s' {name} \"$0\"; echo diagnosis >&2");
                (vec![b"/bin/sh".to_vec(), b"-c".to_vec(), script.into_bytes(), input_json], Vec::new())
            }
            Program::Worker => (worker_of_the_tests()?, Vec::new()),
        };
        let words: Vec<std::ffi::OsString> = argv.into_iter().map(std::ffi::OsString::from_vec).collect();
        let mut command = match &request.slot {
            _ if request.terminal => {
                let mut command = Command::new("/usr/bin/setsid");
                command.arg("--ctty").args(&words);
                command
            }
            _ => {
                // A session of its own, because an interactive bash signals its whole process group while it starts.
                // Whoever runs the tests may have SIGINT ignored, which children inherit and bash cannot undo.
                let mut command = Command::new("/usr/bin/setsid");
                command.args([
                    "/usr/bin/env",
                    "--default-signal=INT,QUIT,TERM",
                    "/bin/bash",
                    "--norc",
                    "-c",
                    PLACE,
                    "place",
                ]);
                command.arg(slot_file(request.slot.as_ref()));
                command.args(&words);
                command
            }
        };
        // What execve would say, found out before: the child is a bash by then.
        let missing = words.first().and_then(|program| find_program(program, &environment).err());
        command.env_clear();
        for variable in &environment {
            let at = variable.iter().position(|byte| *byte == b'=').unwrap_or(variable.len());
            let (name, value) = variable.split_at(at);
            command.env(
                std::ffi::OsString::from_vec(name.to_vec()),
                std::ffi::OsString::from_vec(value.get(1..).unwrap_or_default().to_vec()),
            );
        }
        let directory = PathBuf::from(std::ffi::OsString::from_vec(request.working_directory));
        let has_directory = directory.is_dir();
        command.current_dir(directory);
        let mut status = None;
        for (descriptor, number) in request.descriptors {
            match number {
                0 => drop(command.stdin(Stdio::from(descriptor))),
                1 => drop(command.stdout(Stdio::from(descriptor))),
                2 => drop(command.stderr(Stdio::from(descriptor))),
                number => status = Some((number, descriptor)),
            }
        }
        if let Some((number, descriptor)) = status {
            // The shell: its outputs are /dev/null, so descriptor 1 can carry another one to its number.
            command.stdout(Stdio::from(descriptor)).env("PLACE_NUMBER", number.to_string());
        }
        let mut start_error = File::from(request.start_error);
        let errno = |error: &std::io::Error| error.raw_os_error().unwrap_or(libc::EIO);
        let failed = match missing {
            Some(errno) => Some(errno),
            None => match command.spawn() {
                Ok(child) => return spawned(child.id()),
                Err(error) => Some(errno(&error)),
            },
        };
        if let Some(errno) = failed {
            let number = if has_directory { errno } else { -errno };
            let _ = start_error.write_all(&number.to_ne_bytes());
        }
        let child = Command::new("/bin/sh").args(["-c", "exit 127"]).spawn();
        let child = child.map_err(|error| SpawnError::Fork(nix::Error::from_raw(errno(&error))))?;
        spawned(child.id())
    }
}

/// The worker of the tests is a test of this very program that does not end by itself; a measurement has none.
fn worker_of_the_tests() -> Result<Vec<Vec<u8>>, SpawnError> {
    if !cfg!(test) {
        return Err(SpawnError::Fork(nix::Error::ENOSYS));
    }
    let program = std::env::current_exe().map_err(|_| SpawnError::Fork(nix::Error::ENOENT))?;
    let words = ["--exact", "init::tool_worker_tests::worker", "--ignored"].map(|word| word.as_bytes().to_vec());
    Ok(std::iter::once(program.into_os_string().into_vec()).chain(words).collect())
}

/// Moves itself into the slot, puts the status descriptor into place, becomes the program.
const PLACE: &str = r#"
[ -z "$1" ] || echo $$ > "$1" || exit 99
shift
for PLACE_NUMBER_OPEN in /proc/$$/fd/*; do
  PLACE_NUMBER_OPEN=${PLACE_NUMBER_OPEN##*/}
  if [ "$PLACE_NUMBER_OPEN" -gt 2 ]; then eval "exec $PLACE_NUMBER_OPEN>&-"; fi
done
if [ -n "$PLACE_NUMBER" ]; then eval "exec $PLACE_NUMBER>&1 1>/dev/null"; fi
unset PLACE_NUMBER PLACE_NUMBER_OPEN _ SHLVL PWD OLDPWD
exec "$@"
"#;

fn slot_file(slot: Option<&OwnedFd>) -> String {
    use std::os::fd::AsRawFd as _;
    let Some(slot) = slot else { return String::new() };
    let link = std::fs::read_link(format!("/proc/self/fd/{}", slot.as_raw_fd())).unwrap_or_default();
    link.join("cgroup.procs").to_string_lossy().into_owned()
}

fn find_program(program: &std::ffi::OsStr, environment: &[Vec<u8>]) -> Result<(), i32> {
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::PermissionsExt as _;
    let check = |path: PathBuf| match std::fs::metadata(path) {
        Ok(found) if found.is_file() && found.permissions().mode() & 0o111 != 0 => Ok(()),
        Ok(_) => Err(libc::EACCES),
        Err(error) => Err(error.raw_os_error().unwrap_or(libc::EIO)),
    };
    if program.as_bytes().contains(&b'/') {
        return check(PathBuf::from(program));
    }
    let path = environment.iter().find_map(|variable| variable.strip_prefix(b"PATH=")).unwrap_or_default();
    let mut result = Err(libc::ENOENT);
    for directory in path.split(|byte| *byte == b':') {
        let found = check(PathBuf::from(std::ffi::OsStr::from_bytes(directory)).join(program));
        if found.is_ok() {
            return found;
        }
        if found == Err(libc::EACCES) {
            result = found;
        }
    }
    result
}

fn spawned(pid: u32) -> Result<Spawned, SpawnError> {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX));
    let pidfd = open_pidfd(pid).map_err(SpawnError::Fork)?;
    Ok(Spawned { pid, pidfd })
}
