//! A command in a terminal: made inside the sandbox, used from a terminal of the host or over the link, and never a way to
//! that of the host.
//!
//! The outer side is a pseudo terminal of the host as its controlling one, around the built command.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::dev::Session;
use sandbox_runner_tests::daemon::{Daemon, Options, within};
use sandbox_runner_tests::prober::Verdict;
use sandbox_runner_tests::rootfs::Rootfs;
use sandbox_runner_tests::runner::{Caller, Exec, finish, scaled};
use sandbox_runner_tests::terminal::Terminal;
use sandbox_runner_tests::{host, needs_root, skip};
use sha2::{Digest, Sha256};

const PATIENCE: Duration = Duration::from_secs(60);

/// A command in a terminal that somebody types into.
fn interactive(caller: Caller, script: &str) -> (Exec, Terminal) {
    let exec = Exec::new(caller).flag("-it").variable("TERM", "vt100");
    let terminal = Terminal::start(caller, &exec.command(["/bin/sh", "-c", script]), 100, 30);
    (exec, terminal)
}

#[test]
fn all_three_descriptors_are_a_controlling_terminal_made_inside() {
    needs_root!();
    let _host = host::shared();
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            skip!("{obstacle}");
        }
        let script = "test -t 0 && test -t 1 && test -t 2 && tty && stty size && echo kind $TERM; \
                      echo by the usual name > /dev/tty; echo by its own name > $(tty); exit 7";
        let (_exec, mut terminal) = interactive(caller, script);

        assert_eq!(terminal.end(), 7, "{caller:?}: {}", terminal.text());
        let wanted = "/dev/pts/0\r\n30 100\r\nkind vt100\r\nby the usual name\r\nby its own name\r\n";
        assert_eq!(terminal.text(), wanted, "{caller:?}");
        assert!(terminal.is_restored(), "{caller:?}");
    }
}

#[test]
fn keys_interrupt_stop_and_continue_commands_of_a_shell_with_job_control() {
    needs_root!();
    let _host = host::shared();
    let (_exec, mut terminal) = interactive(Caller::Root, "PS1='ready> ' exec bash --noprofile --norc -i");
    terminal.wait_for("ready> ");

    terminal.type_in(b"sleep 600.75\r");
    let _ = host::wait_for_sandbox("600.75", PATIENCE);
    terminal.type_in(b"\x03");
    terminal.wait_for("ready> ");
    terminal.type_in(b"echo status $?\r");
    terminal.wait_for("status 130");
    terminal.type_in(b"sleep 600.25\r");
    let _ = host::wait_for_sandbox("600.25", PATIENCE);
    terminal.type_in(b"\x1a");
    terminal.wait_for("Stopped");
    terminal.type_in(b"kill %1; bg >/dev/null; wait %1; echo ended $?\r");
    terminal.wait_for("ended 143");
    terminal.type_in(b"exit 9\r");

    assert_eq!(terminal.end(), 9, "{}", terminal.text());
    assert!(terminal.is_restored());
}

#[test]
fn size_follows_the_window() {
    needs_root!();
    let _host = host::shared();
    let script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done";
    let (_exec, mut terminal) = interactive(Caller::Root, script);
    terminal.wait_for("ready");

    terminal.resize(132, 50);
    terminal.wait_for("50 132");
    for step in 1..20 {
        terminal.resize(100 + step, 40);
    }
    terminal.wait_for("40 119");
    terminal.type_in(b"\x03");

    assert_eq!(terminal.end(), 130, "{}", terminal.text());
    assert!(terminal.is_restored());
}

