//! Every example is a definition that works, and says the same after a round trip.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use arrow_schema::{DataType, Field, TimeUnit};
use pinion_schemas::{Definition, History, ServiceDefinition, TableDefinition, plan_evolution};

fn example(name: &str) -> TableDefinition {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("examples")
        .join(format!("{name}.toml"));
    TableDefinition::parse_toml(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn every_example_parses_and_survives_a_round_trip() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let definition = Definition::parse_toml(&text)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        assert_eq!(
            definition.name(),
            name,
            "a file is named after what it defines"
        );
        let table = match definition {
            Definition::Table(table) => *table,
            Definition::Service(service) => {
                for (table, feature) in service.references() {
                    assert!(
                        example(table).feature(feature).is_some(),
                        "{table}:{feature}"
                    );
                }
                let again = ServiceDefinition::parse_toml(&service.to_toml());
                assert_eq!(again, Ok(service));
                names.insert(name);
                continue;
            }
        };

        let canonical = table.to_toml();
        assert_eq!(
            TableDefinition::parse_toml(&canonical).unwrap(),
            table,
            "{canonical}"
        );
        assert_eq!(
            TableDefinition::parse_toml(&canonical).unwrap().to_toml(),
            canonical
        );
        let json = serde_json::to_string(&table).unwrap();
        assert_eq!(
            serde_json::from_str::<TableDefinition>(&json).unwrap(),
            table,
            "{json}"
        );
        assert_eq!(plan_evolution(&table, &table), Ok(Vec::new()));
        names.insert(name);
    }
    let expected = [
        "airport_delays",
        "airports",
        "flight_routes",
        "item_graph",
        "planes",
        "user_events",
        "user_profile",
        "user_ranking",
        "weather",
    ];
    assert_eq!(names, expected.map(str::to_owned).into());
}

#[test]
fn the_schema_lists_keys_times_and_features_in_order() {
    let delays = example("airport_delays");
    let schema = delays.schema();
    let utc = DataType::Timestamp(TimeUnit::Second, Some("UTC".into()));
    assert_eq!(
        schema.field(0),
        &Field::new("origin", DataType::Utf8, false)
    );
    assert_eq!(schema.field(1), &Field::new("time", utc, false));
    let names: Vec<&str> = schema
        .fields()
        .iter()
        .map(|field| field.name().as_str())
        .collect();
    assert_eq!(
        names,
        ["origin", "time", "delay", "distance", "destination"]
    );
    assert_eq!(names, delays.column_names().collect::<Vec<_>>());
    let delay = schema.field(2);
    assert!(delay.is_nullable());
    assert_eq!(
        delay.metadata()["description"],
        "Minutes late; negative is early"
    );
    assert_eq!(delays.event_time_index(), Some(1));
    assert_eq!(delays.created_time_index(), None);
    assert_eq!(delays.first_feature_index(), 2);
    assert_eq!(delays.column_index("destination"), Some(4));
    assert_eq!(delays.column_index("nowhere"), None);
    assert_eq!(
        delays.feature("distance").map(|feature| &feature.data_type),
        Some(&DataType::Int32)
    );
    assert_eq!(delays.feature("origin"), None);
    let time = delays.event_time.unwrap();
    assert_eq!(time.from.as_deref(), Some("date"));
    assert_eq!(time.format.as_deref(), Some("%Y/%m/%d %H:%M"));
}

#[test]
fn a_composite_key_comes_first_and_in_its_order() {
    let routes = example("flight_routes");
    assert_eq!(routes.key_count(), 2);
    let keys = routes.key_fields();
    assert_eq!(keys[0].name(), "origin");
    assert_eq!(keys[1].name(), "destination");
    assert_eq!(routes.event_time_index(), Some(2));
}

#[test]
fn storage_holds_the_values_of_dictionaries() {
    let users = example("user_profile");
    let at = users.column_index("language").unwrap();
    assert!(matches!(
        users.schema().field(at).data_type(),
        DataType::Dictionary(..)
    ));
    assert_eq!(
        users.storage_schema().field(at).data_type(),
        &DataType::Utf8
    );
    let embedding = users.column_index("embedding").unwrap();
    assert_eq!(
        users.storage_schema().field(embedding),
        users.schema().field(embedding)
    );
    assert!(
        !users
            .schema()
            .field(users.column_index("is_premium").unwrap())
            .is_nullable()
    );
}

#[test]
fn a_table_without_event_time_has_no_time_column() {
    let planes = example("planes");
    assert_eq!(planes.history, History::Latest);
    assert_eq!(planes.event_time_index(), None);
    assert_eq!(planes.first_feature_index(), 1);
    assert_eq!(planes.batch.null_values, ["", "NA"]);
}
