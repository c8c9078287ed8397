use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::init::v1::{Bash, CancelMode, NoteKind, OutputMode, StartCall, Stream, outcome::Kind, request, start_call};

use super::slot::Slots;
use super::testing::{Client, TestResult, TestSandbox, bash, patience, scaled};

/// Waits until `path` exists.
fn wait_for_file(path: &Path) {
    let until = Instant::now() + patience();
    while !path.exists() {
        assert!(Instant::now() < until, "{} was not made", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs `command`, waits for its file `ready`, interrupts it.
fn interrupted(sandbox: &TestSandbox, client: &mut Client, command: &str) -> TestResult {
    ended(sandbox, client, command, CancelMode::Interrupt)
}

/// Runs `command`, waits for its file `ready`, cancels it.
fn ended(sandbox: &TestSandbox, client: &mut Client, command: &str, mode: CancelMode) -> TestResult {
    let ready = sandbox.work().join("ready");
    let _ = std::fs::remove_file(&ready);
    let call_id = client.start_bash(&format!("touch '{}'\n{command}", ready.display()));
    wait_for_file(&ready);
    // An interrupt that reaches a subshell which is still being made is another case: that may then let its list go on. This
    // one is meant to reach what comes after the file.
    std::thread::sleep(scaled(Duration::from_millis(60)));
    client.cancel(&call_id, mode);
    client.finish(&call_id)
}

/// The status of an interrupted command, and whether something had to be killed.
fn status(result: &TestResult) -> (i32, bool) {
    match result.kind() {
        Kind::Cancelled(cancelled) => (cancelled.code, cancelled.killed),
        Kind::TimedOut(timed_out) => (timed_out.code, timed_out.killed),
        other => panic!("neither cancelled nor timed out but {other:?}"),
    }
}

fn new_shell(result: &TestResult) -> bool {
    result.has_note(NoteKind::ShellRestarted) || result.has_note(NoteKind::ShellRenewed)
}

#[test]
fn state_survives_from_call_to_call() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    assert_eq!(client.bash("cd /usr; export A=5; x=5; f() { echo f$x; }; alias hi='echo alias'").code(), 0);
    let result = client.bash("pwd; f; sh -c 'echo $A'; hi");
    assert_eq!(result.text(), "/usr\nf5\n5\nalias\n");
    assert_eq!(result.finished.working_directory, "/usr");
    assert_eq!(result.finished.shell_generation, 1);
}

#[test]
fn status_and_output_are_those_of_the_command() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = client.bash("echo hi; echo err >&2; false");
    assert_eq!((result.code(), result.text().as_str()), (1, "hi\nerr\n"));
    let result = client.bash("(exit 4)");
    assert_eq!((result.code(), result.text().as_str()), (4, ""));
    let result = client.bash("no-such-command");
    assert_eq!((result.code(), result.text().as_str()), (127, "bash: no-such-command: command not found\n"));
    assert_eq!(client.bash("").code(), 0);
}

#[test]
fn standard_input_is_at_its_end() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = client.bash("cat; read x; echo $?");
    assert_eq!(result.text(), "1\n");
}

#[test]
fn an_exit_reports_its_status_and_a_new_shell_goes_on_in_the_same_directory() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    client.bash("cd /usr");
    // 124 and 125 are what shells and tools like to use for themselves.
    for code in [7, 0, 124, 125, 255] {
        let result = client.bash(&format!("echo before; exit {code}; echo after"));
        assert_eq!((result.code(), result.text().as_str()), (code, "before\n"));
        assert!(new_shell(&result));
        let result = client.bash("pwd");
        assert_eq!(result.text(), "/usr\n");
        assert!(!new_shell(&result));
    }
}

#[test]
fn a_shell_that_is_replaced_or_killed_is_reported_and_renewed() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = client.bash("exec echo replaced");
    assert_eq!((result.code(), result.text().as_str(), new_shell(&result)), (0, "replaced\n", true));
    let result = client.bash("kill -9 $$");
    assert!(matches!(result.kind(), Kind::Signaled(signaled) if signaled.signal == 9), "{result:?}");
    assert!(new_shell(&result));
    let result = client.bash("set -e; false; echo no");
    assert_eq!((result.code(), result.text().as_str(), new_shell(&result)), (1, "", true));
    assert_eq!(client.bash("echo alive").text(), "alive\n");
}