#[test]
fn terminal_of_the_host_is_restored_however_the_command_ends() {
    needs_root!();
    let _host = host::shared();
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGHUP, 143), (Signal::SIGQUIT, 143), (Signal::SIGINT, 130)]
    {
        let (_exec, mut terminal) = interactive(Caller::Root, "echo ready; exec sleep 600");
        terminal.wait_for("ready");
        assert!(!terminal.is_restored(), "it was never in raw mode");
        kill(Pid::from_raw(terminal.pid().cast_signed()), signal).expect("own child");
        assert_eq!(terminal.end(), code, "{signal}: {}", terminal.text());
        assert!(terminal.is_restored(), "{signal}");
    }
    let ends: [(&str, &[&str], i32); 3] = [
        ("500ms", &["sleep", "600"], 124),
        ("60s", &["no-such-program"], 127),
        ("60s", &["/bin/sh", "-c", "kill -SEGV $$"], 139),
    ];
    for (timeout, command, code) in ends {
        let exec = Exec::new(Caller::Root).flag("-it").option("--timeout", timeout);
        let mut terminal = Terminal::start(Caller::Root, &exec.command(command.iter().copied()), 80, 24);
        assert_eq!(terminal.end(), code, "{command:?}: {}", terminal.text());
        assert!(terminal.is_restored(), "{command:?}");
    }
}

#[test]
fn input_that_is_not_read_waits_and_arrives_whole() {
    needs_root!();
    let _host = host::shared();
    // More than the terminals of both sides and everything between them hold.
    const LENGTH: usize = 1_500_000;
    let script = format!("stty raw -echo; echo ready; sleep 1; head -c {LENGTH} | sha256sum; stty sane");
    let (_exec, mut terminal) = interactive(Caller::Root, &script);
    terminal.wait_for("ready");
    let keys: Vec<u8> = (0..LENGTH).map(|at| u8::try_from(at * 7 % 251).expect("below 256")).collect();

    terminal.type_in(&keys);
    let digest: String = Sha256::digest(&keys).iter().map(|byte| format!("{byte:02x}")).collect();

    terminal.wait_for(&digest);
    assert_eq!(terminal.end(), 0, "{}", terminal.text());
}

#[test]
fn typed_end_of_file_ends_the_input_and_nothing_else() {
    needs_root!();
    let _host = host::shared();
    let (_exec, mut terminal) =
        interactive(Caller::Root, "stty -echo; echo ready; cat; echo over; read line; echo $line");
    terminal.wait_for("ready");

    terminal.type_in(b"first\r\x04");
    terminal.wait_for("over");
    terminal.type_in(b"second\r");

    terminal.wait_for("second");
    assert_eq!(terminal.end(), 0, "{}", terminal.text());
}

#[test]
fn without_a_terminal_to_type_into_the_command_says_so_or_runs_with_the_usual_size() {
    needs_root!();
    let _host = host::shared();
    let typed = Exec::new(Caller::Root).flag("-it").run(["true"]);
    assert_eq!(typed.code(), 125);
    assert!(typed.errors().contains("standard input is not a terminal; leave out -i"), "{}", typed.errors());

    // Nobody types: whoever reads finds the end, as with any command that has no input.
    let alone =
        Exec::new(Caller::Root).flag("-t").run(["sh", "-c", "stty size; cat; echo $TERM; echo late >&2; exit 3"]);
    assert_eq!((alone.code(), alone.text().as_str()), (3, "24 80\r\nxterm\r\nlate\r\n"), "{}", alone.errors());

    let json = Exec::new(Caller::Root).flag("-t").flag("--json").run(["true"]);
    assert_eq!(json.code(), 125);
    assert!(json.errors().contains("'--json'"), "{}", json.errors());
}

#[test]
fn output_of_a_terminal_is_whole_though_the_command_ends_at_once() {
    needs_root!();
    let _host = host::shared();
    let exec = Exec::new(Caller::Root).flag("-t");
    let command = exec.command(["seq", "200000"]);

    let finished = finish(command, PATIENCE).expect("the command ends");

    let wanted: String = (1..=200_000).map(|number| format!("{number}\r\n")).collect();
    assert_eq!((finished.code(), finished.stdout.len()), (0, wanted.len()));
    assert_eq!(Sha256::digest(&finished.stdout), Sha256::digest(&wanted));
}

