//! Commands on a data directory that no server has open.

mod support;

use serde_json::json;
use support::{ROUTES, Store, WEATHER, pinion, stderr, stdout};

#[test]
fn applied_tables_are_listed_and_described() {
    let store = Store::with_tables();
    let listed = store.run(&["ls"]);
    assert!(
        listed.contains("weather") && listed.contains("origin string, number int32"),
        "{listed}"
    );
    let described = store.run(&["describe", "weather"]);
    assert!(described.contains("Hourly readings"), "{described}");
    assert!(described.contains("timestamp[s, tz=UTC]"), "{described}");
    let json = store.json(&["describe", "weather"]);
    assert_eq!(json["definition"]["name"], "weather");
    assert_eq!(json["stats"]["rows"], 0);
    let toml = store.write("again.toml", &store.run(&["describe", "weather", "--toml"]));
    let again = store.run(&["apply", toml.to_str().unwrap()]);
    assert_eq!(again, "= unchanged weather\n");
}

#[test]
fn a_feature_service_is_applied_beside_tables_listed_and_described() {
    let store = Store::with_tables();
    let text = "[service]\nname = \"storm\"\nowner = \"forecast\"\nfeatures = [\"weather:temp\"]\n";
    let file = store.write("storm.toml", text);
    let file = file.to_str().unwrap();
    assert_eq!(store.run(&["apply", file]), "+ create service storm@v1\n");
    assert_eq!(store.run(&["plan", file]), "= unchanged service storm\n");
    store.write(
        "storm.toml",
        &text.replace("[\"weather:temp\"]", "[\"weather:hour\", \"weather:temp\"]"),
    );
    let plan = store.run(&["apply", file]);
    assert_eq!(plan, "~ change service storm@v2\n    add weather:hour\n");
    let listed = store.run(&["ls"]);
    assert!(
        listed.contains("storm@v2") && listed.contains("forecast"),
        "{listed}"
    );
    let described = store.run(&["describe", "--service", "storm"]);
    assert!(described.contains("storm@v1"), "{described}");
    assert!(described.contains("weather:hour"), "{described}");
    let first = store.run(&["describe", "--service", "storm@v1", "--toml"]);
    assert!(
        first.contains("weather:temp") && !first.contains("hour"),
        "{first}"
    );
    store.write("storm.toml", &text.replace("weather:temp", "weather:tmp"));
    let error = store.fails(&["apply", file], 1);
    assert!(
        error.contains("weather:tmp") && error.contains("temp"),
        "{error}"
    );
}

#[test]
fn a_plan_shows_changes_and_makes_none() {
    let store = Store::with_tables();
    let changed = WEATHER.replace("ttl = \"3h\"", "ttl = \"6h\"")
        + "\n[[feature]]\nname = \"wind\"\ntype = \"float\"\n";
    // The long form of features stands before the sources in a file made by hand.
    let changed = changed.replace("[source.batch]\nnull_values = [\"NA\"]\n", "");
    let file = store.write("changed.toml", &changed);
    let file = file.to_str().unwrap();
    let plan = store.run(&["plan", file]);
    assert!(plan.starts_with("~ change weather\n"), "{plan}");
    assert!(plan.contains("wind") && plan.contains("ttl"), "{plan}");
    assert_eq!(store.run(&["plan", file]), plan);
    store.run(&["apply", file]);
    assert_eq!(store.run(&["plan", file]), "= unchanged weather\n");
}

#[test]
fn a_refused_change_names_the_field_and_changes_nothing() {
    let store = Store::with_tables();
    let narrowed = WEATHER.replace("temp = \"double\"", "temp = \"float\"");
    let fresh = ROUTES.replace("routes", "others");
    let bad = store.write("narrowed.toml", &narrowed);
    let good = store.write("others.toml", &fresh);
    let error = store.fails(&["apply", good.to_str().unwrap(), bad.to_str().unwrap()], 1);
    assert!(
        error.contains("weather") && error.contains("temp"),
        "{error}"
    );
    assert!(!store.run(&["ls"]).contains("others"));
}

#[test]
fn malformed_definitions_name_the_file_the_line_and_a_hint() {
    let store = Store::empty();
    let file = store.write("bad.toml", "[table]\nname = \"x\"\nentity = [\n");
    let error = store.fails(&["apply", file.to_str().unwrap()], 1);
    assert!(error.contains("bad.toml: line "), "{error}");
    let unknown = WEATHER.replace("temp = \"double\"", "temp = \"flaot64\"");
    let file = store.write("unknown.toml", &unknown);
    let error = store.fails(&["apply", file.to_str().unwrap()], 1);
    assert!(
        error.contains("flaot64") && error.contains("float64"),
        "{error}"
    );
    let error = store.fails(&["apply", "nowhere.toml"], 1);
    assert!(error.contains("nowhere.toml"), "{error}");
}

