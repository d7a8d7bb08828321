//! What a live table takes, and what it refuses by name.

use arrow_schema::DataType;
use pinion_schemas::{
    Change, EvolutionError, TableDefinition, can_widen, parse_type, plan_evolution,
};

const BASE: &str = r#"
[table]
name = "t"
entity = [{ name = "id", type = "int64" }]
event_time = { name = "ts", type = "timestamp[us, tz=UTC]" }
history = "30d"
ttl = "7d"
late_bound = "2d"

[[feature]]
name = "a"
type = "int32"

[[feature]]
name = "b"
type = "list<item: float>[2]"

[[feature]]
name = "c"
type = "string"
null = "refuse"
default = "x"

[source.kafka]
topic = "t"

[source.kafka.options]
"sasl.password" = "old-secret"
"#;

fn base() -> TableDefinition {
    TableDefinition::parse_toml(BASE).unwrap()
}

/// The plan from the base definition to the same text with `from` replaced by `to`.
fn plan(from: &str, to: &str) -> Result<Vec<Change>, EvolutionError> {
    assert!(BASE.contains(from), "{from}");
    plan_evolution(
        &base(),
        &TableDefinition::parse_toml(&BASE.replace(from, to)).unwrap(),
    )
}

fn shown(changes: &[Change]) -> Vec<String> {
    changes.iter().map(ToString::to_string).collect()
}

#[test]
fn an_unchanged_definition_needs_nothing() {
    assert_eq!(plan("\n[table]", "\n# a comment\n[table]"), Ok(Vec::new()));
}

#[test]
fn a_feature_may_be_added_anywhere_and_makes_a_new_version() {
    let changes = plan(
        "[[feature]]\nname = \"b\"",
        "[[feature]]\nname = \"new\"\ntype = \"int8\"\n[[feature]]\nname = \"b\"",
    )
    .unwrap();
    assert_eq!(
        changes,
        [Change::AddFeature {
            name: "new".to_owned()
        }]
    );
    assert!(changes[0].needs_new_version());
}

#[test]
fn a_feature_may_be_widened_and_makes_a_new_version() {
    let changes = plan("int32", "double").unwrap();
    assert_eq!(
        changes,
        [Change::WidenFeature {
            name: "a".to_owned(),
            from: DataType::Int32,
            to: DataType::Float64
        }]
    );
    assert!(changes[0].needs_new_version());
    assert_eq!(shown(&changes), ["widen feature a from int32 to double"]);
}

#[test]
fn null_may_be_allowed_but_not_refused_later() {
    let changes = plan("null = \"refuse\"", "null = \"allow\"").unwrap();
    assert_eq!(
        changes,
        [Change::AllowNull {
            name: "c".to_owned()
        }]
    );
    assert!(changes[0].needs_new_version());
    let error = plan("type = \"int32\"", "type = \"int32\"\nnull = \"refuse\"").unwrap_err();
    assert_eq!(
        error.to_string(),
        "features.a.null cannot change from allow to refuse: stored rows may be null already"
    );
}

#[test]
fn settings_that_leave_stored_rows_alone_may_change() {
    for (from, to, change) in [
        (
            "ttl = \"7d\"",
            "ttl = \"8d\"",
            "change table.ttl from 7d to 8d",
        ),
        ("ttl = \"7d\"", "", "unset table.ttl (was 7d)"),
        (
            "ttl = \"7d\"",
            "ttl = \"7d\"\nowner = \"me\"",
            "set table.owner to me",
        ),
        (
            "ttl = \"7d\"",
            "ttl = \"7d\"\ntags = { a = \"b\" }",
            "set table.tags to { a = \"b\" }",
        ),
        (
            "ttl = \"7d\"",
            "ttl = \"7d\"\nmax_future = \"2h\"",
            "change table.max_future from 1h to 2h",
        ),
        (
            "ttl = \"7d\"",
            "ttl = \"7d\"\nlookup = \"rows\"",
            "change table.lookup from columns to rows",
        ),
        (
            "history = \"30d\"",
            "history = \"29d\"",
            "change table.history from 30d to 29d",
        ),
        (
            "late_bound = \"2d\"",
            "late_bound = \"1d\"",
            "change table.late_bound from 2d to 1d",
        ),
        (
            "default = \"x\"",
            "default = \"y\"",
            "change features.c.default from \"x\" to \"y\"",
        ),
        (
            "default = \"x\"",
            "default = \"x\"\ndescription = \"d\"",
            "set features.c.description to d",
        ),
        (
            "tz=UTC]\"",
            "tz=UTC]\", from = \"x.y\"",
            "set table.event_time.from to x.y",
        ),
        (
            "type = \"int64\"",
            "type = \"int64\", from = \"x.y\"",
            "set table.entity.id.from to x.y",
        ),
        (
            "topic = \"t\"",
            "topic = \"u\"",
            "change source.kafka.topic from t to u",
        ),
        (
            "topic = \"t\"",
            "topic = \"t\"\npartitions = [1]",
            "set source.kafka.partitions to [1]",
        ),
    ] {
        let changes = plan(from, to).unwrap();
        assert_eq!(shown(&changes), [change]);
        assert!(!changes[0].needs_new_version());
    }
}

#[test]
fn sources_may_come_and_go() {
    let changes = plan("[source.kafka]\ntopic = \"t\"\n\n[source.kafka.options]\n\"sasl.password\" = \"old-secret\"", "[source.batch]\nuri = \"/data/*.csv\"").unwrap();
    assert_eq!(
        shown(&changes),
        [
            "set source.batch.uri to /data/*.csv",
            "unset source.kafka (was topic t)"
        ]
    );
}

