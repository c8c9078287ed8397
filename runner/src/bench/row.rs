//! One measured goal and its two forms: a line for people, an object for programs. Pure.

use serde_json::{Value, json};

use super::sample::Summary;

/// Above this share of the processors used by others a ratio is an accident, so none is given.
pub const FOREIGN_LIMIT_PERCENT: f64 = 15.0;

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Milliseconds; less is better.
    Milliseconds,
    /// Memory; less is better.
    Kibibytes,
    /// Sandboxes in a second; more is better.
    PerSecond,
    /// Megabytes in a second; more is better.
    MegabytesPerSecond,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Milliseconds => "ms",
            Self::Kibibytes => "KiB",
            Self::PerSecond => "/s",
            Self::MegabytesPerSecond => "MB/s",
        }
    }

    fn more_is_better(self) -> bool {
        matches!(self, Self::PerSecond | Self::MegabytesPerSecond)
    }
}

/// Which number of two summaries a ratio is taken of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statistic {
    /// Medians.
    Median,
    /// 99th percentiles.
    Tail,
}

impl Statistic {
    fn of(self, summary: &Summary) -> f64 {
        match self {
            Self::Median => summary.p50,
            Self::Tail => summary.p99,
        }
    }
}

/// What another figure is to ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Somebody who does the same.
    Peer,
    /// What nobody can do with less on this machine, or what stands in for it.
    Floor,
}

/// A figure ours is compared with; the reason when there is none.
pub type Measured = Result<Summary, String>;

/// Somebody else who did the same.
#[derive(Debug, Clone, PartialEq)]
pub struct Other {
    /// Who.
    pub name: String,
    /// What it is to us.
    pub role: Role,
    /// How long it took.
    pub measured: Measured,
    /// The goal: how our figure may relate to this one; `None` when it is only shown.
    pub limit: Option<f64>,
}

/// What can be said about a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Every limit holds.
    Met,
    /// At least one does not.
    Missed,
    /// Others disturbed the measurement.
    Void,
    /// Something with a limit could not be measured, and nothing that was measured is missed.
    NotMeasured,
    /// There is no limit: the row is only shown.
    Shown,
}

impl Verdict {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::Missed => "missed",
            Self::Void => "void",
            Self::NotMeasured => "not measured",
            Self::Shown => "shown",
        }
    }
}

/// One goal.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Id in the table of goals.
    pub goal: String,
    /// What was measured.
    pub what: String,
    /// Of every figure in this row.
    pub unit: Unit,
    /// Of the ratios.
    pub statistic: Statistic,
    /// Our figure; the reason when there is none.
    pub ours: Measured,
    /// Peers and floors.
    pub others: Vec<Other>,
    /// Share of the processors that others used meanwhile, in percent.
    pub foreign_percent: f64,
    /// What a reader has to know besides.
    pub note: String,
}

impl Row {
    /// A goal with our figure.
    pub fn new(goal: &str, what: impl Into<String>, unit: Unit, ours: Option<Summary>) -> Self {
        Self {
            goal: goal.to_owned(),
            what: what.into(),
            unit,
            statistic: Statistic::Median,
            ours: ours.ok_or_else(|| "there are no samples".to_owned()),
            others: Vec::new(),
            foreign_percent: 0.0,
            note: String::new(),
        }
    }

    /// A goal that could not be measured.
    pub fn unmeasured(goal: &str, what: &str, reason: &str) -> Self {
        Self { ours: Err(reason.to_owned()), ..Self::new(goal, what, Unit::Milliseconds, None) }
    }

    /// With a peer.
    #[must_use]
    pub fn peer(self, name: &str, measured: Measured, limit: impl Into<Option<f64>>) -> Self {
        self.other(Role::Peer, name, measured, limit.into())
    }

    /// With a floor.
    #[must_use]
    pub fn floor(self, name: &str, measured: Measured, limit: impl Into<Option<f64>>) -> Self {
        self.other(Role::Floor, name, measured, limit.into())
    }

