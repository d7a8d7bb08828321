//! The claims of `gds/fake-driver/CLAIMS.md`, each tried on the driver that is there.
//!
//! A check runs in a process of its own, since what it tries may crash it, hang it, or break its
//! context for good. Where a check has to show that something is *not yet* done, it holds a
//! stream at a gate (a host function that waits), so that nothing depends on how fast a device is.

mod contexts;
mod files;
mod injected;
mod kernels;
mod loading;
mod memory;
mod pools;
mod streams;
mod virtual_memory;

use std::fmt;
use std::time::Duration;

use crate::config::Config;
use crate::sys::driver::{Answer, Driver};

pub use virtual_memory::make_and_die;

pub(crate) const MIB: usize = 1 << 20;
/// How long a stream is held where something has to be seen waiting.
const HOLD: Duration = Duration::from_millis(200);

/// What came of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The driver does what is claimed: what was seen.
    Holds(String),
    /// It does something else.
    Differs(String),
    /// Why it cannot be told here.
    Unchecked(String),
}

impl Verdict {
    pub fn word(&self) -> &'static str {
        match self {
            Verdict::Holds(_) => "holds",
            Verdict::Differs(_) => "differs",
            Verdict::Unchecked(_) => "not checkable here",
        }
    }

    pub fn text(&self) -> &str {
        match self {
            Verdict::Holds(text) | Verdict::Differs(text) | Verdict::Unchecked(text) => text,
        }
    }

    pub fn parse(word: &str, text: &str) -> Option<Verdict> {
        let text = text.to_owned();
        match word {
            "holds" => Some(Verdict::Holds(text)),
            "differs" => Some(Verdict::Differs(text)),
            "not checkable here" => Some(Verdict::Unchecked(text)),
            _ => None,
        }
    }
}

/// What a check gives: an `Err` is a call that it needed and that failed.
type Outcome = Result<Verdict, String>;

/// One row of `CLAIMS.md`.
#[derive(Clone, Copy)]
pub struct Claim {
    pub number: &'static str,
    pub title: &'static str,
    /// It looks at the free memory of the device: nothing else may run beside it.
    pub alone: bool,
    check: fn(&Config) -> Outcome,
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.number)
    }
}

impl Claim {
    const fn new(
        number: &'static str,
        title: &'static str,
        check: fn(&Config) -> Outcome,
    ) -> Claim {
        Claim {
            number,
            title,
            alone: false,
            check,
        }
    }

    const fn alone(mut self) -> Claim {
        self.alone = true;
        self
    }

    /// Tries it, in this process.
    pub fn check(&self, config: &Config) -> Verdict {
        (self.check)(config)
            .unwrap_or_else(|failed| Verdict::Differs(format!("the check broke off: {failed}")))
    }
}

/// All claims, in the order of `CLAIMS.md`.
pub fn all() -> impl Iterator<Item = Claim> {
    let rooms: [&'static [Claim]; 9] = [
        loading::CLAIMS,
        contexts::CLAIMS,
        memory::CLAIMS,
        virtual_memory::CLAIMS,
        streams::CLAIMS,
        pools::CLAIMS,
        kernels::CLAIMS,
        files::CLAIMS,
        injected::CLAIMS,
    ];
    rooms.into_iter().flatten().copied()
}

/// `Holds` or `Differs`, with what was seen.
fn verdict(holds: bool, saw: impl Into<String>) -> Outcome {
    Ok(match holds {
        true => Verdict::Holds(saw.into()),
        false => Verdict::Differs(saw.into()),
    })
}

fn unchecked(why: impl Into<String>) -> Outcome {
    Ok(Verdict::Unchecked(why.into()))
}

/// The driver, initialised, with the primary context of device 0 current in this thread.
pub(crate) fn open(config: &Config) -> Result<Driver, String> {
    let driver = Driver::load(&config.driver)?;
    driver.init().named("cuInit")?;
    let context = driver.retain().named("cuDevicePrimaryCtxRetain")?;
    driver.set_current(context).named("cuCtxSetCurrent")?;
    Ok(driver)
}

/// An answer of the driver as a sentence.
pub(crate) trait Named<T> {
    fn named(self, call: &str) -> Result<T, String>;
    /// The code.
    fn code(&self) -> i32;
}

impl<T> Named<T> for Answer<T> {
    fn named(self, call: &str) -> Result<T, String> {
        self.map_err(|code| format!("{call} answered {code}"))
    }

    fn code(&self) -> i32 {
        self.as_ref().err().copied().unwrap_or(0)
    }
}