/// Number of the controlling terminal, 0 for none (`proc_pid_stat(5)`).
fn controlling_terminal(pid: u32) -> i32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it lives");
    let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
    fields.split_whitespace().nth(4).expect("tty_nr").parse().expect("a number")
}

/// No process of a sandbox has the terminal of the host, by a descriptor, as its controlling one or by being in its session,
/// whether or not the command has a terminal of its own.
#[test]
fn no_terminal_of_the_host_is_inside() {
    needs_root!();
    let _host = host::shared();
    for (flag, token) in [("-i", "600.375"), ("-it", "600.625")] {
        let exec = Exec::new(Caller::Root).flag(flag);
        let script = format!("echo ready; sleep {token}; :");
        let mut terminal = Terminal::start(Caller::Root, &exec.command(["/bin/sh", "-c", &script]), 80, 24);
        terminal.wait_for("ready");
        let outer = fs::metadata(format!("/proc/self/fd/{}", terminal.slave().as_raw_fd())).expect("our terminal");
        assert_ne!(controlling_terminal(terminal.pid()), 0, "the command itself has none: nothing would be shown");

        let sandbox = host::wait_for_sandbox(token, PATIENCE);
        let spawner = sandbox.spawner.expect("a spawner");
        let mut looked_at = 0;
        for pid in host::family_of(sandbox.process_1) {
            for entry in fs::read_dir(format!("/proc/{pid}/fd")).expect("root may look").flatten() {
                let Ok(found) = fs::metadata(entry.path()) else { continue };
                assert_ne!(found.dev(), outer.dev(), "{flag}: {pid} has {} open", entry.path().display());
                looked_at += 1;
            }
            let session = nix::unistd::getsid(Some(Pid::from_raw(pid.cast_signed()))).expect("it lives");
            assert_ne!(session.as_raw(), terminal.pid().cast_signed(), "{flag}: {pid} is in the session of the host");
        }
        assert!(looked_at > 10, "{looked_at}");
        for keeper in [sandbox.process_1, spawner] {
            assert_eq!(controlling_terminal(keeper), 0, "{flag}");
        }
        assert_eq!(controlling_terminal(sandbox.workload) != 0, flag == "-it", "{flag}");
        kill(Pid::from_raw(terminal.pid().cast_signed()), Signal::SIGTERM).expect("own child");
        assert_eq!(terminal.end(), 143, "{flag}: {}", terminal.text());
    }
}

/// With a terminal, what is refused without one stays refused: typing into it by TIOCSTI, terminals of others.
#[test]
fn attacks_on_terminals_are_refused_in_one() {
    needs_root!();
    let _host = host::shared();
    for caller in Caller::BOTH {
        if let Some(obstacle) = caller.obstacle() {
            skip!("{obstacle}");
        }
        let rootfs = Rootfs::owned_by(caller.uid());
        let rows = Exec::in_rootfs(caller, rootfs.path()).flag("-t").prober(["only", "D05"]).rows();
        assert!(rows.iter().any(|row| row.id == "D05.tiocsti"), "{rows:?}");
        // The terminal of the call is in the sandbox's own devpts, so it is one more than without.
        let broken: Vec<_> = rows.iter().filter(|row| row.id != "D05" && row.result != Verdict::Held).collect();
        assert!(broken.is_empty(), "{caller:?}: {broken:?}");
    }
    let script = "perl -e 'my $key = \"x\"; print ioctl(STDIN, 0x5412, $key) ? \"typed\" : \"refused: $!\"'";
    let typed = Exec::new(Caller::Root).flag("-t").run(["sh", "-c", script]);
    assert_eq!(typed.text(), "refused: Operation not permitted", "{}", typed.errors());
}