    fn other(mut self, role: Role, name: &str, measured: Measured, limit: Option<f64>) -> Self {
        self.others.push(Other { name: name.to_owned(), role, measured, limit });
        self
    }

    /// With a note.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    /// Whether others disturbed the measurement too much.
    pub fn is_void(&self) -> bool {
        self.foreign_percent > FOREIGN_LIMIT_PERCENT
    }

    fn ratio(&self, other: &Other) -> Option<f64> {
        let theirs = self.statistic.of(other.measured.as_ref().ok()?);
        let ours = self.statistic.of(self.ours.as_ref().ok()?);
        (!self.is_void() && theirs > 0.0).then(|| ours / theirs)
    }

    /// `None` when there is no limit or no ratio.
    fn holds(&self, other: &Other) -> Option<bool> {
        let (ratio, limit) = (self.ratio(other)?, other.limit?);
        Some(if self.unit.more_is_better() { ratio >= limit } else { ratio <= limit })
    }

    /// What can be said.
    pub fn verdict(&self) -> Verdict {
        if self.ours.is_err() {
            return Verdict::NotMeasured;
        }
        if self.is_void() {
            return Verdict::Void;
        }
        let limited = || self.others.iter().filter(|other| other.limit.is_some());
        if limited().any(|other| self.holds(other) == Some(false)) {
            Verdict::Missed
        } else if limited().any(|other| self.holds(other).is_none()) {
            Verdict::NotMeasured
        } else if limited().next().is_some() {
            Verdict::Met
        } else {
            Verdict::Shown
        }
    }

    /// The object for programs.
    pub fn to_json(&self) -> Value {
        let other = |found: &Other| {
            json!({
                "name": found.name,
                "role": match found.role { Role::Peer => "peer", Role::Floor => "floor" },
                "p50": found.measured.as_ref().ok().map(|summary| summary.p50),
                "p99": found.measured.as_ref().ok().map(|summary| summary.p99),
                "count": found.measured.as_ref().ok().map(|summary| summary.count),
                "not_measured": found.measured.as_ref().err(),
                "ratio": self.ratio(found),
                "limit": found.limit,
                "met": self.holds(found),
            })
        };
        json!({
            "goal": self.goal,
            "what": self.what,
            "unit": self.unit.name(),
            "statistic": match self.statistic { Statistic::Median => "p50", Statistic::Tail => "p99" },
            "better": if self.unit.more_is_better() { "more" } else { "less" },
            "verdict": self.verdict().name(),
            "ours": self.ours.as_ref().ok(),
            "not_measured": self.ours.as_ref().err(),
            "others": self.others.iter().map(other).collect::<Vec<_>>(),
            "foreign_cpu_percent": self.foreign_percent,
            "note": self.note,
        })
    }

    /// The line for people.
    pub fn to_line(&self) -> String {
        let ours = match &self.ours {
            Ok(ours) => format!("{} / {} {}", number(ours.p50), number(ours.p99), self.unit.name()),
            Err(reason) => format!("not measured: {reason}"),
        };
        let verdict = match self.verdict() {
            Verdict::Missed => "MISSED",
            Verdict::Void => "VOID",
            verdict => verdict.name(),
        };
        let others: String = self.others.iter().map(|other| self.against(other)).collect();
        let note = if self.note.is_empty() { String::new() } else { format!(" [{}]", self.note) };
        let foreign = self.foreign_percent;
        format!("{:<4} {verdict:<12} {}: {ours}{others}; others {foreign:.0} %{note}", self.goal, self.what)
    }

    fn against(&self, other: &Other) -> String {
        let sign = if self.unit.more_is_better() { ">=" } else { "<=" };
        let goal = other.limit.map_or_else(String::new, |limit| format!(" (goal {sign} {limit}x)"));
        let kind = match other.role {
            Role::Peer => "",
            Role::Floor => "floor ",
        };
        let figure = match &other.measured {
            Ok(summary) => {
                let ratio = self.ratio(other).map_or_else(|| "void".to_owned(), |ratio| format!("{ratio:.2}x"));
                format!("{}: {ratio}", number(self.statistic.of(summary)))
            }
            Err(reason) => format!("not measured: {reason}"),
        };
        format!("; {kind}{} {figure}{goal}", other.name)
    }
}

