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
    /// Sandboxes in a second; more is better.
    PerSecond,
    /// Megabytes in a second; more is better.
    MegabytesPerSecond,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Milliseconds => "ms",
            Self::PerSecond => "/s",
            Self::MegabytesPerSecond => "MB/s",
        }
    }

    fn more_is_better(self) -> bool {
        !matches!(self, Self::Milliseconds)
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

/// Somebody else who did the same.
#[derive(Debug, Clone, PartialEq)]
pub struct Other {
    /// Who.
    pub name: String,
    /// How long it took.
    pub summary: Summary,
    /// The goal: how our figure may relate to this one; `None` when it is only shown.
    pub limit: Option<f64>,
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
    /// Our figure; `None` when it could not be measured.
    pub ours: Option<Summary>,
    /// A peer.
    pub peer: Option<Other>,
    /// The floor, or what stands in for it.
    pub floor: Option<Other>,
    /// Share of the processors that others used meanwhile, in percent.
    pub foreign_percent: f64,
    /// What a reader has to know besides.
    pub note: String,
}

impl Row {
    /// A goal without figures yet.
    pub fn new(goal: &str, what: impl Into<String>, unit: Unit) -> Self {
        Self {
            goal: goal.to_owned(),
            what: what.into(),
            unit,
            statistic: Statistic::Median,
            ours: None,
            peer: None,
            floor: None,
            foreign_percent: 0.0,
            note: String::new(),
        }
    }

    /// With a peer, if it was measured.
    #[must_use]
    pub fn peer(mut self, name: &str, summary: Option<Summary>, limit: Option<f64>) -> Self {
        self.peer = summary.map(|summary| Other { name: name.to_owned(), summary, limit });
        self
    }

    /// With a floor, if it was measured.
    #[must_use]
    pub fn floor(mut self, name: &str, summary: Option<Summary>, limit: Option<f64>) -> Self {
        self.floor = summary.map(|summary| Other { name: name.to_owned(), summary, limit });
        self
    }

    /// Whether others disturbed the measurement too much.
    pub fn is_void(&self) -> bool {
        self.foreign_percent > FOREIGN_LIMIT_PERCENT
    }

    fn ratio(&self, other: Option<&Other>) -> Option<f64> {
        let pick = |summary: &Summary| match self.statistic {
            Statistic::Median => summary.p50,
            Statistic::Tail => summary.p99,
        };
        let theirs = pick(&other?.summary);
        (!self.is_void() && theirs > 0.0).then(|| self.ours.as_ref().map(pick).map(|ours| ours / theirs)).flatten()
    }

    fn holds(&self, other: Option<&Other>) -> Option<bool> {
        let (ratio, limit) = (self.ratio(other)?, other?.limit?);
        Some(if self.unit.more_is_better() { ratio >= limit } else { ratio <= limit })
    }

    /// Whether every limit holds; `None` when there is none or when it is not known.
    pub fn met(&self) -> Option<bool> {
        let limited = [self.peer.as_ref(), self.floor.as_ref()]
            .into_iter()
            .filter(|other| other.is_some_and(|o| o.limit.is_some()));
        limited.map(|other| self.holds(other)).reduce(|all, next| Some(all? && next?)).flatten()
    }

    /// The object for programs.
    pub fn to_json(&self) -> Value {
        let other = |other: Option<&Other>| {
            other.map(|found| {
                json!({
                    "name": found.name,
                    "p50": found.summary.p50,
                    "p99": found.summary.p99,
                    "count": found.summary.count,
                    "ratio": self.ratio(Some(found)),
                    "limit": found.limit,
                    "met": self.holds(Some(found)),
                })
            })
        };
        let leading = self.peer.as_ref().filter(|peer| peer.limit.is_some()).or(self.floor.as_ref());
        json!({
            "goal": self.goal,
            "what": self.what,
            "unit": self.unit.name(),
            "statistic": match self.statistic { Statistic::Median => "p50", Statistic::Tail => "p99" },
            "better": if self.unit.more_is_better() { "more" } else { "less" },
            "figure": self.ratio(leading),
            "limit": leading.and_then(|other| other.limit),
            "met": self.met(),
            "ours": self.ours,
            "peer": other(self.peer.as_ref()),
            "floor": other(self.floor.as_ref()),
            "foreign_cpu_percent": self.foreign_percent,
            "void": self.is_void(),
            "note": self.note,
        })
    }

    /// The line for people.
    pub fn to_line(&self) -> String {
        let number = |value: f64| if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.3}") };
        let ours = self.ours.map_or_else(
            || "not measured".to_owned(),
            |ours| format!("{} / {} {}", number(ours.p50), number(ours.p99), self.unit.name()),
        );
        let sign = if self.unit.more_is_better() { ">=" } else { "<=" };
        let against = |other: Option<&Other>, kind: &str| {
            other.map_or_else(String::new, |found| {
                let theirs = match self.statistic {
                    Statistic::Median => found.summary.p50,
                    Statistic::Tail => found.summary.p99,
                };
                let ratio = self.ratio(Some(found)).map_or_else(|| "void".to_owned(), |ratio| format!("{ratio:.2}x"));
                let goal = found.limit.map_or_else(String::new, |limit| format!(" (goal {sign} {limit}x)"));
                format!("; {kind}{} {}: {ratio}{goal}", found.name, number(theirs))
            })
        };
        let verdict = match self.met() {
            _ if self.is_void() => "VOID",
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "no verdict",
        };
        let note = if self.note.is_empty() { String::new() } else { format!(" [{}]", self.note) };
        format!(
            "{:<4} {:<10} {}: {ours}{}{}; others {:.0} %{note}",
            self.goal,
            verdict,
            self.what,
            against(self.peer.as_ref(), ""),
            against(self.floor.as_ref(), "floor "),
            self.foreign_percent,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(p50: f64) -> Option<Summary> {
        Some(Summary { p50, p99: 2.0 * p50, count: 30 })
    }

    fn row(ours: f64, unit: Unit) -> Row {
        Row { ours: summary(ours), ..Row::new("G0", "something", unit) }
    }

    #[test]
    fn goal_is_met_only_when_every_limit_holds() {
        let faster = row(3.0, Unit::Milliseconds).peer("bwrap", summary(6.0), Some(0.75));

        assert_eq!(faster.met(), Some(true));
        assert_eq!(faster.clone().floor("floor", summary(1.0), Some(1.5)).met(), Some(false));
        assert_eq!(faster.floor("floor", summary(1.0), None).met(), Some(true));
    }

    #[test]
    fn rates_have_to_reach_their_limit() {
        assert_eq!(row(90.0, Unit::PerSecond).peer("bwrap", summary(100.0), Some(1.0)).met(), Some(false));
        assert_eq!(row(110.0, Unit::PerSecond).peer("bwrap", summary(100.0), Some(1.0)).met(), Some(true));
    }

    #[test]
    fn disturbed_run_has_no_ratio_and_no_verdict() {
        let row = Row { foreign_percent: 15.1, ..row(3.0, Unit::Milliseconds).peer("bwrap", summary(6.0), Some(0.75)) };

        let value = row.to_json();

        assert_eq!((&value["figure"], &value["met"], &value["void"]), (&Value::Null, &Value::Null, &json!(true)));
        assert_eq!(value["ours"]["p50"], json!(3.0));
        assert!(row.to_line().contains("VOID"), "{}", row.to_line());
    }

    #[test]
    fn unmeasured_peer_gives_no_verdict() {
        assert_eq!(row(3.0, Unit::Milliseconds).peer("runc", None, Some(0.12)).met(), None);
    }

    #[test]
    fn tail_goals_compare_tails() {
        let mut tail =
            row(3.0, Unit::Milliseconds).floor("floor", Some(Summary { p50: 1.0, p99: 6.0, count: 3 }), Some(1.0));
        tail.statistic = Statistic::Tail;

        assert_eq!(tail.met(), Some(true));
        tail.statistic = Statistic::Median;
        assert_eq!(tail.met(), Some(false));
    }
}
