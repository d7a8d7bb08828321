//! Lengths of time as people write them: `90d`, `1h30m`, `500ms`.

use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Units from the longest to the shortest, with their length in nanoseconds.
const UNITS: [(&str, i64); 8] = [
    ("w", 7 * 86_400_000_000_000),
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// A length of time: more than zero, at most about 292 years.
///
/// Written as whole numbers with units, the longest unit first and each at most once: `90d`,
/// `1h30m`, `500ms`, `2w`. Units are `w d h m s ms us ns`; a day is 24 hours. [`fmt::Display`]
/// gives one spelling for each length (without weeks) that parses back to the same length.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    nanos: i64,
}

/// Why a text is not a [`Span`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a duration: {problem}")]
pub struct SpanError {
    /// The text as given, cut to a readable length.
    pub text: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

impl Span {
    /// One hour.
    pub const HOUR: Span = Span {
        nanos: 3_600_000_000_000,
    };

    /// A span of `nanos` nanoseconds; `None` unless it is more than zero.
    pub const fn from_nanos(nanos: i64) -> Option<Span> {
        if nanos > 0 {
            Some(Span { nanos })
        } else {
            None
        }
    }

    /// The length in nanoseconds: always more than zero.
    pub const fn nanos(self) -> i64 {
        self.nanos
    }
}

impl FromStr for Span {
    type Err = SpanError;

    fn from_str(text: &str) -> Result<Span, SpanError> {
        let refuse = |problem| SpanError {
            text: text.chars().take(40).collect(),
            problem,
        };
        if text.is_empty() {
            return Err(refuse(
                "it is empty; write for example \"90d\" or \"1h30m\"",
            ));
        }
        let mut rest = text;
        let mut nanos = 0_i64;
        let mut shortest_seen = i64::MAX;
        while !rest.is_empty() {
            let digits_bytes = rest
                .find(|c: char| !c.is_ascii_digit())
                .ok_or_else(|| refuse("a number has no unit (w, d, h, m, s, ms, us, ns)"))?;
            let (digits, after) = rest.split_at(digits_bytes);
            if digits.is_empty() {
                return Err(refuse("a whole number and a unit are due, as in \"90d\""));
            }
            let unit_bytes = after
                .find(|c: char| c.is_ascii_digit())
                .unwrap_or(after.len());
            let (unit, after) = after.split_at(unit_bytes);
            let unit_nanos = UNITS
                .iter()
                .find(|(name, _)| *name == unit)
                .map(|(_, nanos)| *nanos)
                .ok_or_else(|| refuse("the units are w, d, h, m, s, ms, us, ns"))?;
            if unit_nanos >= shortest_seen {
                return Err(refuse("units go from long to short, each once"));
            }
            shortest_seen = unit_nanos;
            nanos = digits
                .parse::<i64>()
                .ok()
                .and_then(|count| count.checked_mul(unit_nanos))
                .and_then(|part| part.checked_add(nanos))
                .ok_or_else(|| refuse("it is longer than 292 years"))?;
            rest = after;
        }
        Span::from_nanos(nanos).ok_or_else(|| refuse("it must be more than zero"))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.nanos;
        // No weeks: "90d" should not come back as "12w6d".
        for (unit, unit_nanos) in UNITS.iter().skip(1) {
            let count = rest / unit_nanos;
            if count > 0 {
                write!(f, "{count}{unit}")?;
                rest %= unit_nanos;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Span({self})")
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Span, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_parse_and_print_in_one_spelling() {
        for (text, nanos, printed) in [
            ("90d", 90 * 86_400_000_000_000, "90d"),
            ("3h", 3 * 3_600_000_000_000, "3h"),
            ("15m", 900_000_000_000, "15m"),
            ("1h30m", 5_400_000_000_000, "1h30m"),
            ("90m", 5_400_000_000_000, "1h30m"),
            ("500ms", 500_000_000, "500ms"),
            ("2w", 14 * 86_400_000_000_000, "14d"),
            ("1ns", 1, "1ns"),
            (
                "9223372036854775807ns",
                i64::MAX,
                "106751d23h47m16s854ms775us807ns",
            ),
        ] {
            let span: Span = text.parse().unwrap();
            assert_eq!(span.nanos(), nanos, "{text}");
            assert_eq!(span.to_string(), printed);
            assert_eq!(printed.parse::<Span>().unwrap(), span);
        }
    }

    #[test]
    fn text_that_is_no_span_is_refused_with_the_reason() {
        for text in [
            "",
            "0s",
            "5",
            "d",
            "-3h",
            "3 h",
            "3H",
            "1.5h",
            "30m1h",
            "1h1h",
            "9999999w",
            "3y",
            "١d",
            "99999999999999999999ns",
        ] {
            assert!(text.parse::<Span>().is_err(), "{text:?} was taken");
        }
        assert_eq!(
            "5".parse::<Span>().unwrap_err().to_string(),
            "\"5\" is not a duration: a number has no unit (w, d, h, m, s, ms, us, ns)"
        );
    }

    #[test]
    fn spans_travel_through_json_as_text() {
        let span: Span = "1h30m".parse().unwrap();
        let json = serde_json::to_string(&span).unwrap();
        assert_eq!(json, "\"1h30m\"");
        assert_eq!(serde_json::from_str::<Span>(&json).unwrap(), span);
        assert!(serde_json::from_str::<Span>("\"0s\"").is_err());
    }
}
