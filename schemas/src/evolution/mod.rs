//! What a live table may become: the changes that need no file rewritten.
//!
//! A pure comparison of two definitions. Additions and widenings make a new definition version:
//! segments keep the version they were written with, and readers bring old rows up to date.
//! Everything that would change the meaning of stored rows is refused, naming the field.

mod sources;

use std::collections::BTreeMap;

use arrow_schema::DataType;

use crate::definition::{Feature, TableDefinition, TimeColumn};
use crate::policies::History;
use crate::types::format_type;

/// One difference between two definitions of a table.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// A new feature: older rows read as its default, or null.
    AddFeature {
        /// The feature.
        name: String,
    },
    /// A feature of a wider type: older rows are cast while reading.
    WidenFeature {
        /// The feature.
        name: String,
        /// Its type so far.
        from: DataType,
        /// Its type from now on.
        to: DataType,
    },
    /// A feature that refused null takes it from now on.
    AllowNull {
        /// The feature.
        name: String,
    },
    /// A setting with no effect on stored rows.
    Set {
        /// The setting, such as `table.ttl`.
        what: String,
        /// Its value so far, as TOML would have it; empty when it was not set.
        from: String,
        /// Its value from now on; empty when it is no longer set.
        to: String,
    },
}

impl Change {
    /// True when the storage schema changes, so that rows written from now on need a new
    /// definition version.
    pub fn needs_new_version(&self) -> bool {
        match self {
            Change::AddFeature { .. } | Change::WidenFeature { .. } | Change::AllowNull { .. } => {
                true
            }
            Change::Set { .. } => false,
        }
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Change::AddFeature { name } => write!(f, "add feature {name}"),
            Change::WidenFeature { name, from, to } => write!(
                f,
                "widen feature {name} from {} to {}",
                format_type(from),
                format_type(to)
            ),
            Change::AllowNull { name } => write!(f, "allow null in feature {name}"),
            Change::Set { what, from, to } => match (from.as_str(), to.as_str()) {
                ("", to) => write!(f, "set {what} to {to}"),
                (from, "") => write!(f, "unset {what} (was {from})"),
                (from, to) => write!(f, "change {what} from {from} to {to}"),
            },
        }
    }
}

/// A difference that a live table cannot take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvolutionError {
    /// Stored rows would change their meaning.
    #[error("{field} cannot change from {from} to {to}: {hint}")]
    Refused {
        /// The setting, such as `features.temp` or `table.history`.
        field: String,
        /// What it is.
        from: String,
        /// What it should become.
        to: String,
        /// Why not, and what to do instead.
        hint: String,
    },
}

fn refused(
    field: impl Into<String>,
    from: impl ToString,
    to: impl ToString,
    hint: &str,
) -> EvolutionError {
    EvolutionError::Refused {
        field: field.into(),
        from: from.to_string(),
        to: to.to_string(),
        hint: hint.to_owned(),
    }
}

const NEW_TABLE: &str = "make a new table and load it";

