//! Text to ticks of a time column: RFC 3339, ISO dates and times, or a `strftime` format.
//!
//! Text without an offset is local to the column's zone (UTC unless said). A local time that
//! a clock shows twice is the earlier of the two; one that a clock skips is refused. Digits
//! finer than the column's unit are refused, not cut off, unless they are zeros.

use arrow_schema::{DataType, TimeUnit};
use chrono::format::{Item, Parsed, StrftimeItems, parse};
use chrono::{DateTime, LocalResult, NaiveDate, NaiveDateTime, NaiveTime, TimeZone, Timelike};
use chrono_tz::Tz;

const NANOS_PER_SECOND: i128 = 1_000_000_000;
const NANOS_PER_DAY: i128 = 86_400 * NANOS_PER_SECOND;

/// Why text is no time, or why no text can be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TimeTextError {
    /// Not in the expected form.
    #[error("expected {expected}, found {found:?}")]
    Unreadable {
        /// The form.
        expected: String,
        /// The text.
        found: String,
    },
    /// A local time that the zone's clocks skip.
    #[error("{found:?} does not exist in {zone}: clocks skip it")]
    Nonexistent {
        /// The text.
        found: String,
        /// The zone.
        zone: String,
    },
    /// Digits finer than the column's unit.
    #[error("{found:?} is finer than the column's unit ({unit})")]
    TooFine {
        /// The text.
        found: String,
        /// The column's unit.
        unit: &'static str,
    },
    /// Outside what the column's type holds.
    #[error("{found:?} is outside the range of {data_type}")]
    OutOfRange {
        /// The text.
        found: String,
        /// The column's type.
        data_type: String,
    },
    /// The zone is no IANA zone (found before any text is read).
    #[error("unknown time zone {zone:?}: expected an IANA name such as \"Europe/Berlin\"")]
    UnknownZone {
        /// The zone as given.
        zone: String,
    },
    /// The format is no `strftime` format (found before any text is read).
    #[error("{format:?} is no strftime format")]
    BadFormat {
        /// The format as given.
        format: String,
    },
    /// The column's type is no time (found before any text is read).
    #[error("{data_type} is no time type")]
    NotATime {
        /// The column's type.
        data_type: String,
    },
}

/// Reads the text of one time column. Built once per column, then cheap per value.
#[derive(Debug, Clone)]
pub struct TimeText {
    data_type: DataType,
    kind: Kind,
    format: Option<(String, Vec<Item<'static>>)>,
    zone: Tz,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Timestamp(TimeUnit),
    Date32,
    Date64,
    Time(TimeUnit),
}

impl TimeText {
    /// Prepares to read texts of a timestamp, date or time column.
    ///
    /// `format` is a chrono `strftime` format; without one texts are RFC 3339 or ISO 8601.
    /// `zone` is the IANA zone of texts that carry no offset; UTC when absent.
    ///
    /// # Errors
    ///
    /// `NotATime`, `BadFormat` or `UnknownZone`.
    pub fn new(
        data_type: &DataType,
        format: Option<&str>,
        zone: Option<&str>,
    ) -> Result<TimeText, TimeTextError> {
        let kind = match data_type {
            DataType::Timestamp(unit, _) => Kind::Timestamp(*unit),
            DataType::Date32 => Kind::Date32,
            DataType::Date64 => Kind::Date64,
            DataType::Time32(unit) | DataType::Time64(unit) => Kind::Time(*unit),
            other => {
                return Err(TimeTextError::NotATime {
                    data_type: pinion_schemas::format_type(other),
                });
            }
        };
        let format = match format {
            None => None,
            Some(text) => {
                let items = StrftimeItems::new(text).parse_to_owned().map_err(|_| {
                    TimeTextError::BadFormat {
                        format: text.to_owned(),
                    }
                })?;
                Some((text.to_owned(), items))
            }
        };
        let zone = match zone {
            None => Tz::UTC,
            Some(name) => name.parse::<Tz>().map_err(|_| TimeTextError::UnknownZone {
                zone: name.to_owned(),
            })?,
        };
        Ok(TimeText {
            data_type: data_type.clone(),
            kind,
            format,
            zone,
        })
    }

    /// True when texts follow a format of the column's own: integer ticks are refused then.
    pub fn has_format(&self) -> bool {
        self.format.is_some()
    }

