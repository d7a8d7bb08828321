//! Literals by value: exact numbers, moments in nanoseconds.

use std::str::FromStr;

use arrow_buffer::i256;
use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime, Timelike};

/// Most decimal digits that an `i256` surely holds.
const MAX_DIGITS: usize = 76;

/// A literal, and how it was written.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Literal {
    pub(super) text: String,
    pub(super) value: LiteralValue,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum LiteralValue {
    Number(Number),
    Text(String),
    Boolean(bool),
    Bytes(Vec<u8>),
    /// Nanoseconds since the Unix epoch.
    Moment(i128),
}

/// A decimal number of any size: `digits * 10^exponent`, negated or not.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Number {
    negative: bool,
    /// Without leading zeros; empty is zero.
    digits: String,
    exponent: i64,
    /// As written, without a sign.
    text: String,
}

/// Where a literal lies among whole numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Point {
    /// Less than every `i256` of at most [`MAX_DIGITS`] digits.
    Below,
    /// At `floor`, or between it and the next.
    At { floor: i256, exact: bool },
    /// Greater than every `i256` of at most [`MAX_DIGITS`] digits.
    Above,
}

impl FromStr for Number {
    type Err = ();

    /// Reads `12`, `1.5`, `.5`, `1e-3`: what SQL calls a number.
    fn from_str(text: &str) -> Result<Number, ()> {
        let (mantissa, exponent) = match text.split_once(['e', 'E']) {
            // More digits than an exponent needs are as good as infinity.
            Some((mantissa, exponent)) => {
                let unsigned = exponent.trim_start_matches(['+', '-']);
                if unsigned.is_empty() || !unsigned.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(());
                }
                let size = unsigned.parse::<i64>().unwrap_or(1 << 40).min(1 << 40);
                (
                    mantissa,
                    if exponent.starts_with('-') {
                        -size
                    } else {
                        size
                    },
                )
            }
            None => (text, 0),
        };
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let digits = format!("{whole}{fraction}");
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(());
        }
        let exponent = exponent - i64::try_from(fraction.len()).map_err(|_| ())?;
        let digits = digits.trim_start_matches('0').to_owned();
        Ok(Number {
            negative: false,
            digits,
            exponent,
            text: text.to_owned(),
        })
    }
}

impl Number {
    /// The number with the other sign.
    pub(super) fn negated(self) -> Number {
        Number {
            negative: !self.negative,
            ..self
        }
    }

    /// The nearest double; infinite when out of range.
    pub(super) fn to_f64(&self) -> Option<f64> {
        let value: f64 = self.text.parse().ok()?;
        Some(if self.negative { -value } else { value })
    }

    /// The nearest single-precision number; infinite when out of range.
    pub(super) fn to_f32(&self) -> Option<f32> {
        let value: f32 = self.text.parse().ok()?;
        Some(if self.negative { -value } else { value })
    }

    /// The number times `10^scale` among whole numbers.
    pub(super) fn scaled(&self, scale: i8) -> Point {
        if self.digits.is_empty() {
            return Point::At {
                floor: i256::ZERO,
                exact: true,
            };
        }
        let shift = self.exponent + i64::from(scale);
        let far = if self.negative {
            Point::Below
        } else {
            Point::Above
        };
        let (whole, exact) = if let Ok(zeros) = usize::try_from(shift) {
            if self.digits.len().saturating_add(zeros) > MAX_DIGITS {
                return far;
            }
            (format!("{}{}", self.digits, "0".repeat(zeros)), true)
        } else {
            let dropped = usize::try_from(shift.unsigned_abs()).unwrap_or(usize::MAX);
            let kept = self.digits.len().saturating_sub(dropped);
            let (whole, rest) = self.digits.split_at(kept);
            // No digit dropped can be the missing zeros in front: the first digit is not zero.
            (whole.to_owned(), rest.bytes().all(|b| b == b'0'))
        };
        if whole.len() > MAX_DIGITS {
            return far;
        }
        let whole = if whole.is_empty() {
            Some(i256::ZERO)
        } else {
            i256::from_string(&whole)
        };
        match whole {
            Some(whole) if self.negative => {
                let floor = whole.wrapping_neg();
                Point::At {
                    floor: if exact {
                        floor
                    } else {
                        floor.wrapping_sub(i256::ONE)
                    },
                    exact,
                }
            }
            Some(floor) => Point::At { floor, exact },
            None => far,
        }
    }
}

/// A quantity of nanoseconds as ticks of `tick_nanos` nanoseconds.
pub(super) fn ticks(nanos: i128, tick_nanos: i64) -> Point {
    let tick = i128::from(tick_nanos);
    Point::At {
        floor: i256::from_i128(nanos.div_euclid(tick)),
        exact: nanos.rem_euclid(tick) == 0,
    }
}

