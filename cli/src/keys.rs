//! Keys on the command line: `EWR`, `EWR,AA` or `origin=EWR,carrier=AA`.
//!
//! Parts are split at commas. A comma, a quote or a backslash that belongs to a value is
//! written after a backslash or inside double quotes: `"a,b",c` and `a\,b,c` are both the two
//! parts `a,b` and `c`. When every part begins with the name of a key column and `=`, names
//! decide and the order is free; otherwise parts follow the order of the definition.

use arrow_array::ArrayRef;
use pinion_schemas::TableDefinition;

use crate::error::{CliError, CliResult};
use crate::values::key_column;

/// The key columns, in the definition's order, of the keys typed; one row per key.
///
/// # Errors
///
/// A key with too few, too many or unknown parts, or a part that is no value of its column's
/// type: the key, the column and the type are named.
pub fn parse_keys(definition: &TableDefinition, keys: &[String]) -> CliResult<Vec<ArrayRef>> {
    let rows = keys
        .iter()
        .map(|key| key_parts(definition, key))
        .collect::<CliResult<Vec<Vec<String>>>>()?;
    definition
        .entity
        .iter()
        .enumerate()
        .map(|(index, column)| {
            let texts: Vec<&str> = rows
                .iter()
                .filter_map(|row| row.get(index).map(String::as_str))
                .collect();
            key_column(&texts, &column.data_type)
                .map_err(|e| CliError::usage(format!("key column {}: {e}", column.name)))
        })
        .collect()
}

/// The parts of one key, in the definition's order.
fn key_parts(definition: &TableDefinition, key: &str) -> CliResult<Vec<String>> {
    let names: Vec<&str> = definition.entity.iter().map(|c| c.name.as_str()).collect();
    let expected = || {
        let pairs: Vec<String> = names.iter().map(|name| format!("{name}=…")).collect();
        format!(
            "keys of {} are written {} or {}",
            definition.name,
            vec!["…"; names.len()].join(","),
            pairs.join(",")
        )
    };
    let parts = split_parts(key)
        .ok_or_else(|| CliError::usage(format!("key {key:?}: a quote is not closed")))?;
    let named: Option<Vec<(usize, &str)>> = parts
        .iter()
        .map(|part| {
            let (name, value) = part.text.split_at_checked(part.equals_at?)?;
            let index = names.iter().position(|n| *n == name)?;
            Some((index, value.strip_prefix('=')?))
        })
        .collect();
    if let Some(named) = named {
        let mut values: Vec<Option<&str>> = vec![None; names.len()];
        for (index, value) in named {
            if let Some(slot) = values.get_mut(index)
                && slot.replace(value).is_some()
            {
                return Err(CliError::usage(format!(
                    "key {key:?} names {} twice",
                    names.get(index).unwrap_or(&"a column")
                )));
            }
        }
        let missing = values.iter().position(Option::is_none);
        if let Some(name) = missing.and_then(|index| names.get(index)) {
            return Err(CliError::usage(format!("key {key:?} lacks {name}")).hint(expected()));
        }
        return Ok(values.into_iter().flatten().map(str::to_owned).collect());
    }
    if parts.len() != names.len() {
        return Err(CliError::usage(format!(
            "key {key:?} has {} parts; a key of {} has {}",
            parts.len(),
            definition.name,
            names.len()
        ))
        .hint(expected()));
    }
    Ok(parts.into_iter().map(|part| part.text).collect())
}

/// A part of a key, without its quotes and backslashes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Part {
    text: String,
    /// Byte offset in `text` of the first `=` that is neither quoted nor escaped.
    equals_at: Option<usize>,
}

/// Splits at commas; `None` when a quote is not closed or a backslash ends the text.
fn split_parts(key: &str) -> Option<Vec<Part>> {
    let mut parts = vec![];
    let mut part = Part::default();
    let mut quoted = false;
    let mut characters = key.chars();
    while let Some(c) = characters.next() {
        match c {
            '\\' => part.text.push(characters.next()?),
            '"' => quoted = !quoted,
            ',' if !quoted => parts.push(std::mem::take(&mut part)),
            _ => {
                if c == '=' && !quoted && part.equals_at.is_none() {
                    part.equals_at = Some(part.text.len());
                }
                part.text.push(c);
            }
        }
    }
    parts.push(part);
    (!quoted).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::Array;
    use arrow_array::cast::AsArray;
    use arrow_array::types::Int32Type;

    fn routes() -> TableDefinition {
        TableDefinition::parse_toml(
            "[table]\nname = \"routes\"\nentity = [{ name = \"origin\", type = \"string\" }, \
             { name = \"number\", type = \"int32\" }]\n[features]\nx = \"int32\"\n",
        )
        .unwrap()
    }

    fn parse(keys: &[&str]) -> CliResult<Vec<ArrayRef>> {
        let keys: Vec<String> = keys.iter().map(|k| (*k).to_owned()).collect();
        parse_keys(&routes(), &keys)
    }

    #[test]
    fn keys_by_place_and_by_name_are_the_same() {
        let columns = parse(&["EWR,5", "number=6,origin=JFK"]).unwrap();
        let origin = columns[0].as_string::<i32>();
        assert_eq!((origin.value(0), origin.value(1)), ("EWR", "JFK"));
        assert_eq!(columns[1].as_primitive::<Int32Type>().values(), &[5, 6]);
    }

    #[test]
    fn commas_and_equal_signs_inside_values_are_quoted_or_escaped() {
        let columns = parse(&[
            "\"a,b\",1",
            "a\\,b,1",
            "x=y,2",
            "origin=\"q\\\"\",3",
            "\"\",4",
        ]);
        // The fourth names one column only, so its parts are taken by place.
        let columns = columns.unwrap();
        let origin = columns[0].as_string::<i32>();
        assert_eq!(origin.value(0), "a,b");
        assert_eq!(origin.value(1), "a,b");
        assert_eq!(origin.value(2), "x=y");
        assert_eq!(origin.value(3), "origin=q\"");
        assert_eq!(origin.value(4), "");
        assert_eq!(columns[1].len(), 5);
    }

    #[test]
    fn wrong_keys_are_named_with_what_is_expected() {
        let text = |keys: &[&str]| parse(keys).unwrap_err().render();
        assert!(text(&["EWR"]).contains("has 1 parts; a key of routes has 2"));
        assert!(text(&["EWR"]).contains("origin=…,number=…"));
        assert!(text(&["EWR,x"]).contains("key column number: \"x\" is no int32"));
        assert!(text(&["origin=a"]).contains("lacks number"));
        assert!(text(&["origin=a,origin=b"]).contains("twice"));
        assert!(text(&["\"EWR,5"]).contains("not closed"));
    }
}
