//! The type grammar: a recursive descent over the text, with limits.

use std::sync::Arc;

use arrow_schema::{
    DECIMAL128_MAX_PRECISION, DECIMAL256_MAX_PRECISION, DataType, Field, FieldRef, Fields, TimeUnit,
};

use super::{SIMPLE, TypeError, format_type, is_known_zone, nearest_zone};

/// Deepest nesting of a type.
const MAX_DEPTH: usize = 16;
/// Longest type text, in bytes.
const MAX_TEXT_BYTES: usize = 65_536;
/// Most elements of a fixed-size list, most bytes of a fixed-size binary.
const MAX_FIXED_SIZE: i32 = 1_048_576;
/// Most bytes that one value of fixed width may take.
const MAX_VALUE_BYTES: u64 = 16 << 20;

/// Names with parameters, for suggestions.
const PARAMETRIC: &[&str] = &[
    "timestamp[us, tz=UTC]",
    "time32[ms]",
    "time64[us]",
    "duration[us]",
    "decimal128(10, 2)",
    "decimal256(40, 2)",
    "fixed_size_binary[16]",
    "list<item: float>",
    "list<item: float>[64]",
    "large_list<item: float>",
    "struct<a: int32, b: string>",
    "dictionary<values=string, indices=int32, ordered=0>",
];

/// Reads a type as pyarrow prints it or as Arrow names it.
///
/// `double`/`float64`, `string`/`utf8`, `timestamp[us, tz=UTC]`, `decimal128(10, 2)`,
/// `list<item: float>`, `list<float>`, `fixed_size_list<item: float>[64]` or
/// `list<item: float>[64]`, `struct<a: int32, b: string not null>`,
/// `dictionary<values=string, indices=int32, ordered=0>`, `uuid` for `fixed_size_binary[16]`.
/// Case matters, spaces between parts do not. List elements and struct members are nullable
/// unless ` not null` follows their type.
///
/// # Errors
///
/// When a name is unknown (with the nearest known one), a parameter is out of range, nesting is
/// deeper than 16, a fixed size is over 1 048 576, a value would be wider than 16 MiB, or the type
/// cannot be a feature at all (union, map, interval, null, run-end encoded).
pub fn parse_type(text: &str) -> Result<DataType, TypeError> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(TypeError::new(format!(
            "the type is {} bytes long; the limit is {MAX_TEXT_BYTES}",
            text.len()
        )));
    }
    let mut parser = Parser { text, at: 0 };
    let data_type = parser.parse(0)?;
    parser.spaces();
    if parser.at < text.len() {
        return Err(TypeError::new(format!(
            "\"{}\" is left over after the type \"{}\"",
            excerpt(parser.rest()),
            format_type(&data_type)
        )));
    }
    if fixed_bytes(&data_type) > MAX_VALUE_BYTES {
        return Err(TypeError::new(format!(
            "one value would take {} bytes; the limit is {MAX_VALUE_BYTES}",
            fixed_bytes(&data_type)
        )));
    }
    Ok(data_type)
}

/// Bytes that a value takes for its fixed-width parts, saturating.
fn fixed_bytes(data_type: &DataType) -> u64 {
    match data_type {
        DataType::FixedSizeBinary(size) => u64::try_from(*size).unwrap_or(u64::MAX),
        DataType::FixedSizeList(item, size) => {
            fixed_bytes(item.data_type()).saturating_mul(u64::try_from(*size).unwrap_or(u64::MAX))
        }
        DataType::Struct(members) => members.iter().fold(0, |sum: u64, member| {
            sum.saturating_add(fixed_bytes(member.data_type()))
        }),
        // A variable-width value is an offset or a view in its column.
        other => other.primitive_width().unwrap_or(16) as u64,
    }
}