#[test]
fn what_bash_cannot_parse_is_an_error_and_not_the_end() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    client.bash("x=kept");
    for (command, code, message) in [
        ("if then", 2, "syntax error near unexpected token `then'"),
        ("echo 'abc", 2, "unexpected EOF while looking for matching `''"),
        ("echo \"abc", 2, "unexpected EOF while looking for matching `\"'"),
        ("echo $(", 2, "unexpected EOF"),
        ("for", 2, "syntax error"),
        ("}", 2, "syntax error"),
        ("cat <<END\ntext", 0, "here-document"),
    ] {
        let result = client.bash(command);
        assert_eq!(result.code(), code, "{command}");
        assert!(result.text().contains(message), "{command}: {}", result.text());
        assert_eq!(client.bash("echo $x").text(), "kept\n", "{command}");
    }
}

#[test]
fn errors_that_end_a_script_do_not_end_the_shell() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    client.bash("x=kept");
    for (command, code) in [
        ("exec no-such-program", 127),
        ("set -u; echo $NOPE; echo no", 1),
        ("${NOPE:?gone}; echo no", 1),
        ("set -o posix; ${NOPE:?gone}; echo no", 1),
        ("set -n; (exit 3)", 3),
    ] {
        let result = client.bash(command);
        assert_eq!(result.code(), code, "{command}");
        assert!(!result.text().contains("no\n"), "{command}: {}", result.text());
        assert_eq!(client.bash("echo $x").text(), "kept\n", "{command}");
    }
}

#[test]
fn nothing_of_the_shell_itself_is_in_the_output() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    assert_eq!(client.bash("sleep 0.05 & wait; echo done").text(), "done\n");
    assert_eq!(client.bash("sleep 60 & echo started").text(), "started\n");
    assert_eq!(client.bash("kill %1; wait; exit 0").text(), "");
    assert_eq!(client.bash("PS1='prompt> '; PROMPT_COMMAND='echo prompt'").text(), "");
    assert_eq!(client.bash("echo x").text(), "x\n");
    assert_eq!(client.bash("history").text(), "");
}

#[test]
fn traps_and_options_of_the_user_disturb_nobody_but_the_user() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    for command in
        ["trap 'echo bye' EXIT", "trap 'echo int' INT TERM", "shopt -s extdebug", "set -a", "IFS=:/", "set -f"]
    {
        assert_eq!(client.bash(command).text(), "", "{command}");
        assert_eq!(client.bash("echo still here").text(), "still here\n", "{command}");
    }
    assert_eq!(client.bash("exit 3").text(), "bye\n");
    assert_eq!(client.bash("set -x; :").text(), "++ :\n");
    assert_eq!(client.bash("echo x").text(), "++ echo x\nx\n");
}

#[test]
fn an_interrupt_stops_lists_functions_loops_and_keeps_the_state() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    for command in [
        "sleep 30; touch f",
        "f() { sleep 30; touch f; }; g() { f; touch f; }; g; touch f",
        "while :; do :; done; touch f",
        "for i in 1 2 3; do sleep 30; done; touch f",
        "y=$(sleep 30); touch f",
        "sleep 30 | cat; touch f",
        "sleep 30 & wait; touch f",
        "read y </dev/zero; touch f",
        "(sleep 30; touch f); touch f",
        "sleep 30 && touch f",
        "set -m; sleep 30; touch f",
        "unset x; x=kept; cd /; cd -; sleep 30; touch f",
    ] {
        client.bash("x=kept; cd /usr");
        client.bash(&format!("cd '{}'", sandbox.work().display()));
        let result = interrupted(&sandbox, &mut client, command);
        assert_eq!(status(&result), (130, false), "{command}: {result:?}");
        assert!(!new_shell(&result), "{command}");
        let kept = format!("kept\n{}\n", sandbox.work().display());
        assert_eq!(client.bash("echo $x; pwd; unset x; set +m").text(), kept, "{command}");
        assert!(!sandbox.work().join("f").exists(), "{command} went on after its interrupt");
    }
}

