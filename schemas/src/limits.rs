//! Bounds of a table's dead-letter log: sizes, ages, shares.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::as_text::serde_as_text;
use crate::policies::UnknownWord;
use crate::span::Span;

/// How much of a source may fail before it stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeadLetterLimits {
    /// At this size of the dead-letter log the source stops. `None`: 256 MiB.
    #[serde(default)]
    pub max_bytes: Option<ByteSize>,
    /// Older ones are removed. `None`: never.
    #[serde(default)]
    pub max_age: Option<Span>,
    /// Above this share of the last 10,000 records the source stops. `None`: at no share.
    #[serde(default)]
    pub max_rate: Option<Share>,
}

impl DeadLetterLimits {
    /// Size at which the source stops when the definition does not say.
    pub const DEFAULT_MAX_BYTES: u64 = 256 << 20;
}

/// A number of bytes, written `"64 MiB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A share, written `"2.5%"`: hundredths of a percent, at most all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share(u32);

impl Share {
    /// True when `part` of `whole` is more than this share.
    pub fn is_exceeded_by(self, part: u64, whole: u64) -> bool {
        u128::from(part) * 10_000 > u128::from(whole) * u128::from(self.0)
    }
}

const UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1_000),
    ("B", 1),
];

fn unknown(what: &'static str, text: &str, known: &'static str) -> UnknownWord {
    UnknownWord {
        what,
        text: text.chars().take(40).collect(),
        known,
    }
}

impl FromStr for ByteSize {
    type Err = UnknownWord;

    fn from_str(text: &str) -> Result<ByteSize, UnknownWord> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim();
        let factor = UNITS
            .iter()
            .find_map(|(name, factor)| (*name == unit).then_some(*factor))
            .or_else(|| unit.is_empty().then_some(1));
        number
            .parse::<u64>()
            .ok()
            .zip(factor)
            .and_then(|(number, factor)| number.checked_mul(factor))
            .map(ByteSize)
            .ok_or_else(|| unknown("size", text, "a number of bytes such as 64 MiB"))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The largest unit that divides it: 10^12 bytes are 1 TB and not 976562500 KiB.
        let whole = UNITS
            .iter()
            .filter(|(_, factor)| self.0 >= *factor && self.0.is_multiple_of(*factor))
            .max_by_key(|(_, factor)| *factor);
        match whole {
            Some((unit, factor)) => write!(f, "{} {unit}", self.0 / factor),
            None => write!(f, "{} B", self.0),
        }
    }
}

impl FromStr for Share {
    type Err = UnknownWord;

    fn from_str(text: &str) -> Result<Share, UnknownWord> {
        let refused = || unknown("share", text, "a percentage from 0% to 100% such as 2.5%");
        let number = text.strip_suffix('%').ok_or_else(refused)?.trim();
        let (whole, part) = number.split_once('.').unwrap_or((number, ""));
        let plain = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || !plain(whole) || !plain(part) || part.len() > 2 {
            return Err(refused());
        }
        let hundredths = format!("{part:0<2}");
        let whole: u32 = whole.parse().map_err(|_| refused())?;
        let part: u32 = hundredths.parse().map_err(|_| refused())?;
        whole
            .checked_mul(100)
            .and_then(|whole| whole.checked_add(part))
            .filter(|share| *share <= 10_000)
            .map(Share)
            .ok_or_else(refused)
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, part) = (self.0 / 100, self.0 % 100);
        match part {
            0 => write!(f, "{whole}%"),
            part if part.is_multiple_of(10) => write!(f, "{whole}.{}%", part / 10),
            part => write!(f, "{whole}.{part:02}%"),
        }
    }
}

serde_as_text!(ByteSize);
serde_as_text!(Share);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_shares_are_text_and_back() {
        for (text, bytes) in [
            ("0 B", 0),
            ("64 MiB", 64 << 20),
            ("1 TB", 1_000_000_000_000),
            ("1500 B", 1_500),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
        assert_eq!("4096".parse(), Ok(ByteSize(4_096)));
        for text in ["", "MiB", "1 PiB", "-1", "99999999999 TiB"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        for text in ["0%", "2.5%", "0.05%", "100%"] {
            assert_eq!(text.parse::<Share>().unwrap().to_string(), text);
        }
        for text in ["", "5", "%", "100.01%", "1.234%", "-1%", "1e1%", "+1%"] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_share_is_exceeded_by_more_than_it() {
        let share: Share = "1%".parse().unwrap();
        assert!(!share.is_exceeded_by(100, 10_000));
        assert!(share.is_exceeded_by(101, 10_000));
        assert!("0%".parse::<Share>().unwrap().is_exceeded_by(1, u64::MAX));
    }
}