#[test]
fn loaded_rows_are_found_by_get_and_scan() {
    let store = Store::with_rows();
    let rows = store.json(&[
        "get",
        "weather",
        "EWR",
        "JFK",
        "XXX",
        "--as-of",
        "2013-01-01T06:30:00Z",
    ]);
    assert_eq!(
        rows,
        json!([
            {"origin": "EWR", "at": "2013-01-01T06:00:00Z", "temp": 39.5, "hour": 6,
             "temp__status": "PRESENT", "hour__status": "PRESENT"},
            {"origin": "JFK", "at": "2013-01-01T06:00:00Z", "temp": 40.25, "hour": 6,
             "temp__status": "PRESENT", "hour__status": "PRESENT"},
            {"origin": "XXX", "at": null, "temp": null, "hour": null,
             "temp__status": "NOT_FOUND", "hour__status": "NOT_FOUND"},
        ])
    );
    let rows = store.json(&[
        "get",
        "weather",
        "EWR",
        "-f",
        "temp",
        "--as-of",
        "2013-01-01T07:00:00Z",
    ]);
    assert_eq!(rows[0]["temp__status"], "NULL_VALUE");
    let scanned = store.json(&[
        "scan",
        "weather",
        "--features",
        "origin,temp",
        "--filter",
        "temp > 40",
    ]);
    assert_eq!(scanned, json!([{"origin": "JFK", "temp": 40.25}]));
    assert_eq!(
        store.json(&["scan", "weather"]).as_array().unwrap().len(),
        3
    );
    let latest = store.json(&["scan", "weather", "--view", "latest"]);
    assert_eq!(latest.as_array().unwrap().len(), 2);
    let csv = store.run(&[
        "scan",
        "weather",
        "--features",
        "hour,origin",
        "--limit",
        "1",
        "--output",
        "csv",
    ]);
    assert_eq!(csv.lines().count(), 2);
    assert!(csv.starts_with("hour,origin\n"), "{csv}");
}

#[test]
fn an_expired_value_is_explained() {
    let store = Store::with_rows();
    let text = store.run(&["get", "weather", "JFK", "--as-of", "2013-01-01T12:00:00Z"]);
    assert!(text.contains("OUTSIDE_MAX_AGE"), "{text}");
    assert!(
        text.contains("6h before 2013-01-01T12:00:00Z (--as-of); the ttl of weather is 3h"),
        "{text}"
    );
    let kept = store.json(&[
        "get",
        "weather",
        "JFK",
        "--as-of",
        "2013-01-01T12:00:00Z",
        "--keep-expired",
    ]);
    assert_eq!(kept[0]["temp"], 40.25);
    assert_eq!(kept[0]["temp__status"], "OUTSIDE_MAX_AGE");
    let text = store.run(&["get", "weather", "XXX"]);
    assert!(
        text.contains("NOT_FOUND: weather has no row of XXX"),
        "{text}"
    );
}

#[test]
fn an_arrow_scan_is_a_stream_that_any_reader_opens() {
    let store = Store::with_rows();
    let output = store
        .command(&["scan", "weather", "--output", "arrow"])
        .output()
        .unwrap();
    let reader = arrow_ipc::reader::StreamReader::try_new(output.stdout.as_slice(), None).unwrap();
    let rows: usize = reader.map(|batch| batch.unwrap().num_rows()).sum();
    assert_eq!(rows, 3);
}

#[test]
fn a_put_is_visible_and_an_id_counts_once() {
    let store = Store::with_tables();
    let text = store.run(&["put", "routes", "origin=EWR", "number=5", "carrier=UA"]);
    assert!(text.starts_with("put 1 row of routes: durable"), "{text}");
    let rows = "{\"origin\": \"JFK\", \"number\": 6, \"carrier\": \"DL\"}\n\
                {\"origin\": \"LGA\", \"number\": 7}\n";
    for applied in [true, false] {
        let arguments = ["put", "routes", "-", "--id", "one", "--output", "json"];
        let output = store.run_with_input(&arguments, rows);
        assert!(output.status.success(), "{}", stderr(&output));
        let ack: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
        assert_eq!(
            (&ack["applied"], &ack["durable"]),
            (&json!(applied), &json!(true))
        );
    }
    let file = store.write("more.csv", "origin,number,carrier\nBOS,8,B6\n");
    store.run(&["put", "routes", file.to_str().unwrap()]);
    let rows = store.json(&[
        "get",
        "routes",
        "EWR,5",
        "number=6,origin=JFK",
        "LGA,7",
        "BOS,8",
    ]);
    let carriers: Vec<_> = rows
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["carrier"].clone())
        .collect();
    assert_eq!(
        carriers,
        [json!("UA"), json!("DL"), json!(null), json!("B6")]
    );
}