#[test]
fn a_timeout_of_a_command_is_an_interrupt() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    client.bash("x=kept");
    let limit = u64::try_from(scaled(Duration::from_millis(150)).as_millis()).unwrap();
    let result = client.bash_with_timeout("echo partial; sleep 30; touch f", limit);
    assert!(matches!(result.kind(), Kind::TimedOut(timed_out) if timed_out.after_ms == limit), "{result:?}");
    assert_eq!((status(&result), result.text().as_str()), ((130, false), "partial\n"));
    assert_eq!(client.bash("echo $x").text(), "kept\n");
    let result = client.bash_with_timeout("while :; do :; done; touch f", limit);
    assert_eq!((status(&result), new_shell(&result)), ((130, false), false));
    assert_eq!(client.bash("echo $x; pwd").text(), format!("kept\n{}\n", sandbox.work().display()));
    assert!(!sandbox.work().join("f").exists());
}

/// What ignores SIGINT, and has `touch f` behind it in every way that a list can go on.
const DEAF_COMMANDS: &[&str] = &[
    "DEAF; touch f",
    "DEAF; sleep 30; touch f",
    "DEAF\ntouch f",
    "DEAF && touch f",
    "DEAF || touch f",
    "! DEAF; touch f",
    "DEAF || : >f",
    "if DEAF; then touch f; else touch f; fi",
    "while DEAF || :; do touch f; break; done",
    "for i in 1 2 3; do DEAF; touch f; done",
    "f() { DEAF; touch f; }; g() { f; touch f; }; g; touch f",
    "{ DEAF; touch f; } 2>/dev/null; touch f",
    "(DEAF; touch f); touch f",
    "(trap '' INT; sleep 30; touch f); touch f",
    "(trap '' INT TERM; sleep 30; touch f); touch f",
    "y=$(DEAF); touch f",
    "DEAF | cat; touch f",
    "f() { DEAF; touch f; }; eval 'f; touch f'; touch f",
    "set -eu; IFS=:; DEAF; touch f",
];
/// It dies of SIGTERM, or of SIGKILL only.
const DEAF: [&str; 2] = ["sh -c \"trap '' INT; sleep 30\"", "sh -c \"trap '' INT TERM; while :; do sleep 30; done\""];

#[test]
fn nothing_begins_behind_a_command_that_ignores_interrupts_and_the_state_is_kept() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    client.bash("x=kept");
    for mode in [CancelMode::Interrupt, CancelMode::Terminate] {
        for command in DEAF_COMMANDS.iter().flat_map(|command| DEAF.map(|deaf| command.replace("DEAF", deaf))) {
            let result = ended(&sandbox, &mut client, &command, mode);
            let f = sandbox.work().join("f");
            assert!(!f.exists(), "{command} went on after {mode:?}: {result:?}");
            assert!(result.has_note(NoteKind::RestKilled) && !new_shell(&result), "{command}: {result:?}");
            assert_eq!(client.bash("set +eu; unset IFS; echo $x").text(), "kept\n", "{command}");
            assert!(!f.exists(), "{command} went on after its end");
        }
    }
}

#[test]
fn nothing_begins_in_a_shell_that_ignores_interrupts_and_another_one_takes_its_place() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    for mode in [CancelMode::Interrupt, CancelMode::Terminate] {
        for command in [
            "sleep 30; touch f",
            "sleep 30 || touch f",
            "sleep 30 | cat; touch f",
            "f() { sleep 30; touch f; }; g() { f; touch f; }; g; touch f",
            "(sleep 30; touch f); touch f",
            "y=$(sleep 30); touch f",
            "while :; do :; done; touch f",
            "trap '' TERM; sleep 30; touch f",
            "env --default-signal=INT sleep 30; touch f",
            "sleep 30 & wait; touch f",
        ] {
            client.bash("x=lost");
            let result = ended(&sandbox, &mut client, &format!("trap '' INT; {command}"), mode);
            let f = sandbox.work().join("f");
            assert!(!f.exists(), "{command} went on after {mode:?}: {result:?}");
            assert!(status(&result).1 && new_shell(&result), "{command}: {result:?}");
            assert_eq!(client.bash("echo $x; pwd").text(), format!("\n{}\n", sandbox.work().display()), "{command}");
            assert!(!f.exists(), "{command} went on after its end");
        }
    }
}

