//! What calls have done when they fail: only a driver whose failures can be chosen shows it.

use super::{Claim, Outcome, unchecked};
use crate::config::Config;

pub(super) const CLAIMS: &[Claim] = &[
    Claim::new("I1", "a call that fails has done nothing", needs_failures),
    Claim::new("I2", "a call that gives back has done it", needs_failures),
    Claim::new("I3", "a wait that fails has not waited", needs_failures),
];

fn needs_failures(_: &Config) -> Outcome {
    unchecked("a real driver's failures cannot be brought about one call at a time")
}