/// Lists what has to be done to turn `old` into `new`: empty when they say the same.
///
/// Both definitions have passed [`TableDefinition::check`]. Changes come in the order in which
/// settings stand in a definition.
///
/// Allowed: new features anywhere among the old ones, wider types ([`can_widen`]), null allowed
/// where it was refused, and description, owner, tags, ttl, max_future, unknown_fields, lookup,
/// defaults, sources and `from`, `format`, `zone`. A shorter history and an earlier late bound only
/// retire more rows, so they are allowed too.
///
/// # Errors
///
/// The first difference that is not allowed, in the same order.
pub fn plan_evolution(
    old: &TableDefinition,
    new: &TableDefinition,
) -> Result<Vec<Change>, EvolutionError> {
    if old.name != new.name {
        return Err(refused(
            "table.name",
            &old.name,
            &new.name,
            "a table keeps its name; make a new table",
        ));
    }
    let mut changes = Changes(Vec::new());
    changes.set("table.description", &old.description, &new.description);
    changes.set("table.owner", &old.owner, &new.owner);
    changes.set("table.tags", pairs(&old.tags), pairs(&new.tags));
    plan_entity(old, new, &mut changes)?;
    let event_times = (old.event_time.as_ref(), new.event_time.as_ref());
    plan_time("table.event_time", event_times, &mut changes)?;
    let created_times = (old.created_time.as_ref(), new.created_time.as_ref());
    plan_time("table.created_time", created_times, &mut changes)?;
    plan_history(old.history, new.history, &mut changes)?;
    changes.set("table.ttl", text(&old.ttl), text(&new.ttl));
    changes.set("table.max_future", old.max_future, new.max_future);
    plan_late_bound(old, new, &mut changes)?;
    changes.set(
        "table.unknown_fields",
        old.unknown_fields,
        new.unknown_fields,
    );
    changes.set("table.lookup", old.lookup, new.lookup);
    plan_features(old, new, &mut changes)?;
    sources::plan_batch(&old.batch, &new.batch, &mut changes);
    sources::plan_kafka(old.kafka.as_ref(), new.kafka.as_ref(), &mut changes);
    Ok(changes.0)
}

/// Whether every value of `from` is the same value in `to`, so that a stored column can be cast
/// while it is read.
///
/// Integers to larger ones (unsigned also to larger signed), floats to larger ones, integers to
/// floats that hold them exactly, strings and binary to their large and view layouts, decimals
/// to more digits at the same scale. Timestamps keep their unit: a finer one covers fewer years.
pub fn can_widen(from: &DataType, to: &DataType) -> bool {
    use DataType::{
        Binary, BinaryView, Decimal128, Decimal256, Float16, Float32, Float64, Int8, Int16, Int32,
        Int64, LargeBinary, LargeUtf8, UInt8, UInt16, UInt32, UInt64, Utf8, Utf8View,
    };
    match (from, to) {
        (Int8, Int16 | Int32 | Int64 | Float32 | Float64)
        | (Int16, Int32 | Int64 | Float32 | Float64)
        | (Int32, Int64 | Float64)
        | (UInt8, UInt16 | UInt32 | UInt64 | Int16 | Int32 | Int64 | Float32 | Float64)
        | (UInt16, UInt32 | UInt64 | Int32 | Int64 | Float32 | Float64)
        | (UInt32, UInt64 | Int64 | Float64)
        | (Float16, Float32 | Float64)
        | (Float32, Float64)
        | (Utf8, LargeUtf8 | Utf8View)
        | (Binary, LargeBinary | BinaryView) => true,
        (
            Decimal128(precision, scale),
            Decimal128(wider_precision, same_scale) | Decimal256(wider_precision, same_scale),
        )
        | (Decimal256(precision, scale), Decimal256(wider_precision, same_scale)) => {
            scale == same_scale && precision <= wider_precision && from != to
        }
        _ => false,
    }
}

struct Changes(Vec<Change>);

impl Changes {
    fn set(&mut self, what: impl Into<String>, from: impl ToString, to: impl ToString) {
        let (from, to) = (from.to_string(), to.to_string());
        if from != to {
            self.0.push(Change::Set {
                what: what.into(),
                from,
                to,
            });
        }
    }
}

fn plan_entity(
    old: &TableDefinition,
    new: &TableDefinition,
    changes: &mut Changes,
) -> Result<(), EvolutionError> {
    let names = |definition: &TableDefinition| {
        let names: Vec<&str> = definition
            .entity
            .iter()
            .map(|key| key.name.as_str())
            .collect();
        format!("[{}]", names.join(", "))
    };
    let (old_names, new_names) = (names(old), names(new));
    if old_names != new_names {
        let hint = format!("the entity key is what rows are stored by; {NEW_TABLE}");
        return Err(refused("table.entity", old_names, new_names, &hint));
    }
    for (old_key, new_key) in old.entity.iter().zip(&new.entity) {
        let field = format!("table.entity.{}", old_key.name);
        if old_key.data_type != new_key.data_type {
            return Err(refused(
                field,
                format_type(&old_key.data_type),
                format_type(&new_key.data_type),
                &format!("a key column is never widened; {NEW_TABLE}"),
            ));
        }
        changes.set(
            format!("{field}.from"),
            text(&old_key.from),
            text(&new_key.from),
        );
    }
    Ok(())
}

