//! Feature services: versions that stay, references that are checked, tables that are kept.

use pinion_feature_store::{ApplyError, ServicePlan, Store, StoreOptions};
use pinion_schemas::{ServiceDefinition, TableDefinition};

fn options() -> StoreOptions {
    StoreOptions {
        background: false,
        ..StoreOptions::default()
    }
}

fn open(dir: &tempfile::TempDir) -> Store {
    Store::init(dir.path()).unwrap();
    Store::open(dir.path(), options()).unwrap()
}

fn table(name: &str, features: &[&str]) -> TableDefinition {
    let features: Vec<String> = features
        .iter()
        .map(|f| format!("{f} = \"double\""))
        .collect();
    TableDefinition::parse_toml(&format!(
        "[table]\nname = {name:?}\nentity = [{{ name = \"id\", type = \"int64\" }}]\n[features]\n{}\n",
        features.join("\n")
    ))
    .unwrap()
}

fn service(features: &[&str]) -> ServiceDefinition {
    ServiceDefinition {
        name: "ranking".to_owned(),
        description: String::new(),
        owner: String::new(),
        features: features.iter().map(|f| (*f).to_owned()).collect(),
    }
}

fn features_of(store: &Store, reference: &str) -> Vec<String> {
    store
        .service(reference)
        .unwrap()
        .definition
        .features
        .clone()
}

#[test]
fn a_changed_list_is_a_new_version_and_the_old_one_stays_through_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let plans = store
        .apply_all(
            vec![table("user", &["age", "income"])],
            vec![service(&["user:age"])],
        )
        .unwrap();
    assert_eq!(plans.services[0].to_string(), "+ create service ranking@v1");
    let wider = service(&["user:income", "user:age"]);
    let plans = store.apply_all(Vec::new(), vec![wider.clone()]).unwrap();
    assert_eq!(
        plans.services,
        [ServicePlan::Change {
            service: "ranking".to_owned(),
            version: 2,
            changes: vec!["add user:income".to_owned()],
        }]
    );
    let catalog = store.catalog_version();
    let again = store.apply_all(Vec::new(), vec![wider.clone()]).unwrap();
    assert_eq!(
        again.services,
        [ServicePlan::Unchanged {
            service: "ranking".to_owned()
        }]
    );
    assert_eq!(store.catalog_version(), catalog);
    // Words about it make no version.
    let described = ServiceDefinition {
        description: "for the search page".to_owned(),
        ..wider
    };
    store.apply_all(Vec::new(), vec![described]).unwrap();
    drop(store);

    let store = open(&dir);
    assert_eq!(features_of(&store, "ranking"), ["user:income", "user:age"]);
    assert_eq!(features_of(&store, "ranking@v1"), ["user:age"]);
    assert_eq!(store.services()[0].versions.len(), 2);
    let newest = store.service("ranking@v2").unwrap();
    assert_eq!(newest.definition.description, "for the search page");
    for (reference, expected) in [
        ("ranking@v3", "ranking@v2"),
        ("ranking@2", "ranking@v2"),
        ("rankin", "ranking"),
    ] {
        let error = store.service(reference).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_service_names_only_what_is_there_after_the_same_apply() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    store.apply(vec![table("user", &["age"])]).unwrap();
    for (reference, expected) in [
        ("usr:age", "did you mean \"user\""),
        ("user:agee", "did you mean \"age\""),
        ("user:id", "no feature \"id\""),
    ] {
        let error = store
            .apply_all(vec![table("item", &["price"])], vec![service(&[reference])])
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
        // Nothing of the apply has happened.
        assert!(store.table("item").is_err());
    }
    store
        .apply_all(
            vec![table("user", &["age", "income"])],
            vec![service(&["user:income"])],
        )
        .unwrap();
    let twice = store.apply_all(
        Vec::new(),
        vec![service(&["user:age"]), service(&["user:age"])],
    );
    assert!(matches!(twice, Err(ApplyError::DuplicateService { .. })));
}

#[test]
fn a_table_that_a_service_names_is_not_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let tables = vec![table("user", &["age"]), table("item", &["price"])];
    store
        .apply_all(tables, vec![service(&["user:age", "item:price"])])
        .unwrap();
    // Even an old version that names it is in use.
    store
        .apply_all(Vec::new(), vec![service(&["user:age"])])
        .unwrap();
    let error = store.drop_table("item").unwrap_err();
    assert!(error.to_string().contains("ranking@v1"), "{error}");
    assert!(store.table("item").is_ok());
    let error = store.drop_service("ranking@v1").unwrap_err();
    assert!(error.to_string().contains("name alone"), "{error}");
    store.drop_service("ranking").unwrap();
    assert!(store.drop_service("ranking").is_err());
    store.drop_table("item").unwrap();
    assert!(store.services().is_empty());
}

#[test]
fn a_catalog_without_services_opens() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    store.apply(vec![table("user", &["age"])]).unwrap();
    drop(store);
    // What a release before services wrote is what this one writes without any.
    let catalog = std::fs::read_dir(dir.path().join("catalog"))
        .unwrap()
        .map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap());
    assert!(catalog.into_iter().all(|text| !text.contains("services")));
    assert!(open(&dir).services().is_empty());
}