    /// The ticks of `text`: units since the Unix epoch for timestamps, days for `date32`,
    /// milliseconds for `date64`, units since midnight for times.
    ///
    /// # Errors
    ///
    /// `Unreadable`, `Nonexistent`, `TooFine` or `OutOfRange`; nothing else.
    pub fn parse(&self, text: &str) -> Result<i64, TimeTextError> {
        match self.kind {
            Kind::Timestamp(unit) => {
                let nanos = self.timestamp_nanos(text)?;
                self.ticks(text, nanos, unit_nanos(unit), unit_name(unit))
            }
            Kind::Date32 => {
                let nanos = self.date_nanos(text)?;
                let days = self.ticks(text, nanos, NANOS_PER_DAY, "day")?;
                i32::try_from(days)
                    .map(i64::from)
                    .map_err(|_| self.out_of_range(text))
            }
            Kind::Date64 => {
                let nanos = self.date_nanos(text)?;
                self.ticks(text, nanos, unit_nanos(TimeUnit::Millisecond), "day")
            }
            Kind::Time(unit) => {
                let nanos = self.time_nanos(text)?;
                self.ticks(text, nanos, unit_nanos(unit), unit_name(unit))
            }
        }
    }

    fn timestamp_nanos(&self, text: &str) -> Result<i128, TimeTextError> {
        if let Some((_, items)) = &self.format {
            let mut parsed = Parsed::new();
            parse(&mut parsed, text, items.iter()).map_err(|_| self.unreadable(text))?;
            if let Ok(with_offset) = parsed.to_datetime() {
                return Ok(utc_nanos(&with_offset.naive_utc()));
            }
            let local = parsed
                .to_naive_datetime_with_offset(0)
                .or_else(|_| parsed.to_naive_date().map(|d| d.and_time(NaiveTime::MIN)))
                .map_err(|_| self.unreadable(text))?;
            return self.local_nanos(text, local);
        }
        if let Ok(with_offset) = DateTime::parse_from_rfc3339(text) {
            return Ok(utc_nanos(&with_offset.naive_utc()));
        }
        let local = parse_iso_local(text).ok_or_else(|| self.unreadable(text))?;
        self.local_nanos(text, local)
    }

    fn local_nanos(&self, text: &str, local: NaiveDateTime) -> Result<i128, TimeTextError> {
        if self.zone == Tz::UTC {
            return Ok(utc_nanos(&local));
        }
        match self.zone.from_local_datetime(&local) {
            LocalResult::Single(t) | LocalResult::Ambiguous(t, _) => Ok(utc_nanos(&t.naive_utc())),
            LocalResult::None => Err(TimeTextError::Nonexistent {
                found: clip(text),
                zone: self.zone.name().to_owned(),
            }),
        }
    }

    fn date_nanos(&self, text: &str) -> Result<i128, TimeTextError> {
        let date = match &self.format {
            Some((_, items)) => {
                let mut parsed = Parsed::new();
                parse(&mut parsed, text, items.iter())
                    .ok()
                    .and_then(|()| parsed.to_naive_date().ok())
            }
            None => NaiveDate::parse_from_str(text, "%Y-%m-%d").ok(),
        };
        let date = date.ok_or_else(|| self.unreadable(text))?;
        Ok(utc_nanos(&date.and_time(NaiveTime::MIN)))
    }

    fn time_nanos(&self, text: &str) -> Result<i128, TimeTextError> {
        let time = match &self.format {
            Some((_, items)) => {
                let mut parsed = Parsed::new();
                parse(&mut parsed, text, items.iter())
                    .ok()
                    .and_then(|()| parsed.to_naive_time().ok())
            }
            None => NaiveTime::parse_from_str(text, "%H:%M:%S%.f")
                .or_else(|_| NaiveTime::parse_from_str(text, "%H:%M"))
                .ok(),
        };
        let time = time.ok_or_else(|| self.unreadable(text))?;
        let nanos = i128::from(time.num_seconds_from_midnight()) * NANOS_PER_SECOND
            + i128::from(time.nanosecond());
        // A leap second would lie past the end of the day.
        if nanos >= NANOS_PER_DAY {
            Err(self.out_of_range(text))
        } else {
            Ok(nanos)
        }
    }

