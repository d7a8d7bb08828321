//! The grammar of names: tables, keys, times and features.
//!
//! Names become file names, TOML keys, Arrow field names, SQL identifiers and parts of
//! `table__feature`, so the grammar is narrow and the same everywhere.

/// Longest table name, in bytes.
const MAX_TABLE_BYTES: usize = 63;
/// Longest column name, in bytes.
const MAX_COLUMN_BYTES: usize = 127;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{name}\" is not a {kind} name: {problem}")]
pub struct NameError {
    /// What was to be named: `table`, `key`, `event time`, `created time`, `feature`.
    pub kind: String,
    /// The name as given, cut to a readable length, control characters escaped.
    pub name: String,
    /// The rule that it breaks.
    pub problem: &'static str,
}

/// Checks a name against the grammar of its kind.
///
/// A `table` name is `[a-z][a-z0-9_]{0,62}`. Every other kind names a column:
/// `[A-Za-z_][A-Za-z0-9_]{0,126}` without a double underscore, which separates the parts of
/// reply columns (`temp__status`, `weather__temp`).
///
/// # Errors
///
/// The first rule that is broken.
pub fn valid_name(kind: &str, name: &str) -> Result<(), NameError> {
    let problem = if kind == "table" {
        table_problem(name)
    } else {
        column_problem(name)
    };
    match problem {
        None => Ok(()),
        Some(problem) => Err(NameError {
            kind: kind.to_owned(),
            name: name.chars().take(80).flat_map(char::escape_debug).collect(),
            problem,
        }),
    }
}

fn table_problem(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("it is empty")
    } else if name.len() > MAX_TABLE_BYTES {
        Some("it is longer than 63 bytes")
    } else if !name.starts_with(|c: char| c.is_ascii_lowercase()) {
        Some("it must begin with a lower case letter a-z")
    } else if !name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    {
        Some("only a-z, 0-9 and _ are allowed")
    } else {
        None
    }
}

fn column_problem(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("it is empty")
    } else if name.len() > MAX_COLUMN_BYTES {
        Some("it is longer than 127 bytes")
    } else if !name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
        Some("it must begin with a letter or _")
    } else if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        Some("only A-Z, a-z, 0-9 and _ are allowed; name it so and say where it is with `from`")
    } else if name.contains("__") {
        Some("\"__\" is kept for reply columns such as temp__status")
    } else {
        None
    }
}

/// The known word that a misspelt one most likely means; `None` when none is near.
pub fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    nearest_by(word, known, |name| name)
}

/// As [`nearest`], comparing with a part of each known word.
pub(crate) fn nearest_by<'a>(
    word: &str,
    known: impl Iterator<Item = &'a str>,
    part: impl Fn(&'a str) -> &'a str,
) -> Option<&'a str> {
    // Long words are no misspellings, and the comparison is quadratic.
    if word.is_empty() || word.len() > 128 {
        return None;
    }
    let word = word.to_lowercase();
    known
        .map(|name| {
            let distance = strsim::damerau_levenshtein(&word, &part(name).to_lowercase());
            (distance, name)
        })
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, _)| *distance <= (word.chars().count() / 3).max(1))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_names_follow_the_narrow_grammar() {
        let longest = format!("a{}", "b".repeat(62));
        for name in ["a", "weather", "user_profile", "t2__x", longest.as_str()] {
            assert_eq!(valid_name("table", name), Ok(()), "{name}");
        }
        let too_long = format!("a{}", "b".repeat(63));
        for name in [
            "",
            "Weather",
            "2x",
            "_x",
            "a-b",
            "a.b",
            "../etc",
            "a/b",
            "é",
            "a b",
            "a\0",
            too_long.as_str(),
        ] {
            assert!(valid_name("table", name).is_err(), "{name:?} was taken");
        }
    }

    #[test]
    fn column_names_take_capitals_and_refuse_a_double_underscore() {
        let longest = "x".repeat(127);
        for name in ["a", "_a", "A", "UserId", "a_b_1", longest.as_str()] {
            assert_eq!(valid_name("feature", name), Ok(()), "{name}");
        }
        let too_long = "x".repeat(128);
        for name in [
            "",
            "1a",
            "a__b",
            "__a",
            "a b",
            "a.b",
            "ä",
            too_long.as_str(),
        ] {
            assert!(valid_name("feature", name).is_err(), "{name:?} was taken");
            assert!(valid_name("key", name).is_err(), "{name:?} was taken");
        }
    }

    #[test]
    fn a_hostile_name_is_shown_escaped_and_cut() {
        let error = valid_name("table", &"\u{1b}[2J".repeat(100)).unwrap_err();
        assert!(!error.name.contains('\u{1b}'));
        assert!(error.name.len() < 1000);
    }
}
