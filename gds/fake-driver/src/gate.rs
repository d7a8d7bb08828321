//! The gate every call passes: it is counted, a rule may make it fail, and it is refused before
//! `cuInit`, in a forked child, in a host callback, and without a current context.
//!
//! A rule reads `NAME@N=EFFECT` (the N-th matching call from now on) or `NAME@N+=EFFECT` (that one
//! and all later ones). `NAME` is a function without its version suffix, or `*` for any. Effects:
//!
//! | effect | what the call does |
//! |---|---|
//! | `2` | answers that code, known or not; of `cuFileRead`: the negative of a code from 5001 on, else −1 with it as errno |
//! | `sticky:700` | answers it, as does every later call in the context |
//! | `hang` | never returns |
//! | `errno:5` | of `cuFileRead`: −1 and errno |
//! | `raw:-5` | of `cuFileRead`: that number |
//! | `short:4096` | of `cuFileRead`: reads so many bytes at most, with success |
//!
//! A call that fails by rule has done nothing, except the calls that give something back (frees,
//! destroys, deregistrations): these do their work and then answer the code, as the driver does
//! when it reports an earlier failure late.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use crate::codes::{Answer, INVALID_CONTEXT, NOT_INITIALIZED, NOT_PERMITTED};
use crate::settings;
use crate::state;
use crate::violations::violation;

/// What a rule does to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    Code(i32),
    Sticky(i32),
    Hang,
    Errno(i32),
    Raw(i64),
    Short(u64),
}

#[derive(Debug)]
struct Rule {
    /// `None`: any.
    name: Option<String>,
    nth: u64,
    onwards: bool,
    effect: Effect,
    seen: u64,
}

impl Rule {
    fn parse(text: &str) -> Option<Rule> {
        let (name, rest) = text.trim().split_once('@')?;
        let (nth, effect) = rest.split_once('=')?;
        let (nth, onwards) = match nth.strip_suffix('+') {
            Some(nth) => (nth, true),
            None => (nth, false),
        };
        let nth = nth.parse().ok().filter(|nth| *nth > 0)?;
        let name = (name != "*").then(|| name.to_owned());
        Some(Rule {
            name,
            nth,
            onwards,
            effect: parse_effect(effect)?,
            seen: 0,
        })
    }

    fn hits(&mut self, name: &str) -> bool {
        if self.name.as_deref().is_some_and(|mine| mine != name) {
            return false;
        }
        self.seen += 1;
        self.seen == self.nth || (self.onwards && self.seen > self.nth)
    }
}

fn parse_effect(text: &str) -> Option<Effect> {
    if text == "hang" {
        return Some(Effect::Hang);
    }
    let Some((kind, number)) = text.split_once(':') else {
        return text.parse().ok().map(Effect::Code);
    };
    match kind {
        "sticky" => number.parse().ok().map(Effect::Sticky),
        "errno" => number.parse().ok().map(Effect::Errno),
        "raw" => number.parse().ok().map(Effect::Raw),
        "short" => number.parse().ok().map(Effect::Short),
        _ => None,
    }
}

fn parse_rules(text: &str) -> Option<Vec<Rule>> {
    text.split(',')
        .filter(|rule| !rule.trim().is_empty())
        .map(Rule::parse)
        .collect()
}

#[derive(Default)]
struct Gate {
    rules: Vec<Rule>,
    counts: BTreeMap<&'static str, u64>,
}

static GATE: LazyLock<Mutex<Gate>> = LazyLock::new(|| Mutex::new(Gate::of_environment()));

impl Gate {
    fn of_environment() -> Gate {
        let text = &settings::from_environment().fail;
        let Some(rules) = parse_rules(text) else {
            settings::refuse("FAIL", text)
        };
        Gate {
            rules,
            counts: BTreeMap::new(),
        }
    }
}

/// Adds rules; false when they cannot be read.
pub(crate) fn add_rules(text: &str) -> bool {
    let Some(rules) = parse_rules(text) else {
        return false;
    };
    GATE.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .rules
        .extend(rules);
    true
}

/// Forgets all rules.
pub(crate) fn clear_rules() {
    GATE.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .rules
        .clear();
}

/// How often each function was called.
pub(crate) fn counts() -> BTreeMap<&'static str, u64> {
    GATE.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .counts
        .clone()
}

/// Counts and rules as at the start of the process.
pub(crate) fn reset() {
    *GATE.lock().unwrap_or_else(PoisonError::into_inner) = Gate::of_environment();
    INITIALISED_BY.store(0, Ordering::SeqCst);
}

/// Counts the call and answers what a rule says about it. Hangs here if it says so.
pub(crate) fn pass(name: &'static str) -> Option<Effect> {
    let effect = {
        let mut gate = GATE.lock().unwrap_or_else(PoisonError::into_inner);
        *gate.counts.entry(name).or_default() += 1;
        // Every rule counts the call; the first that hits decides.
        let hits: Vec<Effect> = gate
            .rules
            .iter_mut()
            .filter_map(|rule| rule.hits(name).then_some(rule.effect))
            .collect();
        hits.first().copied()
    };
    if effect == Some(Effect::Hang) {
        loop {
            std::thread::sleep(Duration::from_secs(3600));
        }
    }
    effect
}

/// The process that called `cuInit`; 0 before.
static INITIALISED_BY: AtomicI32 = AtomicI32::new(0);