#[test]
fn a_changed_password_is_told_but_not_shown() {
    let changes = plan("old-secret", "new-secret").unwrap();
    assert_eq!(
        shown(&changes),
        ["change source.kafka.options.sasl.password from a value to another value"]
    );
}

#[test]
fn everything_else_is_refused_with_the_field_named() {
    for (from, to, field) in [
        ("name = \"t\"", "name = \"u\"", "table.name"),
        ("name = \"id\"", "name = \"uid\"", "table.entity"),
        (
            "entity = [",
            "entity = [{ name = \"k\", type = \"int8\" }, ",
            "table.entity",
        ),
        ("\"int64\"", "\"int32\"", "table.entity.id"),
        ("\"int64\"", "\"string\"", "table.entity.id"),
        ("timestamp[us", "timestamp[ns", "table.event_time"),
        ("\"ts\"", "\"time\"", "table.event_time"),
        (
            "ttl = \"7d\"",
            "ttl = \"7d\"\ncreated_time = { name = \"made\", type = \"date32\" }",
            "table.created_time",
        ),
        ("history = \"30d\"", "history = \"31d\"", "table.history"),
        ("history = \"30d\"", "history = \"all\"", "table.history"),
        ("history = \"30d\"", "history = \"latest\"", "table.history"),
        (
            "late_bound = \"2d\"",
            "late_bound = \"3d\"",
            "table.late_bound",
        ),
        ("late_bound = \"2d\"", "", "table.late_bound"),
        (
            "name = \"a\"\ntype = \"int32\"",
            "name = \"z\"\ntype = \"int32\"",
            "features.a",
        ),
        ("int32", "int16", "features.a"),
        ("int32", "string", "features.a"),
        ("int32", "uint64", "features.a"),
        ("[2]", "[3]", "features.b"),
        ("default = \"x\"", "", "features.c.default"),
        (
            "[source.kafka]",
            "[[feature]]\nname = \"d\"\ntype = \"int8\"\nnull = \"refuse\"\n[source.kafka]",
            "features.d",
        ),
    ] {
        let EvolutionError::Refused { field: refused, .. } = plan(from, to).unwrap_err();
        assert_eq!(refused, field, "{from} -> {to}");
    }
}

#[test]
fn latest_tables_cannot_get_a_history_afterwards() {
    let latest = TableDefinition::parse_toml(&BASE.replace("\"30d\"", "\"latest\"")).unwrap();
    let error = plan_evolution(&latest, &base()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "table.history cannot change from latest to 30d: older versions were not kept, or make a new \
         table and load it"
    );
}

#[test]
fn all_history_may_be_cut_to_a_duration() {
    let all = TableDefinition::parse_toml(&BASE.replace("\"30d\"", "\"all\"")).unwrap();
    assert_eq!(
        shown(&plan_evolution(&all, &base()).unwrap()),
        ["change table.history from all to 30d"]
    );
}

#[test]
fn existing_features_keep_their_order() {
    let swapped = BASE
        .replace("name = \"a\"\ntype = \"int32\"", "name = \"tmp\"")
        .replace(
            "name = \"b\"\ntype = \"list<item: float>[2]\"",
            "name = \"a\"\ntype = \"int32\"",
        )
        .replace(
            "name = \"tmp\"",
            "name = \"b\"\ntype = \"list<item: float>[2]\"",
        );
    let swapped = TableDefinition::parse_toml(&swapped).unwrap();
    assert_eq!(
        plan_evolution(&base(), &swapped).unwrap_err().to_string(),
        "features.b cannot change from a place after a to place 1 before place 2: existing features \
         keep their order; new ones may stand anywhere among them"
    );
}

#[test]
fn widening_keeps_every_value() {
    let ladders: &[&[&str]] = &[
        &["int8", "int16", "int32", "int64"],
        &["uint8", "uint16", "uint32", "uint64"],
        &["uint8", "int16", "int32", "int64"],
        &["uint16", "int32"],
        &["uint32", "int64"],
        &["halffloat", "float", "double"],
        &["int16", "float"],
        &["uint16", "float"],
        &["int32", "double"],
        &["uint32", "double"],
        &["string", "large_string"],
        &["string", "string_view"],
        &["binary", "large_binary"],
        &["binary", "binary_view"],
        &[
            "decimal128(5, 2)",
            "decimal128(6, 2)",
            "decimal256(40, 2)",
            "decimal256(41, 2)",
        ],
    ];
    for ladder in ladders {
        for (i, from) in ladder.iter().enumerate() {
            for (j, to) in ladder.iter().enumerate() {
                let (from, to) = (parse_type(from).unwrap(), parse_type(to).unwrap());
                assert_eq!(can_widen(&from, &to), i < j, "{from} -> {to}");
            }
        }
    }
    for (from, to) in [
        ("int32", "float"),
        ("int64", "double"),
        ("int8", "uint16"),
        ("uint8", "int8"),
        ("timestamp[s]", "timestamp[ms]"),
        ("date32", "date64"),
        ("decimal128(5, 2)", "decimal128(6, 3)"),
        ("large_string", "string"),
        ("string", "binary"),
        ("list<int8>", "list<int16>"),
    ] {
        assert!(
            !can_widen(&parse_type(from).unwrap(), &parse_type(to).unwrap()),
            "{from} -> {to}"
        );
    }
}