#[test]
fn a_refused_put_names_the_row_and_the_column() {
    let store = Store::with_tables();
    let output = store.run_with_input(
        &["put", "routes", "-"],
        "{\"origin\": \"a\", \"number\": 1}\n{\"origin\": \"b\", \"number\": \"2\"}\n",
    );
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("row 2") && stderr(&output).contains("number"),
        "{}",
        stderr(&output)
    );
    let error = store.fails(&["put", "routes", "origin=a", "numbr=1"], 2);
    assert!(error.contains("origin, number, carrier"), "{error}");
    let error = store.fails(&["put", "weather", "origin=a", "temp=1"], 1);
    assert!(error.contains("at"), "{error}");
    assert_eq!(store.json(&["scan", "routes"]), json!([]));
}

#[test]
fn deleted_keys_are_gone_from_then_on() {
    let store = Store::with_rows();
    let text = store.run(&["delete", "weather", "EWR", "--at", "2013-01-01T06:30:00Z"]);
    assert!(
        text.starts_with("delete 1 key of weather: durable"),
        "{text}"
    );
    let status = |at: &str| {
        store.json(&["get", "weather", "EWR", "--features", "hour", "--as-of", at])[0]["hour__status"].clone()
    };
    assert_eq!(status("2013-01-01T06:15:00Z"), "PRESENT");
    assert_eq!(status("2013-01-01T06:45:00Z"), "NOT_FOUND");
    assert_eq!(status("2013-01-01T07:15:00Z"), "PRESENT");
    store.fails(
        &["delete", "routes", "EWR,5", "--at", "2013-01-01T06:30:00Z"],
        2,
    );
}

#[test]
fn flush_merge_and_check_leave_the_answers_as_they_are() {
    let store = Store::with_rows();
    store.run(&[
        "put",
        "weather",
        "origin=EWR",
        "at=2013-01-01T06:00:00Z",
        "temp=1",
        "hour=6",
    ]);
    let mut before = store.json(&["scan", "weather", "--view", "latest"]);
    assert_eq!(store.run(&["flush", "weather"]), "flushed weather\n");
    assert_eq!(store.run(&["merge", "--all"]).lines().count(), 2);
    let mut after = store.json(&["scan", "weather", "--view", "latest"]);
    for rows in [&mut before, &mut after] {
        rows.as_array_mut()
            .unwrap()
            .sort_by_key(|row| row.to_string());
    }
    assert_eq!(before, after);
    let checked = store.run(&["check"]);
    assert!(checked.contains("nothing wrong"), "{checked}");
    assert_eq!(store.json(&["check"])["problems"], json!([]));
}

#[test]
fn check_names_a_damaged_segment() {
    let store = Store::with_rows();
    store.run(&["merge", "weather"]);
    let mut damaged = 0;
    let mut folders = vec![store.data()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "arrow") {
                let mut bytes = std::fs::read(&path).unwrap();
                // The body of the first batch starts at 4096.
                bytes[4_100] ^= 1;
                std::fs::remove_file(&path).unwrap();
                std::fs::write(&path, bytes).unwrap();
                damaged += 1;
            }
        }
    }
    assert!(damaged > 0);
    let output = store.command(&["check"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stdout(&output).contains("weather"),
        "{}{}",
        stdout(&output),
        stderr(&output)
    );
}