    fn ticks(
        &self,
        text: &str,
        nanos: i128,
        unit_nanos: i128,
        unit: &'static str,
    ) -> Result<i64, TimeTextError> {
        if nanos.rem_euclid(unit_nanos) != 0 {
            return Err(TimeTextError::TooFine {
                found: clip(text),
                unit,
            });
        }
        i64::try_from(nanos.div_euclid(unit_nanos)).map_err(|_| self.out_of_range(text))
    }

    fn unreadable(&self, text: &str) -> TimeTextError {
        let expected = match (&self.format, self.kind) {
            (Some((format, _)), _) => format!("a time as {format:?}"),
            (None, Kind::Timestamp(_)) => "an RFC 3339 time".to_owned(),
            (None, Kind::Date32 | Kind::Date64) => "a date as YYYY-MM-DD".to_owned(),
            (None, Kind::Time(_)) => "a time of day as HH:MM:SS".to_owned(),
        };
        TimeTextError::Unreadable {
            expected,
            found: clip(text),
        }
    }

    fn out_of_range(&self, text: &str) -> TimeTextError {
        TimeTextError::OutOfRange {
            found: clip(text),
            data_type: pinion_schemas::format_type(&self.data_type),
        }
    }
}

/// Reads one text: [`TimeText::new`] and [`TimeText::parse`] in one call. For many values
/// of one column keep the [`TimeText`].
///
/// # Errors
///
/// As those two.
pub fn parse_time_text(
    text: &str,
    data_type: &DataType,
    format: Option<&str>,
    zone: Option<&str>,
) -> Result<i64, TimeTextError> {
    TimeText::new(data_type, format, zone)?.parse(text)
}

/// Ticks of a record timestamp (milliseconds since the Unix epoch) in a time column's unit,
/// rounded down to it. `None` for other types and outside the type's range.
pub(super) fn millis_to_ticks(millis: i64, data_type: &DataType) -> Option<i64> {
    let nanos = i128::from(millis) * 1_000_000;
    let ticks = match data_type {
        DataType::Timestamp(unit, _) => nanos.div_euclid(unit_nanos(*unit)),
        DataType::Date32 => nanos.div_euclid(NANOS_PER_DAY),
        DataType::Date64 => {
            nanos.div_euclid(NANOS_PER_DAY) * (NANOS_PER_DAY / unit_nanos(TimeUnit::Millisecond))
        }
        DataType::Int64 => i128::from(millis),
        _ => return None,
    };
    i64::try_from(ticks).ok()
}

fn parse_iso_local(text: &str) -> Option<NaiveDateTime> {
    if text.len() == 10 {
        let date = NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?;
        return Some(date.and_time(NaiveTime::MIN));
    }
    [
        "%Y-%m-%dT%H:%M:%S%.f",
        "%Y-%m-%d %H:%M:%S%.f",
        "%Y-%m-%dT%H:%M",
        "%Y-%m-%d %H:%M",
    ]
    .iter()
    .find_map(|format| NaiveDateTime::parse_from_str(text, format).ok())
}

fn utc_nanos(utc: &NaiveDateTime) -> i128 {
    let utc = utc.and_utc();
    // A leap second (nanoseconds of 1e9 and more) falls into the next second.
    i128::from(utc.timestamp()) * NANOS_PER_SECOND + i128::from(utc.timestamp_subsec_nanos())
}

fn unit_nanos(unit: TimeUnit) -> i128 {
    match unit {
        TimeUnit::Second => NANOS_PER_SECOND,
        TimeUnit::Millisecond => 1_000_000,
        TimeUnit::Microsecond => 1_000,
        TimeUnit::Nanosecond => 1,
    }
}

fn unit_name(unit: TimeUnit) -> &'static str {
    match unit {
        TimeUnit::Second => "s",
        TimeUnit::Millisecond => "ms",
        TimeUnit::Microsecond => "us",
        TimeUnit::Nanosecond => "ns",
    }
}