fn number(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(p50: f64) -> Summary {
        Summary { p50, p99: 2.0 * p50, count: 30 }
    }

    fn row(ours: f64, unit: Unit) -> Row {
        Row::new("G0", "something", unit, Some(summary(ours)))
    }

    fn missing() -> Measured {
        Err("runc: not installed".to_owned())
    }

    #[test]
    fn goal_is_met_only_when_every_limit_holds() {
        let faster = row(3.0, Unit::Milliseconds).peer("bwrap", Ok(summary(6.0)), 0.75);

        assert_eq!(faster.verdict(), Verdict::Met);
        assert_eq!(faster.clone().floor("floor", Ok(summary(1.0)), 1.5).verdict(), Verdict::Missed);
        assert_eq!(faster.floor("floor", Ok(summary(1.0)), None).verdict(), Verdict::Met);
    }

    #[test]
    fn rates_have_to_reach_their_limit() {
        assert_eq!(row(90.0, Unit::PerSecond).peer("bwrap", Ok(summary(100.0)), 1.0).verdict(), Verdict::Missed);
        assert_eq!(row(110.0, Unit::PerSecond).peer("bwrap", Ok(summary(100.0)), 1.0).verdict(), Verdict::Met);
    }

    #[test]
    fn disturbed_run_has_no_ratio_and_is_never_met() {
        let row = Row { foreign_percent: 15.1, ..row(3.0, Unit::Milliseconds).peer("bwrap", Ok(summary(6.0)), 0.75) };

        let value = row.to_json();

        assert_eq!((&value["verdict"], &value["others"][0]["ratio"]), (&json!("void"), &Value::Null));
        assert_eq!((&value["others"][0]["met"], &value["ours"]["p50"]), (&Value::Null, &json!(3.0)));
        assert!(row.to_line().contains("VOID"), "{}", row.to_line());
    }

    #[test]
    fn absent_peer_with_a_limit_is_named_and_leaves_the_goal_unproven() {
        let unproven =
            row(3.0, Unit::Milliseconds).floor("floor", Ok(summary(6.0)), 0.75).peer("runc", missing(), 0.12);

        assert_eq!(unproven.verdict(), Verdict::NotMeasured);
        assert!(unproven.to_line().contains("runc not measured: runc: not installed (goal <= 0.12x)"));
        assert_eq!(unproven.to_json()["others"][1]["not_measured"], json!("runc: not installed"));
        assert_eq!(row(3.0, Unit::Milliseconds).peer("runc", missing(), None).verdict(), Verdict::Shown);
    }

    #[test]
    fn absent_peer_does_not_hide_a_missed_limit() {
        let missed = row(3.0, Unit::Milliseconds).peer("runc", missing(), 0.12).floor("floor", Ok(summary(1.0)), 1.5);

        assert_eq!(missed.verdict(), Verdict::Missed);
    }

    #[test]
    fn goal_without_our_own_figure_is_not_measured() {
        let row = Row::unmeasured("G0", "something", "there is no tree");

        assert_eq!(row.verdict(), Verdict::NotMeasured);
        assert!(row.to_line().contains("not measured: there is no tree"), "{}", row.to_line());
    }

    #[test]
    fn tail_goals_compare_tails() {
        let floor = Summary { p50: 1.0, p99: 6.0, count: 3 };
        let mut tail = row(3.0, Unit::Milliseconds).floor("floor", Ok(floor), 1.0);
        tail.statistic = Statistic::Tail;

        assert_eq!(tail.verdict(), Verdict::Met);
        tail.statistic = Statistic::Median;
        assert_eq!(tail.verdict(), Verdict::Missed);
    }
}