#[test]
fn a_bad_cell_is_named_and_nothing_is_loaded_unless_told_to_skip() {
    let store = Store::with_tables();
    let file = store.write(
        "bad.csv",
        "origin,at,temp,hour\nEWR,2013-01-01T06:00:00Z,1,6\nJFK,2013-01-01T06:00:00Z,warm,6\n",
    );
    let file = file.to_str().unwrap();
    let error = store.fails(&["load", "weather", file], 1);
    assert!(error.contains("temp") && error.contains("warm"), "{error}");
    assert_eq!(store.json(&["scan", "weather"]), json!([]));
    let report = store.json(&["load", "weather", file, "--on-error", "skip"]);
    assert_eq!(
        (&report["rows_loaded"], &report["refused_total"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(
        store.json(&["scan", "weather"]).as_array().unwrap().len(),
        1
    );
    let error = store.fails(&["load", "weather", file, "--on-error", "quarantine"], 2);
    assert!(error.contains("--quarantine"), "{error}");
}

#[test]
fn unknown_names_are_answered_with_a_hint() {
    let store = Store::with_rows();
    let error = store.fails(&["get", "wether", "EWR"], 1);
    assert!(
        error.contains("no table named \"wether\"") && error.contains("weather"),
        "{error}"
    );
    let error = store.fails(&["get", "weather", "EWR", "--features", "tmp"], 1);
    assert!(error.contains("tmp") && error.contains("temp"), "{error}");
    let error = store.fails(&["get", "routes", "EWR"], 2);
    assert!(error.contains("origin=…,number=…"), "{error}");
    let error = store.fails(&["get", "routes", "EWR,x"], 2);
    assert!(error.contains("\"x\" is no int32"), "{error}");
    let error = store.fails(&["scan", "weather", "--filter", "temp ~ 5"], 1);
    assert!(error.starts_with("error: "), "{error}");
}

#[test]
fn without_a_store_or_a_server_the_error_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let output = pinion(&["ls"]).current_dir(dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let error = stderr(&output);
    assert!(
        error.contains("--data DIR") && error.contains("PINION_SERVER"),
        "{error}"
    );
    let output = pinion(&["ls", "--data", "nowhere"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("pinion init"),
        "{}",
        stderr(&output)
    );
    assert!(
        pinion(&["init"])
            .current_dir(dir.path())
            .output()
            .unwrap()
            .status
            .success()
    );
    assert!(
        pinion(&["ls"])
            .current_dir(dir.path())
            .output()
            .unwrap()
            .status
            .success()
    );
    let output = pinion(&["ls", "--data", "x", "--server", "grpc://127.0.0.1:1"])
        .output()
        .unwrap();
    assert!(stderr(&output).contains("give one of --data and --server"));
}

#[test]
fn settings_are_merged_and_printed_with_their_origin() {
    let store = Store::empty();
    let file = store.write(
        "pinion.toml",
        "[store]\nmax_segments = 4\n[kafka.options]\n\"sasl.password\" = \"hunter2\"\n",
    );
    let output = store
        .command(&[
            "config",
            "--output",
            "json",
            "--config",
            file.to_str().unwrap(),
        ])
        .env("PINION__STORE__SNAPSHOT_GRACE", "90s")
        .output()
        .unwrap();
    let text = stdout(&output);
    assert!(!text.contains("hunter2"), "{text}");
    let rows: serde_json::Value = serde_json::from_str(&text).unwrap();
    let origin = |name: &str| {
        let rows = rows.as_array().unwrap();
        let row = rows.iter().find(|row| row["setting"] == name).unwrap();
        (
            row["value"].clone(),
            row["origin"].as_str().unwrap().to_owned(),
        )
    };
    assert_eq!(
        origin("store.snapshot_grace"),
        (
            json!("90s"),
            "environment PINION__STORE__SNAPSHOT_GRACE".to_owned()
        )
    );
    assert!(origin("store.max_segments").1.ends_with("pinion.toml:2"));
    assert_eq!(origin("data").1, "flag --data");
    let wrong = store.write("wrong.toml", "[store]\nmax_segment = 4\n");
    let error = store.fails(&["ls", "--config", wrong.to_str().unwrap()], 2);
    assert!(
        error.contains("wrong.toml:2") && error.contains("store.max_segments"),
        "{error}"
    );
}

#[test]
fn help_teaches_and_versions_are_told() {
    let commands = [
        "init",
        "apply",
        "plan",
        "load",
        "serve",
        "get",
        "scan",
        "ls",
        "describe",
        "put",
        "delete",
        "flush",
        "merge",
        "check",
        "demo",
        "config",
        "version",
        "completions",
    ];
    for command in commands {
        let output = pinion(&[command, "--help"]).output().unwrap();
        let text = stdout(&output);
        assert!(text.contains("EXAMPLES:"), "{command}: {text}");
        assert!(
            !text.contains('\u{1b}'),
            "{command} is coloured although this is no terminal"
        );
    }
    let output = pinion(&["version", "--output", "json"]).output().unwrap();
    let versions: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(versions["pinion"], env!("CARGO_PKG_VERSION"));
    assert!(versions["librdkafka"].as_str().unwrap().starts_with('2'));
    let output = pinion(&["completions", "bash"]).output().unwrap();
    assert!(stdout(&output).contains("pinion"));
    assert_eq!(pinion(&["gett"]).output().unwrap().status.code(), Some(2));
}