/// The text as it may stand in an error: not longer than 40 characters.
pub(super) fn clip(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn seconds() -> DataType {
        DataType::Timestamp(TimeUnit::Second, Some(Arc::from("UTC")))
    }

    fn nanos() -> DataType {
        DataType::Timestamp(TimeUnit::Nanosecond, None)
    }

    #[test]
    fn rfc_3339_and_naive_text_are_utc() {
        for text in [
            "2013-01-01T06:00:00Z",
            "2013-01-01 06:00:00",
            "2013-01-01T07:00:00+01:00",
            "2013-01-01T06:00",
        ] {
            assert_eq!(
                parse_time_text(text, &seconds(), None, None),
                Ok(1_357_020_000),
                "{text}"
            );
        }
        assert_eq!(
            parse_time_text("2013-01-01", &seconds(), None, None),
            Ok(1_356_998_400)
        );
    }

    #[test]
    fn nanoseconds_stay() {
        let ticks = parse_time_text("1969-12-31T23:59:59.999999999Z", &nanos(), None, None);
        assert_eq!(ticks, Ok(-1));
    }

    #[test]
    fn a_format_without_seconds_is_read_in_its_zone() {
        let format = Some("%Y/%m/%d %H:%M");
        assert_eq!(
            parse_time_text("2001/01/01 00:47", &seconds(), format, None),
            Ok(978_310_020)
        );
        assert_eq!(
            parse_time_text(
                "2001/01/01 00:47",
                &seconds(),
                format,
                Some("America/New_York")
            ),
            Ok(978_310_020 + 5 * 3600)
        );
    }

    #[test]
    fn a_format_of_a_date_alone_is_midnight() {
        assert_eq!(
            parse_time_text(
                "01.01.1970",
                &seconds(),
                Some("%d.%m.%Y"),
                Some("Europe/Berlin")
            ),
            Ok(-3600)
        );
        assert_eq!(
            parse_time_text("02.01.1970", &DataType::Date32, Some("%d.%m.%Y"), None),
            Ok(1)
        );
    }

    #[test]
    fn a_format_with_an_offset_ignores_the_zone() {
        let ticks = parse_time_text(
            "1970-01-01 01:00 +0100",
            &seconds(),
            Some("%Y-%m-%d %H:%M %z"),
            Some("Asia/Tokyo"),
        );
        assert_eq!(ticks, Ok(0));
    }

    #[test]
    fn an_hour_shown_twice_is_the_earlier_and_a_skipped_one_is_refused() {
        let zone = Some("America/New_York");
        assert_eq!(
            parse_time_text("2023-11-05T01:30:00", &seconds(), None, zone),
            parse_time_text("2023-11-05T05:30:00Z", &seconds(), None, None),
        );
        assert!(matches!(
            parse_time_text("2023-03-12T02:30:00", &seconds(), None, zone),
            Err(TimeTextError::Nonexistent { .. })
        ));
    }

    #[test]
    fn digits_finer_than_the_unit_are_refused_unless_zero() {
        assert_eq!(
            parse_time_text("1970-01-01T00:00:01.000Z", &seconds(), None, None),
            Ok(1)
        );
        assert!(matches!(
            parse_time_text("1970-01-01T00:00:01.5Z", &seconds(), None, None),
            Err(TimeTextError::TooFine { unit: "s", .. })
        ));
    }

    #[test]
    fn a_time_outside_the_type_is_refused() {
        assert!(matches!(
            parse_time_text("2500-01-01T00:00:00Z", &nanos(), None, None),
            Err(TimeTextError::OutOfRange { .. })
        ));
        assert!(parse_time_text("2500-01-01T00:00:00Z", &seconds(), None, None).is_ok());
    }

    #[test]
    fn times_of_day_and_bad_settings() {
        let millis = DataType::Time32(TimeUnit::Millisecond);
        assert_eq!(
            parse_time_text("01:00:00.250", &millis, None, None),
            Ok(3_600_250)
        );
        assert!(parse_time_text("25:00:00", &millis, None, None).is_err());
        assert!(matches!(
            TimeText::new(&seconds(), Some("%Q"), None),
            Err(TimeTextError::BadFormat { .. })
        ));
        assert!(matches!(
            TimeText::new(&seconds(), None, Some("Mars/Olympus")),
            Err(TimeTextError::UnknownZone { .. })
        ));
        assert!(matches!(
            TimeText::new(&DataType::Int8, None, None),
            Err(TimeTextError::NotATime { .. })
        ));
    }

    #[test]
    fn record_timestamps_round_down_to_the_unit() {
        assert_eq!(millis_to_ticks(-1, &seconds()), Some(-1));
        assert_eq!(millis_to_ticks(1_999, &seconds()), Some(1));
        assert_eq!(millis_to_ticks(i64::MAX, &nanos()), None);
        assert_eq!(
            millis_to_ticks(86_400_000 + 5, &DataType::Date64),
            Some(86_400_000)
        );
    }
}
