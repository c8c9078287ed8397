//! The differences between the official worker and ours that are meant, each with what either does and why ours is right.

use crate::compare::{Difference, Scenario};
use crate::transcript::Subject;

/// A difference that is meant.
pub(crate) struct Class {
    pub(crate) name: &'static str,
    /// What the official worker does.
    pub(crate) official: &'static str,
    /// What ours does.
    pub(crate) ours: &'static str,
    /// Why ours is right, or what it lacks.
    pub(crate) why: &'static str,
    /// Whether it is shown by every run, and not by chance.
    pub(crate) always: bool,
    /// Whether both do exactly that.
    pub(crate) fits: fn(&Difference) -> bool,
}

/// At most this many: whoever adds one has to say what it is for.
pub(crate) const MOST: usize = 15;

pub(crate) const CLASSES: &[Class] = &[
    Class {
        name: "exit code",
        official: "shows the output of a command that failed",
        ours: "adds its exit code",
        why: "a model decides by it; the Go worker shows it as well",
        always: true,
        fits: |it| {
            it.is(Scenario::EveryTool, &call(9))
                && it.lines([&answer("error", "out")], [&answer("error", "out\nexit code: 1")])
        },
    },
    Class {
        name: "environment of the worker",
        official: "gives its own environment to commands, but for names that begin with ANTHROPIC_",
        ours: "gives none of it",
        why: "what an operator puts there is not for a model",
        always: true,
        fits: |it| {
            it.is(Scenario::EveryTool, &call(12)) && it.lines([&answer("ok", "1")], [&answer("ok", "(no output)")])
        },
    },
    Class {
        name: "variables of the shell",
        official: "has a new shell for each work item",
        ours: "keeps shell and files for the next message of the session",
        why: "the model has not asked for another shell, and knows nothing of work items",
        always: true,
        fits: |it| {
            let official = answer("ok", "kept\nno variable");
            it.is(Scenario::NextMessage, &call(1)) && it.lines([&official], [&answer("ok", "kept\n1")])
        },
    },
    Class {
        name: "interrupt",
        official: "does not look at it; the command runs to its end",
        ours: "ends the command at once and says so",
        why: "the user has asked for it, and a turn lasts as long as its calls",
        always: true,
        fits: |it| {
            let ours = answer("error", "bash: command cancelled\ninterrupted by user");
            it.is(Scenario::Interrupt, &call(0)) && it.lines([&answer("ok", "done")], [&ours])
        },
    },
    Class {
        name: "stop by an operator",
        official: "lets the command run to its end, and leaves what waits without an answer until somebody interrupts",
        ours: "answers what waits, ends the command, answers it, and gives the item back",
        why: "the documentation says that a call is ended with an error; an unanswered one holds up its session for ever",
        always: true,
        fits: |it| match it.subject {
            Subject::Call { session: 0, call: 0 } => {
                let ours = answer("error", "bash: command cancelled; shell restarted");
                it.scenario == Scenario::Operator && it.lines([&answer("ok", "done")], [&ours])
            }
            Subject::Call { session: 0, call: 1 } => {
                let ours = answer("error", "cancelled before it started; nothing was run");
                it.scenario == Scenario::Operator && it.lines([&answer("ok", "never")], [&ours])
            }
            _ => it.is(Scenario::Operator, &ORDER) && it.lines(["0", "1"], ["1", "0"]),
        },
    },
    Class {
        name: "lost lease",
        official: "lets the command run on, and posts its result",
        ours: "ends the command and posts nothing",
        why: "somebody else has the item and may run the same call",
        always: true,
        fits: |it| match it.subject {
            Subject::Call { session: 0, call: 0 } => {
                it.scenario == Scenario::LostLease && it.lines([&answer("ok", "done")], [])
            }
            Subject::Effects => it.scenario == Scenario::LostLease && it.lines(["done"], []),
            _ => it.is(Scenario::LostLease, &ORDER) && it.lines(["0"], []),
        },
    },
    Class {
        name: "thread that has ended",
        official: "lets its command run on, and posts nothing",
        ours: "ends the command, and posts nothing",
        why: "nobody can hear of it",
        always: true,
        fits: |it| it.is(Scenario::Thread, &Subject::Effects) && it.lines(["late"], []),
    },
    Class {
        name: "rejected token",
        official: "runs the command to its end, cannot post, and runs it again when the item comes with another token",
        ours: "ends the command when a heartbeat is refused, and posts that with the next token",
        why: "a call runs at most once; whose the item is while nothing is accepted, nobody knows",
        always: true,
        fits: |it| {
            let twice =
                |how: &str, text: &str| [posted(how, text, "Unknown", "401"), posted(how, text, "token 1", "200")];
            let [official, ours] = [twice("ok", "done"), twice("error", "bash: command cancelled; shell restarted")];
            let calls = it.official == official && it.ours == ours;
            match it.subject {
                Subject::Effects => it.scenario == Scenario::RejectedToken && it.lines(["ran", "ran"], ["ran"]),
                _ => it.is(Scenario::RejectedToken, &call(0)) && calls,
            }
        },
    },
    Class {
        name: "first heartbeat without an answer",
        official: "serves the session beside it, and posts with a token whose lease it is about to give up",
        ours: "serves nothing before a heartbeat is answered",
        why: "whose the item is, is not known before",
        always: true,
        fits: |it| {
            it.is(Scenario::LostBeat, &call(0))
                && it.lines([&answer("ok", "served")], [&posted("ok", "served", "token 1", "200")])
        },
    },
    Class {
        name: "heartbeat of a session that is over",
        official: "often sees that the session is over before it has sent one",
        ours: "always sends one first",
        why: "nothing slow may come before it",
        always: false,
        fits: |it| {
            let [ack, beat, stop] = [
                "ack by key -> 200",
                "beat after NO_HEARTBEAT by token 0 -> 200",
                "stop {\"force\":true} by token 0 -> 204",
            ];
            it.is(Scenario::NothingToDo, &Subject::Item(1)) && it.lines([ack, stop], [ack, beat, stop])
        },
    },
    Class {
        name: "result whose acknowledgement was lost",
        official: "sends it again, and is refused",
        ours: "has seen it on the stream, and does not",
        why: "the server has it",
        always: false,
        fits: |it| {
            let lost = posted("ok", "one", "token 0", "answer lost");
            it.is(Scenario::LostAnswers, &call(0)) && it.lines([&lost, &posted("ok", "one", "token 0", "400")], [&lost])
        },
    },
    Class {
        name: "skills and memories",
        official: "brings them into the working directory and changed memories back",
        ours: "brings none, and serves the session without them",
        why: "it is not: ours lacks them",
        always: true,
        fits: |it| {
            if it.scenario != Scenario::SkillsAndMemories {
                return false;
            }
            match it.subject {
                Subject::Call { session: 0, call: 0 } => {
                    let missing = "user.tool_result error \"cat: skills/pdf/SKILL.md: No such file or directory\\n";
                    it.official == [answer("ok", "how to25")] && it.ours.len() == 1 && it.ours[0].starts_with(missing)
                }
                Subject::Other => {
                    let writes = ["CreateMemory", "UpdateMemory", "DeleteMemory"];
                    it.lines(
                        writes.map(|write| format!("{write} by token 0 -> 200")).each_ref().map(String::as_str),
                        [],
                    )
                }
                _ => false,
            }
        },
    },
];

const ORDER: Subject = Subject::Order { session: 0 };

fn call(call: usize) -> Subject {
    Subject::Call { session: 0, call }
}

/// The line of an answer that was taken.
fn answer(how: &str, text: &str) -> String {
    posted(how, text, "token 0", "200")
}

fn posted(how: &str, text: &str, by: &str, fate: &str) -> String {
    format!("user.tool_result {how} {} by {by} -> {fate}", serde_json::Value::from(text))
}

impl Difference {
    fn is(&self, scenario: Scenario, subject: &Subject) -> bool {
        self.scenario == scenario && self.subject == *subject
    }

    fn lines<const N: usize, const M: usize>(&self, official: [&str; N], ours: [&str; M]) -> bool {
        self.official == official && self.ours == ours
    }
}