#[test]
fn an_interrupt_at_any_moment_lets_nothing_begin() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    for round in 0..60 {
        let call_id = client.start_bash("/bin/true; sleep 30; touch f; sleep 30");
        std::thread::sleep(scaled(Duration::from_micros(round * 60)));
        client.cancel(&call_id, CancelMode::Interrupt);
        let result = client.finish(&call_id);
        assert!(!sandbox.work().join("f").exists(), "round {round}: {result:?}");
    }
    assert_eq!(client.bash("echo alive").text(), "alive\n");
}

#[test]
fn signal_that_breaks_off_a_list_does_nothing_between_commands() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let shell = Pid::from_raw(client.bash("x=kept; echo $$").text().trim().parse().unwrap());
    for _ in 0..20 {
        kill(shell, super::shell::LIST_SIGNAL).unwrap();
        let result = client.bash("/bin/true; /bin/true; echo $x");
        assert_eq!((result.code(), result.text().as_str()), (0, "kept\n"));
    }
}

#[test]
fn program_that_has_replaced_the_shell_is_interrupted_and_not_killed() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let command = "exec sh -c 'trap \"echo caught; exit 3\" INT; touch ready; while :; do sleep 0.01; done'";
    let result = interrupted(&sandbox, &mut client, command);
    assert_eq!((status(&result), result.text().as_str()), ((3, false), "caught\n"), "{result:?}");
}

#[test]
fn a_command_that_ignores_interrupts_is_killed_and_the_shell_survives() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    client.bash("x=kept");
    let result = interrupted(&sandbox, &mut client, "sh -c 'trap \"\" INT; sleep 30; sleep 30'; y=1");
    assert!(result.has_note(NoteKind::RestKilled), "{result:?}");
    let result = interrupted(&sandbox, &mut client, "sh -c 'trap \"\" INT TERM; while :; do sleep 30; done'");
    assert!(status(&result).1, "{result:?}");
    assert_eq!(client.bash("echo $x").text(), "kept\n");
}

#[test]
fn a_shell_that_ignores_interrupts_is_ended_in_the_end() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    client.bash("cd /usr; x=lost");
    let result = interrupted(&sandbox, &mut client, "trap '' INT; while :; do :; done");
    assert!(status(&result).1 && new_shell(&result), "{result:?}");
    assert_eq!(client.bash("echo $x; pwd").text(), "\n/usr\n");
}

#[test]
fn a_trap_of_the_user_runs_and_the_list_goes_on_as_in_any_bash() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = interrupted(&sandbox, &mut client, "trap 'echo caught' INT; sleep 30; echo rest");
    assert_eq!(status(&result), (0, false), "{result:?}");
    assert!(result.text().starts_with("caught\n") && result.text().ends_with("caught\nrest\n"), "{result:?}");
    assert_eq!(client.bash("trap -p INT").text(), "trap -- 'echo caught' SIGINT\n");
}

#[test]
fn a_cancel_by_kill_ends_everything_at_once() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call_id = client.start_bash("touch ready; sleep 30 & sleep 30");
    wait_for_file(&sandbox.work().join("ready"));
    client.cancel(&call_id, CancelMode::Kill);
    let result = client.finish(&call_id);
    assert!(status(&result).1 && new_shell(&result), "{result:?}");
    assert_eq!(result.finished.processes_left, 0);
    assert_eq!(client.bash("echo alive").text(), "alive\n");
}

#[test]
fn closing_every_descriptor_ends_the_shell_and_the_command_runs_once() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    for command in [
        "echo x >>count; for n in {3..255}; do eval \"exec $n>&-\"; done",
        "echo x >>count; ulimit -n 5",
        "echo x >>count; for n in {3..255}; do eval \"exec $n>&-\"; done; exec 0<&- 1>&- 2>&-",
    ] {
        let _ = std::fs::remove_file(sandbox.work().join("count"));
        let result = client.bash(command);
        assert!(matches!(result.kind(), Kind::StatusUnknown(_)), "{command}: {result:?}");
        assert!(new_shell(&result));
        assert_eq!(client.bash("cat count").text(), "x\n", "{command}");
    }
}

#[test]
fn redirecting_the_shell_lasts_no_longer_than_the_command() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    for command in ["exec >/dev/null 2>&1", "exec 201>&-", "exec 0<&- 1>&- 2>&-", "exec </dev/zero"] {
        assert_eq!(client.bash(command).code(), 0, "{command}");
        let result = client.bash("echo heard; cat");
        assert_eq!((result.text().as_str(), new_shell(&result)), ("heard\n", false), "{command}");
    }
}