fn excerpt(text: &str) -> String {
    text.chars().take(40).flat_map(char::escape_debug).collect()
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn spaces(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
    }

    /// Takes `token` if it is next, spaces before it aside.
    fn take(&mut self, token: &str) -> bool {
        self.spaces();
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn expect(&mut self, token: &str, whole: &str) -> Result<(), TypeError> {
        if self.take(token) {
            return Ok(());
        }
        let found = if self.rest().is_empty() {
            "the end".to_owned()
        } else {
            format!("\"{}\"", excerpt(self.rest()))
        };
        Err(TypeError::new(format!(
            "\"{token}\" is due in {whole}, found {found}"
        )))
    }

    /// Takes everything before the first of `stops`, trimmed; `None` when no stop follows.
    fn until(&mut self, stops: &[char]) -> Option<&'a str> {
        let taken = self.rest().split(stops).next()?;
        if taken.len() == self.rest().len() {
            return None;
        }
        self.at += taken.len();
        Some(taken.trim())
    }

    fn word(&mut self) -> &'a str {
        self.spaces();
        let rest = self.rest();
        let bytes = rest
            .find(|c: char| !(c.is_alphanumeric() || c == '_'))
            .unwrap_or(rest.len());
        self.at += bytes;
        rest.get(..bytes).unwrap_or("")
    }

    fn parse(&mut self, depth: usize) -> Result<DataType, TypeError> {
        if depth >= MAX_DEPTH {
            return Err(TypeError::new(format!(
                "the type is nested deeper than {MAX_DEPTH} levels"
            )));
        }
        let name = self.word();
        match name {
            "timestamp" => self.timestamp(),
            "time32" => self.unit("time32", &["s", "ms"]).map(DataType::Time32),
            "time64" => self.unit("time64", &["us", "ns"]).map(DataType::Time64),
            "duration" => self
                .unit("duration", &["s", "ms", "us", "ns"])
                .map(DataType::Duration),
            "date32" => self.optional_unit("day", DataType::Date32),
            "date64" => self.optional_unit("ms", DataType::Date64),
            "fixed_size_binary" => self
                .size("fixed_size_binary", "bytes")
                .map(DataType::FixedSizeBinary),
            "decimal" | "decimal128" | "decimal256" => self.decimal(name),
            "list" => {
                let item = self.item("list", depth)?;
                if self.peek("[") {
                    self.size("list", "elements")
                        .map(|size| DataType::FixedSizeList(item, size))
                } else {
                    Ok(DataType::List(item))
                }
            }
            "large_list" => self.item("large_list", depth).map(DataType::LargeList),
            "fixed_size_list" => {
                let item = self.item("fixed_size_list", depth)?;
                let size = self.size("fixed_size_list", "elements")?;
                Ok(DataType::FixedSizeList(item, size))
            }
            "struct" => self.members(depth),
            "dictionary" => self.dictionary(depth),
            _ => simple(name).ok_or_else(|| unknown(name, self.rest())),
        }
    }

    fn peek(&mut self, token: &str) -> bool {
        self.spaces();
        self.rest().starts_with(token)
    }

    fn timestamp(&mut self) -> Result<DataType, TypeError> {
        const FORM: &str = "timestamp[unit, tz=zone]";
        self.expect("[", FORM)?;
        let unit = self.unit_word("timestamp", &["s", "ms", "us", "ns"])?;
        let mut zone = None;
        if self.take(",") {
            self.expect("tz", FORM)?;
            self.expect("=", FORM)?;
            let name = self.until(&[']']).unwrap_or("");
            if !is_known_zone(name) {
                let problem = format!("unknown time zone \"{}\"", excerpt(name));
                return Err(match nearest_zone(name) {
                    Some(known) => TypeError::suggesting(problem, known),
                    None => TypeError::new(problem),
                });
            }
            zone = Some(Arc::from(name));
        }
        self.expect("]", FORM)?;
        Ok(DataType::Timestamp(unit, zone))
    }

    fn unit(&mut self, name: &str, known: &[&str]) -> Result<TimeUnit, TypeError> {
        let form = format!("{name}[{}]", known.join("|"));
        self.expect("[", &form)?;
        let unit = self.unit_word(name, known)?;
        self.expect("]", &form)?;
        Ok(unit)
    }

    fn unit_word(&mut self, name: &str, known: &[&str]) -> Result<TimeUnit, TypeError> {
        let word = self.word();
        let unit = match word {
            "s" => TimeUnit::Second,
            "ms" => TimeUnit::Millisecond,
            "us" => TimeUnit::Microsecond,
            _ => TimeUnit::Nanosecond,
        };
        if known.contains(&word) {
            Ok(unit)
        } else {
            Err(TypeError::new(format!(
                "unknown unit \"{}\" of {name} (known: {})",
                excerpt(word),
                known.join(", ")
            )))
        }
    }

    fn optional_unit(&mut self, unit: &str, data_type: DataType) -> Result<DataType, TypeError> {
        if self.take("[") {
            let form = format_type(&data_type);
            self.expect(unit, &form)?;
            self.expect("]", &form)?;
        }
        Ok(data_type)
    }

    fn size(&mut self, name: &str, what: &str) -> Result<i32, TypeError> {
        let form = format!("{name}[size]");
        self.expect("[", &form)?;
        let word = self.word();
        let size = word
            .parse::<i32>()
            .ok()
            .filter(|size| (1..=MAX_FIXED_SIZE).contains(size))
            .ok_or_else(|| {
                TypeError::new(format!(
                    "the size \"{}\" of {name} is not a number of {what} from 1 to {MAX_FIXED_SIZE}",
                    excerpt(word)
                ))
            })?;
        self.expect("]", &form)?;
        Ok(size)
    }

    fn decimal(&mut self, name: &str) -> Result<DataType, TypeError> {
        let form = format!("{name}(precision, scale)");
        self.expect("(", &form)?;
        let precision_word = self.word();
        let mut scale_word = "0";
        if self.take(",") {
            scale_word = self.until(&[')']).unwrap_or("");
        }
        self.expect(")", &form)?;
        let max_precision = match name {
            "decimal128" => DECIMAL128_MAX_PRECISION,
            _ => DECIMAL256_MAX_PRECISION,
        };
        let precision = precision_word
            .parse::<u8>()
            .ok()
            .filter(|precision| (1..=max_precision).contains(precision))
            .ok_or_else(|| {
                TypeError::new(format!(
                    "the precision \"{}\" of {name} is not a number from 1 to {max_precision}",
                    excerpt(precision_word)
                ))
            })?;
        let scale = scale_word
            .parse::<i8>()
            .ok()
            .filter(|scale| scale.unsigned_abs() <= precision)
            .ok_or_else(|| {
                TypeError::new(format!(
                    "the scale \"{}\" of {name} is not a number from -{precision} to {precision}",
                    excerpt(scale_word)
                ))
            })?;
        Ok(match name {
            "decimal256" => DataType::Decimal256(precision, scale),
            _ if precision > DECIMAL128_MAX_PRECISION => DataType::Decimal256(precision, scale),
            _ => DataType::Decimal128(precision, scale),
        })
    }

    /// `<item: type>` or `<type>`, whose name is then `item`.
    fn item(&mut self, name: &str, depth: usize) -> Result<FieldRef, TypeError> {
        let form = format!("{name}<item: type>");
        self.expect("<", &form)?;
        let item = self.child(Some("item"), depth)?;
        self.expect(">", &form)?;
        Ok(item)
    }

    fn members(&mut self, depth: usize) -> Result<DataType, TypeError> {
        const FORM: &str = "struct<name: type, ...>";
        self.expect("<", FORM)?;
        let mut members: Vec<FieldRef> = Vec::new();
        loop {
            let member = self.child(None, depth)?;
            if members.iter().any(|known| known.name() == member.name()) {
                return Err(TypeError::new(format!(
                    "struct has two members \"{}\"",
                    excerpt(member.name())
                )));
            }
            members.push(member);
            if !self.take(",") {
                break;
            }
        }
        self.expect(">", FORM)?;
        Ok(DataType::Struct(Fields::from(members)))
    }

    /// `name: type`, or a bare type where a default name is allowed, then maybe ` not null`.
    fn child(&mut self, default_name: Option<&str>, depth: usize) -> Result<FieldRef, TypeError> {
        let start = self.at;
        let name = match self.until(&[':', '<', '>', '[', ']', '(', ')', ',', '=']) {
            Some(name) if !name.is_empty() && self.take(":") => name,
            _ => {
                self.at = start;
                default_name.ok_or_else(|| {
                    TypeError::new(format!(
                        "a struct member is \"name: type\", found \"{}\"",
                        excerpt(self.rest())
                    ))
                })?
            }
        };
        if name.chars().any(char::is_control) {
            return Err(TypeError::new(format!(
                "the name \"{}\" has control characters",
                excerpt(name)
            )));
        }
        let data_type = self.parse(depth + 1)?;
        let nullable = !self.take("not null");
        Ok(Arc::new(Field::new(name, data_type, nullable)))
    }

    fn dictionary(&mut self, depth: usize) -> Result<DataType, TypeError> {
        const FORM: &str = "dictionary<values=type, indices=type, ordered=0>";
        self.expect("<", FORM)?;
        let mut values = None;
        let mut indices = DataType::Int32;
        loop {
            let setting = self.word();
            self.expect("=", FORM)?;
            match setting {
                "values" => values = Some(self.parse(depth + 1)?),
                "indices" => indices = self.parse(depth + 1)?,
                "ordered" => {
                    if !matches!(self.word(), "0" | "false") {
                        return Err(TypeError::suggesting(
                            "ordered dictionaries are not kept",
                            "ordered=0",
                        ));
                    }
                }
                other => {
                    return Err(TypeError::new(format!(
                        "unknown part \"{}\" of {FORM}",
                        excerpt(other)
                    )));
                }
            }
            if !self.take(",") {
                break;
            }
        }
        self.expect(">", FORM)?;
        let values =
            values.ok_or_else(|| TypeError::new(format!("\"values\" is missing in {FORM}")))?;
        if !indices.is_dictionary_key_type() {
            return Err(TypeError::new(format!(
                "the indices of a dictionary are integers, not {}",
                format_type(&indices)
            )));
        }
        if values.is_nested() || matches!(values, DataType::Dictionary(..)) {
            return Err(TypeError::new(format!(
                "the values of a dictionary are plain, not {}",
                format_type(&values)
            )));
        }
        Ok(DataType::Dictionary(Box::new(indices), Box::new(values)))
    }
}

fn simple(name: &str) -> Option<DataType> {
    SIMPLE
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, data_type)| data_type.clone())
}

fn unknown(name: &str, rest: &str) -> TypeError {
    let shown = if name.is_empty() { rest } else { name };
    if matches!(
        name,
        "map"
            | "null"
            | "union"
            | "sparse_union"
            | "dense_union"
            | "run_end_encoded"
            | "interval"
            | "month_interval"
            | "month_day_nano_interval"
    ) {
        return TypeError::new(format!("a feature cannot be of type \"{name}\""));
    }
    let problem = format!("unknown type \"{}\"", excerpt(shown));
    let known = SIMPLE
        .iter()
        .map(|(name, _)| *name)
        .chain(PARAMETRIC.iter().copied());
    let base = |name: &'static str| name.split(['[', '<', '(']).next().unwrap_or(name);
    match crate::names::nearest_by(shown, known, base) {
        Some(known) => TypeError::suggesting(problem, known),
        None => TypeError::new(problem),
    }
}
