//! The same commands through a running server, and the server's own manners.

mod support;

use serde_json::{Value, json};
use support::{ROUTES, Server, Store, pinion, stderr};

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn every_command_answers_alike_over_tcp_and_the_socket() {
    let store = Store::with_rows();
    let commands: &[&[&str]] = &[
        &[
            "get",
            "weather",
            "EWR",
            "JFK",
            "XXX",
            "--as-of",
            "2013-01-01T06:30:00Z",
            "--output",
            "json",
        ],
        &["get", "weather", "JFK", "--as-of", "2013-01-01T12:00:00Z"],
        &["scan", "weather", "--output", "json"],
        &[
            "scan",
            "weather",
            "--view",
            "latest",
            "--filter",
            "temp > 40",
            "--output",
            "csv",
        ],
        &["ls"],
        &["describe", "routes", "--toml"],
    ];
    let direct: Vec<String> = commands.iter().map(|command| store.run(command)).collect();
    let server = Server::start(&store);
    for kind in ["flight", "uds"] {
        for (command, direct) in commands.iter().zip(&direct) {
            assert_eq!(&server.run(kind, command), direct, "{command:?} by {kind}");
        }
    }
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn tables_and_rows_are_changed_through_the_server() {
    let store = Store::empty();
    let server = Server::start(&store);
    let routes = store.write("routes.toml", ROUTES);
    let routes = routes.to_str().unwrap();
    assert_eq!(server.run("flight", &["plan", routes]), "+ create routes\n");
    assert_eq!(
        server.run("flight", &["apply", routes]),
        "+ create routes\n"
    );
    assert_eq!(
        server.run("flight", &["apply", routes]),
        "= unchanged routes\n"
    );
    let put = [
        "put",
        "routes",
        "origin=EWR",
        "number=5",
        "carrier=UA",
        "--id",
        "a",
        "--output",
        "json",
    ];
    let first = parse(&server.run("uds", &put));
    assert_eq!(
        (&first["rows"], &first["applied"], &first["durable"]),
        (&json!(1), &json!(true), &json!(true))
    );
    assert_eq!(parse(&server.run("uds", &put))["applied"], false);
    let get = ["get", "routes", "EWR,5", "--output", "json"];
    assert_eq!(parse(&server.run("flight", &get))[0]["carrier"], "UA");
    server.run("flight", &["flush", "routes"]);
    server.run("flight", &["merge", "--all"]);
    server.run("flight", &["delete", "routes", "EWR,5"]);
    assert_eq!(
        parse(&server.run("flight", &get))[0]["carrier__status"],
        "NOT_FOUND"
    );
    assert_eq!(server.stop(), Some(0));
    assert_eq!(store.json(&["scan", "routes"]), json!([]));
}

#[test]
fn a_directory_that_is_served_is_locked_for_everyone_else() {
    let store = Store::with_rows();
    let server = Server::start(&store);
    for command in [
        &["serve", "--flight", "127.0.0.1:0"][..],
        &["put", "weather", "-"],
        &["ls"],
    ] {
        let error = store.fails(command, 1);
        assert!(
            error.contains("is in use") && error.contains("--server"),
            "{error}"
        );
    }
    let output = pinion(&[
        "load",
        "weather",
        "x.csv",
        "--server",
        &server.url("flight"),
    ])
    .output()
    .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("works on a data directory"),
        "{}",
        stderr(&output)
    );
    assert_eq!(server.stop(), Some(0));
    assert_eq!(
        store.json(&["scan", "weather"]).as_array().unwrap().len(),
        3
    );
}

#[test]
fn errors_of_a_server_are_told_as_those_of_a_directory() {
    let store = Store::with_rows();
    let server = Server::start(&store);
    let fails = |arguments: &[&str]| {
        let output = pinion(arguments)
            .args(["--server", &server.url("flight")])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        stderr(&output)
    };
    assert!(fails(&["get", "wether", "EWR"]).contains("no table named \"wether\""));
    assert!(fails(&["scan", "weather", "--filter", "temp ~ 5"]).starts_with("error: "));
    assert!(fails(&["get", "weather", "EWR", "--features", "tmp"]).contains("tmp"));
    drop(server);
    let output = pinion(&["ls", "--server", "grpc://127.0.0.1:1"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("is the server running?"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn only_loopback_is_listened_on_unless_insecure_is_said() {
    let store = Store::empty();
    let error = store.fails(&["serve", "--flight", "0.0.0.0:0"], 1);
    assert!(error.contains("--insecure"), "{error}");
    let error = store.fails(&["serve", "--flight", "nonsense"], 2);
    assert!(error.contains("\"nonsense\" is no address"), "{error}");
}