#[test]
fn no_game_with_names_makes_a_command_run_twice() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let count = sandbox.work().join("count");
    for game in [
        "readonly REPLY IFS PWD PS1 PS2 PROMPT_COMMAND",
        "readonly $(compgen -v) 2>/dev/null",
        "alias read=false eval=false printf=false exit=false builtin=false .=false source=false",
        "read() { :; }; eval() { :; }; printf() { :; }; exit() { :; }; source() { :; }; .() { :; }",
        "unalias -a; unset -f read eval",
        "enable -n printf read eval exit",
        "trap 'false' DEBUG; shopt -s extdebug",
        "trap 'exit 0' EXIT; unset PWD",
        "TMOUT=1",
        "set -euo pipefail",
        "exit 125",
        "exit 124",
        "kill -9 $$",
        "exec true",
        "ulimit -n 5",
        "ulimit -f 0; ulimit -u 1",
    ] {
        let _ = std::fs::remove_file(&count);
        let call = client.call(bash(&format!("echo x >>'{}'\n{game}", count.display())));
        client.run(StartCall { timeout_ms: 1500, ..call });
        let again = client.call(bash("echo y >&2"));
        client.run(StartCall { timeout_ms: 1500, ..again });
        assert_eq!(std::fs::read_to_string(&count).unwrap(), "x\n", "{game}");
        let restart = client.call(start_call::Work::Bash(Bash { command: String::new(), restart: true }));
        client.run(restart);
        assert_eq!(client.bash("echo alive").text(), "alive\n", "{game}");
    }
}

#[test]
fn a_shell_without_descriptors_ends_with_the_command_that_took_them() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    client.bash("cd /usr; x=lost");
    let result = client.bash("for n in {20..60}; do eval \"exec $n</dev/null\"; done; ulimit -S -n 20");
    assert!(matches!(result.kind(), Kind::StatusUnknown(_)) && new_shell(&result), "{result:?}");
    let result = client.bash("echo ran; echo $x; pwd");
    assert_eq!((result.text().as_str(), new_shell(&result)), ("ran\n\n/usr\n", false), "{result:?}");
}

#[test]
fn a_command_that_never_began_is_given_to_a_new_shell() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let shell = Pid::from_raw(client.bash("cd /usr; x=lost; echo $$").text().trim().parse().unwrap());
    kill(shell, Signal::SIGSTOP).unwrap();
    let count = sandbox.work().join("count");

    let call_id = client.start_bash(&format!("echo x >>'{}'; echo \"<$x>\"; pwd", count.display()));
    std::thread::sleep(scaled(Duration::from_millis(50)));
    assert!(!count.exists(), "a shell that stands still has run something");
    kill(shell, Signal::SIGKILL).unwrap();
    let result = client.finish(&call_id);

    assert_eq!((result.code(), result.text().as_str()), (0, "<>\n/usr\n"), "{result:?}");
    assert_eq!(std::fs::read_to_string(&count).unwrap(), "x\n");
    assert_eq!(result.finished.shell_generation, 2);
    // It is not the doing of this command.
    assert!(result.has_note(NoteKind::ShellRenewed) && !result.has_note(NoteKind::ShellRestarted), "{result:?}");
}

#[test]
fn a_command_that_two_shells_have_not_begun_never_started() {
    use std::os::unix::fs::PermissionsExt as _;
    // Says that it is ready, takes a command and ends.
    const FORGETFUL: &str = "#!/bin/bash\necho >>starts\nread -r line\neval \"$line\"\nread -r line\nexit 0\n";
    let sandbox = TestSandbox::start_with(|context| {
        let work = String::from_utf8(context.working_directory.clone()).unwrap();
        context.shell_path = Path::new(&work).with_file_name("forgetful");
        std::fs::write(&context.shell_path, FORGETFUL).unwrap();
        std::fs::set_permissions(&context.shell_path, std::fs::Permissions::from_mode(0o755)).unwrap();
    });
    let mut client = sandbox.connect(1);

    let result = client.bash("echo x >>count");

    let Kind::NeverStarted(never) = result.kind() else { panic!("{result:?}") };
    assert_eq!((never.code, never.reason.as_str()), (125, "the shell ended before the command began, twice"));
    assert!(!sandbox.work().join("count").exists());
    assert_eq!(std::fs::read_to_string(sandbox.work().join("starts")).unwrap(), "\n\n");
}