fn plan_time(
    field: &str,
    times: (Option<&TimeColumn>, Option<&TimeColumn>),
    changes: &mut Changes,
) -> Result<(), EvolutionError> {
    let (old, new) = match times {
        (None, None) => return Ok(()),
        (Some(old), Some(new)) => (old, new),
        (old, new) => {
            let shown = |time: Option<&TimeColumn>| {
                time.map_or_else(|| "none".to_owned(), |time| time.name.clone())
            };
            let hint = format!("stored rows are ordered by it; {NEW_TABLE}");
            return Err(refused(field, shown(old), shown(new), &hint));
        }
    };
    if old.name != new.name || old.data_type != new.data_type {
        let shown = |time: &TimeColumn| format!("{}: {}", time.name, format_type(&time.data_type));
        let hint = format!("its name and type stay; {NEW_TABLE}");
        return Err(refused(field, shown(old), shown(new), &hint));
    }
    changes.set(format!("{field}.from"), text(&old.from), text(&new.from));
    changes.set(
        format!("{field}.format"),
        text(&old.format),
        text(&new.format),
    );
    changes.set(format!("{field}.zone"), text(&old.zone), text(&new.zone));
    Ok(())
}

fn plan_history(old: History, new: History, changes: &mut Changes) -> Result<(), EvolutionError> {
    let hint = match (old, new) {
        _ if old == new => None,
        (History::All, History::For(_)) => None,
        (History::For(old), History::For(new)) if new < old => None,
        (History::For(_), History::For(_) | History::All) => {
            Some("versions past the old limit may be gone already")
        }
        (History::Latest, _) => Some("older versions were not kept"),
        (_, History::Latest) => Some("answers at past times would be lost; give a duration"),
        (History::All, History::All) => None,
    };
    match hint {
        Some(hint) => Err(refused(
            "table.history",
            old,
            new,
            &format!("{hint}, or {NEW_TABLE}"),
        )),
        None => {
            changes.set("table.history", old, new);
            Ok(())
        }
    }
}

/// A merge may have dropped a delete because, by the old bound, no older row could still arrive.
/// A later bound would let such a row in and undo the delete.
fn plan_late_bound(
    old: &TableDefinition,
    new: &TableDefinition,
    changes: &mut Changes,
) -> Result<(), EvolutionError> {
    let loosened = match (old.late_bound, new.late_bound) {
        (None, _) => false,
        (Some(_), None) => true,
        (Some(old), Some(new)) => new > old,
    };
    if loosened {
        return Err(refused(
            "table.late_bound",
            text(&old.late_bound),
            new.late_bound
                .map_or_else(|| "none".to_owned(), |bound| bound.to_string()),
            "deletes that guard against later rows may be gone already; it can only become shorter",
        ));
    }
    changes.set(
        "table.late_bound",
        text(&old.late_bound),
        text(&new.late_bound),
    );
    Ok(())
}

