//! Decimal text to scaled integers, exactly: nothing is rounded.

use arrow_buffer::i256;

/// Digits that a 64-bit float holds for certain; a JSON number of more may have been rounded
/// by its parser.
pub(super) const FLOAT_DIGITS: usize = 15;

/// Why text is no decimal of the wanted precision and scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecimalProblem {
    /// Not a number.
    NotANumber,
    /// More decimals than the scale holds.
    TooFine,
    /// More digits than the precision holds.
    TooLarge,
}

/// Reads `[+-]digits[.digits][e[+-]digits]` as an integer scaled by `scale`.
///
/// `precision` is at most 76.
///
/// # Errors
///
/// The text is no number, or has more digits than fit: nothing is rounded.
pub fn parse_decimal(text: &str, precision: u8, scale: i8) -> Result<i256, DecimalProblem> {
    let parts = split(text).ok_or(DecimalProblem::NotANumber)?;
    let trimmed = parts.digits.trim_start_matches('0');
    if trimmed.is_empty() {
        return Ok(i256::ZERO);
    }
    // value = digits * 10^exponent, wanted = value * 10^scale
    let shift = parts.exponent.saturating_add(i64::from(scale));
    let mut digits = trimmed.to_owned();
    if shift < 0 {
        let cut = usize::try_from(shift.unsigned_abs()).map_err(|_| DecimalProblem::TooFine)?;
        let kept = digits.trim_end_matches('0').len();
        if digits.len() < cut || digits.len() - cut < kept {
            return Err(DecimalProblem::TooFine);
        }
        digits.truncate(digits.len() - cut);
    } else {
        let zeros = usize::try_from(shift).map_err(|_| DecimalProblem::TooLarge)?;
        if digits.len().saturating_add(zeros) > usize::from(precision) {
            return Err(DecimalProblem::TooLarge);
        }
        digits.extend(std::iter::repeat_n('0', zeros));
    }
    if digits.len() > usize::from(precision) {
        return Err(DecimalProblem::TooLarge);
    }
    if parts.negative {
        digits.insert(0, '-');
    }
    i256::from_string(&digits).ok_or(DecimalProblem::TooLarge)
}

/// Significant digits of a number's text.
pub(super) fn significant_digits(text: &str) -> usize {
    match split(text) {
        Some(parts) => parts
            .digits
            .trim_start_matches('0')
            .trim_end_matches('0')
            .len(),
        None => usize::MAX,
    }
}

struct Parts {
    negative: bool,
    /// Every digit, the point taken out.
    digits: String,
    exponent: i64,
}

fn split(text: &str) -> Option<Parts> {
    let (negative, rest) = match text.as_bytes().first()? {
        b'-' => (true, text.get(1..)?),
        b'+' => (false, text.get(1..)?),
        _ => (false, text),
    };
    let (mantissa, exponent) = match rest.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, i64::from(exponent.parse::<i32>().ok()?)),
        None => (rest, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let digits = format!("{whole}{fraction}");
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let exponent = exponent - i64::try_from(fraction.len()).ok()?;
    Some(Parts {
        negative,
        digits,
        exponent,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small(text: &str, precision: u8, scale: i8) -> Result<i128, DecimalProblem> {
        parse_decimal(text, precision, scale).map(|v| v.to_i128().expect("fits"))
    }

    #[test]
    fn text_is_scaled_exactly() {
        assert_eq!(small("12.34", 10, 2), Ok(1234));
        assert_eq!(small("-12.3", 10, 2), Ok(-1230));
        assert_eq!(small("+0.05", 10, 2), Ok(5));
        assert_eq!(small("1e3", 10, 2), Ok(100_000));
        assert_eq!(small("1200", 10, -2), Ok(12));
        assert_eq!(small("1.2300", 4, 2), Ok(123));
        assert_eq!(small("0.000", 4, 2), Ok(0));
        assert_eq!(small(".5", 4, 2), Ok(50));
    }

    #[test]
    fn what_does_not_fit_is_refused_not_rounded() {
        assert_eq!(small("12.345", 10, 2), Err(DecimalProblem::TooFine));
        assert_eq!(small("0.001", 10, 2), Err(DecimalProblem::TooFine));
        assert_eq!(small("123.45", 4, 2), Err(DecimalProblem::TooLarge));
        assert_eq!(small("1e2147483647", 38, 2), Err(DecimalProblem::TooLarge));
        assert_eq!(small("1e-2147483648", 38, 2), Err(DecimalProblem::TooFine));
        for text in ["", "-", ".", "1.2.3", "NaN", "1e", "0x10", "1_000"] {
            assert_eq!(
                small(text, 38, 2),
                Err(DecimalProblem::NotANumber),
                "{text}"
            );
        }
    }

    #[test]
    fn seventy_six_digits_are_read() {
        let text = "9".repeat(76);
        assert_eq!(parse_decimal(&text, 76, 0).expect("fits").to_string(), text);
    }
}