/// Prints numbered lines for three seconds, then reads one.
const TALKATIVE: &str = "stty -echo; stty size; for i in $(seq 30); do seq -f \"$i-%06.0f\" 2000; sleep 0.1; done; \
                         read line; echo read $line; stty size; exit 5";

fn talk() -> String {
    let lines = (1..=30).flat_map(|i| (1..=2000).map(move |line| format!("{i}-{line:06}\r\n")));
    format!("30 100\r\n{}read by the next one\r\n50 132\r\n", lines.collect::<String>())
}

fn in_terminal(script: &str, columns: u32, rows: u32) -> pb::call::Input {
    pb::call::Input::Exec(pb::ExecInput {
        argv: ["/bin/sh", "-c", script].map(|word| word.as_bytes().to_vec()).to_vec(),
        terminal: Some(pb::TerminalSize { columns, rows }),
        ..Default::default()
    })
}

/// Types until it is taken: what was sent to a runner that has not found the call yet is refused.
async fn type_in(session: &Session, call_id: &str, keys: &[u8]) {
    let deadline = Instant::now() + scaled(PATIENCE);
    while !matches!(
        tokio::time::timeout(scaled(Duration::from_secs(1)), session.stdin(call_id, 0, keys, false)).await,
        Ok(Ok(_))
    ) {
        assert!(Instant::now() < deadline, "{call_id} takes no input");
    }
}

/// F-02: the runner is killed while a command in a terminal prints: no gap in its output, and the next one goes on with
/// its window and its keys.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn terminal_survives_its_runner_with_every_byte() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("terminal").await;
    session.send("talks", in_terminal(TALKATIVE, 100, 30));
    within("start", session.started("talks")).await.expect("started");
    tokio::time::sleep(Duration::from_millis(700)).await;

    daemon.kill_runner();
    tokio::time::sleep(Duration::from_millis(500)).await;
    daemon.start_runner().await;
    session.resize("talks", 132, 50);
    type_in(&session, "talks", b"by the next one\r").await;
    // Again, in case the first one came before the call was found.
    session.resize("talks", 132, 50);

    let talked = within("talks", session.outcome("talks")).await.expect("an end");
    let stream = &talked.streams[&i32::from(pb::OutputStream::Terminal)];
    assert_eq!((stream.bytes.len(), stream.holes.len()), (talk().len(), 0));
    assert_eq!(Sha256::digest(&stream.bytes), Sha256::digest(talk()));
    assert_eq!(talked.streams.len(), 1, "a terminal is one stream");
    assert!(talked.message.recovered, "nobody is told that another runner saw its beginning");
    assert_eq!(talked.message.outcome.and_then(|outcome| outcome.kind), Some(Kind::Exited(pb::Exited { code: 5 })));
    within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    daemon.end_with_nothing_left();
}

/// Keys and sizes of one call are applied in the order in which they were sent, though nobody waited for an answer between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_and_sizes_arrive_in_order_over_the_link() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("order").await;
    session.send("typed", in_terminal("stty raw -echo; head -c 240; stty size; exit 0", 0, 0));
    within("start", session.started("typed")).await.expect("started");
    let keys: String = (0..60).map(|number| format!("{number:04}")).collect();

    for size in 1..30 {
        session.resize("typed", 100 + size, 40);
    }
    for (at, piece) in (0_u64..).step_by(4).zip(keys.as_bytes().chunks(4)) {
        // Sent, and not waited for.
        tokio::select! {
            biased;
            _ = session.stdin("typed", at, piece, false) => {}
            () = std::future::ready(()) => {}
        }
    }

    let typed = within("typed", session.outcome("typed")).await.expect("an end");
    let stream = &typed.streams[&i32::from(pb::OutputStream::Terminal)];
    let printed = String::from_utf8_lossy(&stream.bytes);
    // Before it is what the terminal itself has echoed until the command has switched that off.
    assert!(printed.ends_with(&format!("{keys}40 129\n")), "{printed}");
    within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    daemon.end_with_nothing_left();
}
