//! Row filters: a small SQL expression, parsed once, bound to a schema, evaluated by batch.
//!
//! The words are those of `sqlparser`'s generic dialect, the grammar what columns and literals need:
//! comparison (`= != <> < <= > >=`) of a column with a literal, on either side; `in` and
//! `between` with literals; `is null`; a boolean column alone; `and`, `or`, `not` and
//! parentheses. Literals are numbers, `'text'`, `true`, `false`, `timestamp '...'`,
//! `date '...'` and `X'hex'`. Anything else is refused with the offending text.
//!
//! What others may rely on:
//! - Three-valued logic, as in SQL: a comparison with a null value is null, and a filter
//!   keeps the rows for which it is true.
//! - Literals are compared by value. A number out of an integer column's range, or between
//!   two of its values, is answered rightly (`int8_column < 300` is true), not wrapped.
//! - Against a float column a number is rounded to the column's type first, so `x = 0.1`
//!   finds the `float32` nearest to 0.1. Zero equals minus zero. NaN is greater than every
//!   number.
//! - Column names are exact, case included; names that are SQL words go in double quotes.
//! - Times without a zone are UTC.
//! - Text from strangers is safe to parse: length, depth and number of conditions are
//!   limited, and the work grows with the length alone.

mod bind;
mod evaluate;
mod key_range;
mod literal;
mod parse;
mod verdict;

pub use bind::BoundFilter;
pub(super) use key_range::KeyRange;
pub(super) use verdict::{ColumnBounds, Verdict, Verdicts};

use arrow_schema::Schema;
use literal::Literal;

/// Longest text of a filter, in bytes.
pub const MAX_FILTER_BYTES: usize = 64 * 1024;
/// Deepest nesting of parentheses and `not`.
pub const MAX_FILTER_DEPTH: usize = 64;
/// Most conditions in one filter. An `in` list is one, however long.
pub const MAX_FILTER_CONDITIONS: usize = 2048;

/// Why a filter was refused. All of it is the caller's to fix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// Nothing but white space.
    #[error("the filter is empty; leave it out to read every row")]
    Empty,
    /// Too long a text.
    #[error("the filter has {bytes} bytes; {limit_bytes} are allowed")]
    TooLong {
        /// Length of the text.
        bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// Nested too deeply.
    #[error("the filter nests parentheses and `not` deeper than {limit} levels")]
    TooDeep {
        /// The limit.
        limit: usize,
    },
    /// Too many conditions.
    #[error("the filter has more than {limit} conditions; use `in (...)` for long lists")]
    TooManyConditions {
        /// The limit.
        limit: usize,
    },
    /// Not an expression.
    #[error("the filter is not a SQL expression: {problem}")]
    Syntax {
        /// The parser's words.
        problem: String,
    },
    /// An expression, but of a kind that filters do not have.
    #[error("the filter does not support `{fragment}`; {expected}")]
    Unsupported {
        /// The offending text, cut when long.
        fragment: String,
        /// What may stand in its place.
        expected: &'static str,
    },
    /// A column the table does not have.
    #[error("the filter names column {column:?}, which the table does not have{}", hint.as_deref().map(|h| format!("; did you mean {h:?}?")).unwrap_or_default())]
    UnknownColumn {
        /// What was asked for.
        column: String,
        /// The nearest column.
        hint: Option<String>,
    },
    /// A literal that cannot be compared with its column.
    #[error("the filter compares column {column} of type {data_type} with {literal}: {problem}")]
    Literal {
        /// Column name.
        column: String,
        /// The column's type.
        data_type: String,
        /// The literal as written.
        literal: String,
        /// Why they do not compare.
        problem: String,
    },
    /// A column that is not boolean stands where a condition should.
    #[error(
        "the filter uses column {column} of type {data_type} as a condition; compare it with a literal"
    )]
    NotBoolean {
        /// Column name.
        column: String,
        /// The column's type.
        data_type: String,
    },
}

/// A comparison, with the column on the left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CompareOp {
    Eq,
    NotEq,
    Lt,
    LtEq,
    Gt,
    GtEq,
}

/// What a filter says. Nesting is bounded by [`MAX_FILTER_DEPTH`]; `and` and `or` chains are flat.
#[derive(Debug, Clone, PartialEq)]
enum Condition {
    And(Vec<Condition>),
    Or(Vec<Condition>),
    Not(Box<Condition>),
    /// A boolean column alone.
    Column(String),
    IsNull(String),
    Compare(String, CompareOp, Literal),
    In(String, Vec<Literal>),
}

/// A parsed filter, of any table. [`Filter::bind`] makes it one of a schema.
#[derive(Debug, Clone, PartialEq)]
pub struct Filter {
    text: String,
    columns: Vec<String>,
    condition: Condition,
}

impl Filter {
    /// Parses one SQL expression.
    ///
    /// # Errors
    ///
    /// Every error but `UnknownColumn` and `NotBoolean`, which need a schema; `Literal` only
    /// from [`Filter::bind`].
    pub fn parse(text: &str) -> Result<Filter, FilterError> {
        let condition = parse::condition(text)?;
        let mut columns = Vec::new();
        collect_columns(&condition, &mut columns);
        Ok(Filter {
            text: text.trim().to_owned(),
            columns,
            condition,
        })
    }

    /// The text it was parsed from, trimmed.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The columns it reads, each once, in order of appearance.
    pub fn columns(&self) -> &[String] {
        &self.columns
    }

    /// Fits the filter to a schema: columns become positions, literals values of their types.
    ///
    /// # Errors
    ///
    /// `UnknownColumn`, `NotBoolean`, or `Literal` when a literal does not compare with its
    /// column's type.
    pub fn bind(&self, schema: &Schema) -> Result<BoundFilter, FilterError> {
        BoundFilter::new(&self.condition, schema)
    }
}

impl std::fmt::Display for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

fn collect_columns(condition: &Condition, columns: &mut Vec<String>) {
    match condition {
        Condition::And(all) | Condition::Or(all) => {
            all.iter().for_each(|c| collect_columns(c, columns))
        }
        Condition::Not(inner) => collect_columns(inner, columns),
        Condition::Column(name)
        | Condition::IsNull(name)
        | Condition::Compare(name, ..)
        | Condition::In(name, _) => {
            if !columns.contains(name) {
                columns.push(name.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests;