fn plan_features(
    old: &TableDefinition,
    new: &TableDefinition,
    changes: &mut Changes,
) -> Result<(), EvolutionError> {
    let mut last_kept: Option<(usize, &str)> = None;
    for feature in &old.features {
        let field = format!("features.{}", feature.name);
        let Some(at) = new
            .features
            .iter()
            .position(|kept| kept.name == feature.name)
        else {
            let hint = "a feature cannot be removed or renamed; leave it in and stop asking for it";
            let shown = format_type(&feature.data_type);
            return Err(refused(field, shown, "nothing", hint));
        };
        if let Some((before, name)) = last_kept.filter(|(before, _)| at < *before) {
            return Err(refused(
                field,
                format!("a place after {name}"),
                format!("place {} before place {}", at + 1, before + 1),
                "existing features keep their order; new ones may stand anywhere among them",
            ));
        }
        last_kept = Some((at, &feature.name));
    }
    for feature in &new.features {
        match old.feature(&feature.name) {
            Some(before) => plan_feature(before, feature, changes)?,
            None => plan_added(old, feature, changes)?,
        }
    }
    Ok(())
}

fn plan_added(
    old: &TableDefinition,
    feature: &Feature,
    changes: &mut Changes,
) -> Result<(), EvolutionError> {
    let field = format!("features.{}", feature.name);
    if old.column_index(&feature.name).is_some() {
        let hint = "the name is taken by a key or a time; give the feature another name";
        return Err(refused(field, "a key or time column", "a feature", hint));
    }
    if !feature.nullable && feature.default.is_none() {
        return Err(refused(
            field,
            "nothing",
            "a feature that refuses null",
            "stored rows have no value for it; give a default, or allow null",
        ));
    }
    changes.0.push(Change::AddFeature {
        name: feature.name.clone(),
    });
    Ok(())
}

fn plan_feature(old: &Feature, new: &Feature, changes: &mut Changes) -> Result<(), EvolutionError> {
    let field = format!("features.{}", old.name);
    if old.data_type != new.data_type {
        if !can_widen(&old.data_type, &new.data_type) {
            return Err(refused(
                field,
                format_type(&old.data_type),
                format_type(&new.data_type),
                narrowing_hint(&old.data_type, &new.data_type),
            ));
        }
        changes.0.push(Change::WidenFeature {
            name: old.name.clone(),
            from: old.data_type.clone(),
            to: new.data_type.clone(),
        });
    }
    match (old.nullable, new.nullable) {
        (true, false) => {
            return Err(refused(
                format!("{field}.null"),
                "allow",
                "refuse",
                "stored rows may be null already",
            ));
        }
        (false, true) => changes.0.push(Change::AllowNull {
            name: old.name.clone(),
        }),
        _ => {}
    }
    let json = |default: &Option<serde_json::Value>| text(default);
    changes.set(
        format!("{field}.description"),
        &old.description,
        &new.description,
    );
    changes.set(format!("{field}.from"), text(&old.from), text(&new.from));
    if new.default.is_none() && old.default.is_some() && !new.nullable {
        return Err(refused(
            format!("{field}.default"),
            json(&old.default),
            "nothing",
            "rows older than the feature have no other value; keep the default, or allow null",
        ));
    }
    changes.set(
        format!("{field}.default"),
        json(&old.default),
        json(&new.default),
    );
    changes.set(format!("{field}.tags"), pairs(&old.tags), pairs(&new.tags));
    Ok(())
}

fn narrowing_hint(old: &DataType, new: &DataType) -> &'static str {
    match (old, new) {
        (DataType::FixedSizeList(..), DataType::FixedSizeList(..)) => {
            "vectors of another size are another feature; add it under a new name"
        }
        (DataType::Timestamp(..), DataType::Timestamp(..)) => {
            "a finer unit covers fewer years and a zone changes the reading; add a new feature"
        }
        _ => "only widening keeps every stored value; add a new feature of that type",
    }
}

fn text(value: &Option<impl ToString>) -> String {
    value.as_ref().map_or_else(String::new, ToString::to_string)
}

fn pairs(map: &BTreeMap<String, String>) -> String {
    if map.is_empty() {
        return String::new();
    }
    let pairs: Vec<String> = map
        .iter()
        .map(|(name, value)| format!("{name} = {value:?}"))
        .collect();
    format!("{{ {} }}", pairs.join(", "))
}
