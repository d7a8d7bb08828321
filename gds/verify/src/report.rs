//! Everything that was found, as JSON and as tables.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};

use crate::claims::{Claim, Verdict};

/// See the module.
#[derive(Debug, Default)]
pub struct Report {
    /// Name and value.
    facts: Vec<(String, String)>,
    claims: Vec<(Claim, Verdict)>,
    figures: Vec<Figure>,
    /// What was not measured, and why.
    missing: Vec<(String, String)>,
    /// Parts that crashed, failed or were stopped: they are among `missing` too.
    pub broken_parts: usize,
    pub elapsed: Duration,
}

#[derive(Debug)]
struct Figure {
    name: String,
    with: String,
    value: f64,
    unit: String,
    beside: Option<(String, f64)>,
}

impl Report {
    /// Takes in a line of a child.
    pub fn take(&mut self, line: &Value) {
        let text = |of: &Value, name: &str| of[name].as_str().unwrap_or_default().to_owned();
        if let Some(fact) = line.get("fact") {
            self.facts.push((text(fact, "name"), text(fact, "value")));
        } else if let Some(missing) = line.get("missing") {
            self.missing
                .push((text(missing, "name"), text(missing, "why")));
        } else if let Some(figure) = line.get("figure") {
            let beside = figure["beside"]
                .as_str()
                .zip(figure["beside_value"].as_f64());
            self.figures.push(Figure {
                name: text(figure, "name"),
                with: text(figure, "with"),
                // JSON has no NaN; what was not a number was written as null.
                value: figure["value"].as_f64().unwrap_or(f64::NAN),
                unit: text(figure, "unit"),
                beside: beside.map(|(name, value)| (name.to_owned(), value)),
            });
        }
    }

    pub fn claim(&mut self, claim: Claim, verdict: Verdict) {
        self.claims.push((claim, verdict));
    }

    pub fn missing(&mut self, what: &str, why: impl Into<String>) {
        self.missing.push((what.to_owned(), why.into()));
    }

    pub fn has_facts(&self) -> bool {
        !self.facts.is_empty()
    }

    fn is_fake(&self) -> bool {
        let fake = |(name, value): &(String, String)| name.ends_with("fake one") && value == "true";
        self.facts.iter().any(fake)
    }

    /// How many claims hold, differ, and cannot be told.
    fn counts(&self) -> [usize; 3] {
        ["holds", "differs", "not checkable here"].map(|word| {
            let same = |(_, verdict): &&(Claim, Verdict)| verdict.word() == word;
            self.claims.iter().filter(same).count()
        })
    }

    /// The whole report.
    pub fn json(&self) -> Value {
        let facts = self
            .facts
            .iter()
            .map(|(name, value)| json!({"name": name, "value": value}));
        let claims = self.claims.iter().map(|(claim, verdict)| {
            json!({"number": claim.number, "title": claim.title, "verdict": verdict.word(), "saw": verdict.text()})
        });
        let figures = self.figures.iter().map(|figure| {
            let (beside, limit) = figure.beside.as_ref().map(|(name, value)| (name, value)).unzip();
            json!({"name": figure.name, "with": figure.with, "value": figure.value, "unit": figure.unit, "beside": beside, "beside_value": limit})
        });
        let missing = self
            .missing
            .iter()
            .map(|(name, why)| json!({"name": name, "why": why}));
        let [holds, differ, unchecked] = self.counts();
        json!({
            "verify": 1,
            "fake_driver": self.is_fake(),
            "elapsed_s": self.elapsed.as_secs_f64(),
            "broken_parts": self.broken_parts,
            "claims_hold": holds, "claims_differ": differ, "claims_not_checkable": unchecked,
            "facts": facts.collect::<Vec<_>>(),
            "claims": claims.collect::<Vec<_>>(),
            "figures": figures.collect::<Vec<_>>(),
            "not_measured": missing.collect::<Vec<_>>(),
        })
    }

    /// For people. A claim that differs is marked `!!`, one that cannot be told `--`.
    pub fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a String does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        if self.is_fake() {
            writeln!(
                out,
                "THE FAKE DRIVER: figures mean nothing here, and claims check it against itself.\n"
            )?;
        }
        for (name, value) in &self.facts {
            writeln!(out, "{name:<44} {value}")?;
        }
        if !self.claims.is_empty() {
            let [holds, differ, unchecked] = self.counts();
            writeln!(
                out,
                "\nclaims: {holds} hold, {differ} differ, {unchecked} not checkable here"
            )?;
        }
        for (claim, verdict) in &self.claims {
            let mark = match verdict {
                Verdict::Holds(_) => "ok",
                Verdict::Differs(_) => "!!",
                Verdict::Unchecked(_) => "--",
            };
            writeln!(
                out,
                "{mark} {:<3} {}\n       {}",
                claim.number,
                claim.title,
                verdict.text()
            )?;
        }
        if !self.figures.is_empty() {
            writeln!(out, "\nfigures")?;
        }
        for figure in &self.figures {
            let beside = figure.beside.as_ref().map(|(name, limit)| {
                format!("  {:.2} x {name} ({})", figure.value / limit, plain(*limit))
            });
            writeln!(
                out,
                "{:<46} {:<38} {:>10} {:<6}{}",
                figure.name,
                figure.with,
                plain(figure.value),
                figure.unit,
                beside.unwrap_or_default()
            )?;
        }
        writeln!(out, "\nnot measured")?;
        for (name, why) in &self.missing {
            writeln!(out, "{name}: {why}")?;
        }
        if self.missing.is_empty() {
            writeln!(out, "nothing is missing")?;
        }
        writeln!(out, "\n{:.0} s in all", self.elapsed.as_secs_f64())
    }
}

/// Three or four digits that say something.
fn plain(value: f64) -> String {
    match value {
        _ if value == 0.0 || value.abs() >= 100.0 => format!("{value:.0}"),
        _ if value.abs() >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}