/// Nanoseconds since the epoch of an RFC 3339 or ISO 8601 moment or date; UTC when it names no zone.
pub(super) fn parse_moment(text: &str) -> Result<i128, String> {
    let trimmed = text.trim();
    // SQL writes a space where RFC 3339 writes T.
    let joined = match trimmed.split_once([' ', 't']) {
        Some((date, time)) => format!("{date}T{}", time.trim_start()),
        None => trimmed.to_owned(),
    };
    if let Ok(moment) = DateTime::parse_from_rfc3339(&joined)
        .or_else(|_| DateTime::parse_from_str(&joined, "%Y-%m-%dT%H:%M%:z"))
    {
        return Ok(nanos_of(moment.naive_utc()));
    }
    for format in ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M"] {
        if let Ok(moment) = NaiveDateTime::parse_from_str(&joined, format) {
            return Ok(nanos_of(moment));
        }
    }
    parse_date(trimmed).map_err(|_| {
        "a time is written 2024-01-31T12:00:00Z (without a zone it is UTC) or 2024-01-31".to_owned()
    })
}

/// Nanoseconds since the epoch of the start of a day.
pub(super) fn parse_date(text: &str) -> Result<i128, String> {
    NaiveDate::parse_from_str(text.trim(), "%Y-%m-%d")
        .map(|date| nanos_of(date.and_time(NaiveTime::MIN)))
        .map_err(|_| "a date is written 2024-01-31".to_owned())
}

/// Nanoseconds since midnight.
pub(super) fn parse_time_of_day(text: &str) -> Result<i128, String> {
    ["%H:%M:%S%.f", "%H:%M"]
        .iter()
        .find_map(|format| NaiveTime::parse_from_str(text.trim(), format).ok())
        .map(|time| {
            i128::from(time.num_seconds_from_midnight()) * 1_000_000_000
                + i128::from(time.nanosecond())
        })
        .ok_or_else(|| "a time of day is written 13:05:00".to_owned())
}

fn nanos_of(moment: NaiveDateTime) -> i128 {
    let moment = moment.and_utc();
    i128::from(moment.timestamp()) * 1_000_000_000 + i128::from(moment.timestamp_subsec_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str, scale: i8) -> Point {
        let (text, negative) = text.strip_prefix('-').map_or((text, false), |t| (t, true));
        let number: Number = text.parse().unwrap();
        if negative { number.negated() } else { number }.scaled(scale)
    }

    fn point(floor: i128, exact: bool) -> Point {
        Point::At {
            floor: i256::from_i128(floor),
            exact,
        }
    }

    #[test]
    fn numbers_fall_on_or_between_whole_numbers() {
        assert_eq!(at("0", 0), point(0, true));
        assert_eq!(at("0.000", 2), point(0, true));
        assert_eq!(at("12", 0), point(12, true));
        assert_eq!(at("12.50", 1), point(125, true));
        assert_eq!(at("12.55", 1), point(125, false));
        assert_eq!(at("-12.55", 1), point(-126, false));
        assert_eq!(at("-0.4", 0), point(-1, false));
        assert_eq!(at("1.20", 0), point(1, false));
        assert_eq!(at("1.00", 0), point(1, true));
        assert_eq!(at("1e3", 0), point(1000, true));
        assert_eq!(at("1500e-3", 0), point(1, false));
        assert_eq!(at("100", -2), point(1, true));
        assert_eq!(at("1e77", 0), Point::Above);
        assert_eq!(at("-1e999999999999999999999", 0), Point::Below);
        assert_eq!(at("1e-999999999999999999999", 0), point(0, false));
        assert_eq!(at("-1e-999999999999999999999", 38), point(-1, false));
    }

    #[test]
    fn moments_are_read_with_and_without_zone() {
        let noon = 1_706_702_400 * 1_000_000_000i128;
        for text in [
            "2024-01-31T12:00:00Z",
            "2024-01-31 12:00:00",
            "2024-01-31 12:00",
            "2024-01-31T13:00:00+01:00",
            "2024-01-31 13:00+01:00",
            "2024-01-31T12:00:00.000000000Z",
        ] {
            assert_eq!(parse_moment(text), Ok(noon), "{text}");
        }
        assert_eq!(parse_moment("2024-01-31T12:00:00.000000001"), Ok(noon + 1));
        assert_eq!(parse_moment("1969-12-31T23:59:59.999999999Z"), Ok(-1));
        assert_eq!(parse_moment("2024-01-31"), Ok(noon - 43_200_000_000_000));
        for text in [
            "",
            "yesterday",
            "2024-13-01",
            "2024-01-31T25:00:00Z",
            "2024-02-30",
        ] {
            assert!(parse_moment(text).is_err(), "{text}");
        }
    }
}