/// Notes that this process has called `cuInit`.
pub(crate) fn initialise() {
    INITIALISED_BY.store(std::process::id() as i32, Ordering::SeqCst);
}

/// True in the child of a fork after `cuInit`. Checked before any lock, which the fork may have
/// left taken.
pub(crate) fn is_forked() -> bool {
    let by = INITIALISED_BY.load(Ordering::SeqCst);
    by != 0 && by != std::process::id() as i32
}

fn is_initialised() -> bool {
    INITIALISED_BY.load(Ordering::SeqCst) == std::process::id() as i32
}

thread_local! {
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
    /// The calling thread's stack of contexts; the last is current.
    static CONTEXTS: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// Runs a host function of a stream: driver calls from inside it are refused.
pub(crate) fn in_callback(run: impl FnOnce()) {
    IN_CALLBACK.set(true);
    run();
    IN_CALLBACK.set(false);
}

/// The thread's contexts.
pub(crate) fn with_contexts<T>(change: impl FnOnce(&mut Vec<u64>) -> T) -> T {
    CONTEXTS.with_borrow_mut(change)
}

/// The context and device a call works in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Here {
    pub(crate) context: u64,
    pub(crate) device: usize,
}

/// The calling thread's current context.
pub(crate) fn here() -> Result<Here, i32> {
    let context = with_contexts(|all| all.last().copied()).ok_or(INVALID_CONTEXT)?;
    let state = state::lock();
    let found = state.contexts.get(&context).ok_or(INVALID_CONTEXT)?;
    match found.sticky {
        Some(code) => Err(code),
        None => Ok(Here {
            context,
            device: found.device,
        }),
    }
}

/// What a rule demands of a driver call, or nothing.
fn demanded(name: &'static str) -> Answer {
    match pass(name) {
        None => Ok(()),
        Some(Effect::Code(code) | Effect::Errno(code)) => Err(code),
        Some(Effect::Raw(code)) => Err(code as i32),
        Some(Effect::Sticky(code)) => {
            with_contexts(|all| all.last().copied()).and_then(|context| {
                state::lock()
                    .contexts
                    .get_mut(&context)
                    .map(|found| found.sticky = Some(code))
            });
            Err(code)
        }
        Some(Effect::Short(_) | Effect::Hang) => Ok(()),
    }
}

fn ready(name: &str) -> Answer {
    if is_forked() || !is_initialised() {
        return Err(NOT_INITIALIZED);
    }
    if IN_CALLBACK.get() {
        violation(format!("{name} called from a host function of a stream"));
        return Err(NOT_PERMITTED);
    }
    Ok(())
}

fn code(answer: Answer) -> i32 {
    answer.err().unwrap_or(0)
}

/// A call that needs nothing, not even `cuInit`.
pub(crate) fn any_time(name: &'static str, run: impl FnOnce() -> Answer) -> i32 {
    if is_forked() {
        return NOT_INITIALIZED;
    }
    code(demanded(name).and_then(|()| run()))
}

/// A call that needs `cuInit`.
pub(crate) fn initialised(name: &'static str, run: impl FnOnce() -> Answer) -> i32 {
    if is_forked() {
        return NOT_INITIALIZED;
    }
    code(
        demanded(name)
            .and_then(|()| ready(name))
            .and_then(|()| run()),
    )
}

/// A call that needs a healthy current context.
pub(crate) fn in_context(name: &'static str, run: impl FnOnce(Here) -> Answer) -> i32 {
    initialised(name, || run(here()?))
}

/// A call in a context that gives something back: done even when a rule makes it fail.
pub(crate) fn giving_back(name: &'static str, run: impl FnOnce(Here) -> Answer) -> i32 {
    giving_back_any_time(name, || run(here()?))
}

/// The same for what is given back without a current context.
pub(crate) fn giving_back_any_time(name: &'static str, run: impl FnOnce() -> Answer) -> i32 {
    if is_forked() {
        return NOT_INITIALIZED;
    }
    let demanded = demanded(name);
    code(ready(name).and_then(|()| run()).and(demanded))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_hits_its_call_once_or_from_then_on() {
        let mut once = Rule::parse("cuMemCreate@2=2").unwrap();
        let hits: Vec<bool> = (0..4).map(|_| once.hits("cuMemCreate")).collect();
        assert_eq!(hits, [false, true, false, false]);

        let mut onwards = Rule::parse("*@3+=sticky:700").unwrap();
        let hits: Vec<bool> = ["cuInit", "cuMemFree", "cuMemMap", "cuInit"]
            .map(|name| onwards.hits(name))
            .into();
        assert_eq!(hits, [false, false, true, true]);
        assert_eq!(onwards.effect, Effect::Sticky(700));
    }

    #[test]
    fn a_rule_that_makes_no_sense_is_refused() {
        for text in [
            "cuInit",
            "cuInit@0=1",
            "cuInit@x=1",
            "cuInit@1=",
            "cuInit@1=soft:3",
            "@",
            "a@1=short:-1",
        ] {
            assert!(parse_rules(text).is_none(), "{text}");
        }
        assert_eq!(
            parse_rules("cuInit@1=1, cuFileRead@1+=raw:-5 ,").map(|rules| rules.len()),
            Some(2)
        );
    }
}