#[test]
fn a_shell_that_died_between_two_commands_is_replaced_and_the_next_result_says_so() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    client.bash("cd /usr; (sleep 0.05; kill -9 $$; echo x >/dev/null) & disown");
    let until = Instant::now() + patience();
    loop {
        let result = client.bash("pwd");
        assert_eq!(result.text(), "/usr\n");
        if new_shell(&result) {
            // It is not the doing of this command.
            assert!(!result.has_note(NoteKind::ShellRestarted), "{result:?}");
            break;
        }
        assert!(Instant::now() < until, "nobody said that the shell is new");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(!new_shell(&client.bash("pwd")));
}

#[test]
fn a_forged_status_is_not_believed_and_ends_the_shell() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = client.bash("printf 'deadbeef 0 /\\0' >/proc/$$/fd/201 2>/dev/null || printf 'deadbeef 0 /\\0' >/proc/$$/fd/1[0-9]; for fd in /proc/$$/fd/*; do case $(readlink $fd) in pipe:*) printf 'deadbeef 0 /\\0' >$fd;; esac; done; sleep 30");
    assert!(matches!(result.kind(), Kind::StatusUnknown(_)), "{result:?}");
    assert!(new_shell(&result));
    assert_eq!(client.bash("echo alive").text(), "alive\n");
}

#[test]
fn a_status_that_nobody_waits_for_ends_the_shell() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    client.bash("x=1");
    let work = sandbox.work();
    client.bash(
        "(while [ ! -e go ]; do sleep 0.01; done; printf 'deadbeef 0 /\\0' >/proc/$$/fd/201; touch done) & disown",
    );
    std::fs::write(work.join("go"), "").unwrap();
    wait_for_file(&work.join("done"));
    let result = client.bash("echo \"<$x>\"");
    assert_eq!((result.text().as_str(), new_shell(&result)), ("<>\n", true));
}

#[test]
fn a_job_that_holds_the_output_does_not_hold_the_call() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = client.bash("(while [ ! -e go ]; do sleep 0.01; done; echo late; touch done) & echo early");
    assert_eq!(result.text(), "early\n");
    assert!(result.finished.processes_left > 0 && result.has_note(NoteKind::ProcessesLeft));
    std::fs::write(sandbox.work().join("go"), "").unwrap();
    wait_for_file(&sandbox.work().join("done"));
    assert_eq!(client.bash("echo newer").text(), "newer\n");
}

#[test]
fn a_job_of_an_older_call_is_not_ended_with_a_newer_one() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let result = client.bash("sleep 30 & echo $!");
    let job = result.text();
    let result = interrupted(&sandbox, &mut client, "sh -c 'trap \"\" INT; sleep 30'");
    assert!(result.finished.outcome.is_some());
    assert_eq!(client.bash(&format!("kill -0 {}; echo $?", job.trim())).text(), "0\n");
    assert_eq!(client.bash("kill %1; wait; echo over").text().lines().last(), Some("over"));
}

#[test]
fn without_cgroups_jobs_are_told_apart_as_well() {
    let sandbox = TestSandbox::start_with(|context| context.slots = Slots::scan());
    let mut client = sandbox.connect(1);
    let result = client.bash("sleep 30 & echo $!");
    assert_eq!(result.finished.processes_left, 1);
    let job = result.text();
    let result = interrupted(&sandbox, &mut client, "sh -c 'trap \"\" INT TERM; sleep 30; sleep 30'");
    assert!(status(&result).1, "{result:?}");
    assert_eq!(client.bash(&format!("kill -0 {}; echo $?", job.trim())).text(), "0\n");
    let result = client.bash("kill %1; wait; echo over");
    assert_eq!((result.text().lines().last(), result.finished.processes_left), (Some("over"), 0));
}

#[test]
fn children_see_three_descriptors() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    // The fourth is the directory that ls itself reads.
    assert_eq!(client.bash("ls /proc/self/fd").text(), "0\n1\n2\n3\n");
    assert_eq!(client.bash("ls /proc/self/fd | cat").text(), "0\n1\n2\n3\n");
    assert_eq!(client.bash("exec ls /proc/self/fd").text(), "0\n1\n2\n3\n");
}

