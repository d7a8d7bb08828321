//! What pins and devices are called.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::str::FromStr;

use super::error::PinError;
use crate::backend::{DeviceInfo, DeviceKind};

const MAX_NAME_BYTES: usize = 128;

/// Names a pin for ever: `p3-9f31c07a`. Never given twice, by another run of the server neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PinId {
    /// Counts the pins of one run.
    pub(crate) number: u64,
    /// Tells runs apart.
    pub(crate) run: u32,
}

/// A random number that tells this run from others.
pub(crate) fn random_run() -> u32 {
    // Its keys are the system's random bytes.
    let bits = RandomState::new().hash_one(0);
    (bits >> 32) as u32
}

impl fmt::Display for PinId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p{}-{:08x}", self.number, self.run)
    }
}

/// The text is no id of a pin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotAPinId;

impl FromStr for PinId {
    type Err = NotAPinId;

    fn from_str(text: &str) -> Result<PinId, NotAPinId> {
        let parts = text.strip_prefix('p').and_then(|rest| rest.split_once('-'));
        let (number, run) = parts.ok_or(NotAPinId)?;
        let id = PinId {
            number: number.parse().map_err(|_| NotAPinId)?,
            run: u32::from_str_radix(run, 16).map_err(|_| NotAPinId)?,
        };
        // One id has one spelling.
        if id.to_string() == text {
            Ok(id)
        } else {
            Err(NotAPinId)
        }
    }
}

/// Refuses a name that cannot be one.
pub(crate) fn check_name(name: &str) -> Result<(), PinError> {
    let problem = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_NAME_BYTES {
        "it has more than 128 bytes"
    } else if name.chars().any(char::is_control) {
        "it has control characters"
    } else if name.parse::<PinId>().is_ok() {
        "it looks like the id of a pin"
    } else {
        return Ok(());
    };
    Err(PinError::BadName {
        name: name.to_owned(),
        problem,
    })
}

/// Which device, as a request says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceName {
    /// Shared host memory.
    Host,
    /// A GPU by the server's number.
    Gpu(u32),
    /// A GPU by its UUID, `GPU-…`.
    Uuid(String),
}

impl DeviceName {
    /// True if this device is meant.
    pub(crate) fn names(&self, device: &DeviceInfo) -> bool {
        match self {
            DeviceName::Host => device.kind == DeviceKind::Host,
            DeviceName::Gpu(number) => device.kind == DeviceKind::Cuda && device.ordinal == *number,
            DeviceName::Uuid(uuid) => device.uuid == *uuid,
        }
    }

    /// The name that is the easiest to type.
    pub(crate) fn of(device: &DeviceInfo) -> DeviceName {
        match device.kind {
            DeviceKind::Host => DeviceName::Host,
            DeviceKind::Cuda => DeviceName::Gpu(device.ordinal),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceName::Host => f.write_str("host"),
            DeviceName::Gpu(number) => write!(f, "{number}"),
            DeviceName::Uuid(uuid) => f.write_str(uuid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_spelling_and_no_name_looks_like_one() {
        let id = PinId {
            number: 3,
            run: 0x0f31_c07a,
        };
        assert_eq!(id.to_string(), "p3-0f31c07a");
        assert_eq!("p3-0f31c07a".parse(), Ok(id));
        for other in [
            "p3",
            "p3-f31c07a",
            "p03-0f31c07a",
            "p3-0F31C07A",
            "3-0f31c07a",
            "",
        ] {
            assert_eq!(other.parse::<PinId>(), Err(NotAPinId), "{other}");
        }
        assert!(check_name("p3-0f31c07a").is_err());
        check_name("p3").unwrap();
        assert!(check_name("a\nb").is_err() && check_name(&"x".repeat(129)).is_err());
    }
}