#[test]
fn outputs_can_be_opened_by_name() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    assert_eq!(client.bash("echo a >/dev/stdout; echo b >/dev/stderr").text(), "a\nb\n");
}

#[test]
fn separate_outputs_are_kept_apart() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call = client.call(bash("head -c 10000000 /dev/zero | tr '\\0' x; echo err >&2"));
    let call_id = client.start(StartCall { output_mode: OutputMode::Separate.into(), ..call });
    let result = client.finish_unacknowledged(&call_id);
    assert_eq!(result.bytes(Stream::Stderr), b"err\n");
    let summary = &result.finished.streams[0];
    assert_eq!((summary.total_bytes, summary.head_bytes), (10_000_000, 10_000_000));
    let file = std::fs::read(&summary.spool_path).unwrap();
    assert!(file.len() == 10_000_000 && file.iter().all(|byte| *byte == b'x'));
}

#[test]
fn one_command_at_a_time() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let first = client.start_bash("touch ready; sleep 30");
    wait_for_file(&sandbox.work().join("ready"));
    let call = client.call(bash("echo second"));
    assert_eq!(client.refused(request::Body::StartCall(call)).code, "CALL_BUSY");
    assert_eq!(client.exec(&["echo", "beside"]).text(), "beside\n");
    client.cancel(&first, CancelMode::Interrupt);
    client.finish(&first);
}

#[test]
fn a_restart_begins_in_the_first_directory_with_nothing_set() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    client.bash("cd /usr; x=1");
    let call = client.call(start_call::Work::Bash(Bash { command: "echo \"<$x>\"; pwd".to_owned(), restart: true }));
    let result = client.run(call);
    assert_eq!(result.text(), format!("<>\n{}\n", sandbox.work().display()));
    assert_eq!(result.finished.shell_generation, 2);
    let call = client.call(start_call::Work::Bash(Bash { command: String::new(), restart: true }));
    let result = client.run(call);
    assert_eq!((result.code(), result.finished.shell_generation), (0, 3));
}

#[test]
fn a_directory_that_is_gone_does_not_keep_a_shell_from_starting() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    client.bash("mkdir gone; cd gone; rmdir ../gone");
    client.bash("exit 0");
    let result = client.bash("pwd");
    assert_eq!(result.text(), format!("{}\n", sandbox.work().display()));
}

#[test]
fn without_a_shell_a_command_never_started_and_programs_still_run() {
    let sandbox = TestSandbox::start_with(|context| context.shell_path = "/no/such/bash".into());
    let mut client = sandbox.connect(1);
    let result = client.bash("touch f");
    let Kind::NeverStarted(never) = result.kind() else { panic!("{result:?}") };
    assert_eq!((never.code, never.errno), (125, libc::ENOENT));
    assert_eq!(client.exec(&["true"]).code(), 0);
}

#[test]
fn a_long_command_arrives_whole() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let command = format!("x='{}'; echo ${{#x}}", "y".repeat(100_000));
    assert_eq!(client.bash(&command).text(), "100000\n");
    let command = "# comment\n".repeat(10_000) + "echo \"$LINENO\"\n\n";
    assert_eq!(client.bash(&command).text(), "10001\n");
}

#[test]
fn ten_megabytes_in_one_line_are_complete() {
    let sandbox = TestSandbox::start();
    let mut client = sandbox.connect(1);
    let call = client.call(bash("head -c 10000000 /dev/zero | tr '\\0' z; echo; echo last >&2"));
    let call_id = client.start(call);
    let result = client.finish_unacknowledged(&call_id);
    assert_eq!(result.finished.streams[0].total_bytes, 10_000_006);
    assert_eq!(client.read_output(&call_id, Stream::Stdout, 9_999_998, 100).data, b"zz\nlast\n");
}

#[test]
fn a_running_command_survives_the_loss_of_the_runner() {
    let sandbox = TestSandbox::start();
    let mut first = sandbox.connect(1);
    let call_id = first.start_bash("while [ ! -e go ]; do sleep 0.01; done; x=kept; echo done");
    drop(first);
    let mut second = sandbox.connect(2);
    std::fs::write(sandbox.work().join("go"), "").unwrap();
    assert_eq!(second.finish(&call_id).text(), "done\n");
    assert_eq!(second.bash("echo $x").text(), "kept\n");
}
