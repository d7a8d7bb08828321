//! The built binary, run on temporary directories.

// Every test file is a crate of its own and uses its part of this one.
#![allow(dead_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A store in a temporary directory, with one history table and one of composite keys.
pub struct Store {
    dir: tempfile::TempDir,
}

/// Hourly readings: every type of answer can be had from it.
pub const WEATHER: &str = r#"
[table]
name = "weather"
description = "Hourly readings"
entity = [{ name = "origin", type = "string" }]
event_time = { name = "at", type = "timestamp[s, tz=UTC]" }
history = "all"
ttl = "3h"

[features]
temp = "double"
hour = "int16"

[source.batch]
null_values = ["NA"]
"#;

/// One row per pair of airports.
pub const ROUTES: &str = r#"
[table]
name = "routes"
entity = [{ name = "origin", type = "string" }, { name = "number", type = "int32" }]

[features]
carrier = "string"
"#;

/// Three readings, one without a temperature.
pub const WEATHER_CSV: &str = "origin,at,temp,hour,extra\n\
    EWR,2013-01-01T06:00:00Z,39.5,6,x\n\
    EWR,2013-01-01T07:00:00Z,NA,7,y\n\
    JFK,2013-01-01T06:00:00Z,40.25,6,z\n";

/// The binary without settings from the caller's environment.
pub fn pinion(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pinion"));
    command.args(arguments).stdin(Stdio::null());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PINION_") {
            command.env_remove(name);
        }
    }
    command
}

/// Standard output as text.
pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

impl Store {
    /// A store without tables.
    pub fn empty() -> Store {
        let store = Store {
            dir: tempfile::tempdir().unwrap(),
        };
        store.run(&["init"]);
        store
    }

    /// A store with `weather` and `routes`, without rows.
    pub fn with_tables() -> Store {
        let store = Store::empty();
        let weather = store.write("weather.toml", WEATHER);
        let routes = store.write("routes.toml", ROUTES);
        store.run(&["apply", weather.to_str().unwrap(), routes.to_str().unwrap()]);
        store
    }

    /// A store whose `weather` holds [`WEATHER_CSV`].
    pub fn with_rows() -> Store {
        let store = Store::with_tables();
        let file = store.write("weather.csv", WEATHER_CSV);
        store.run(&["load", "weather", file.to_str().unwrap()]);
        store
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Writes a file beside the data directory.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Where a file beside the data directory is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command on this store.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = pinion(arguments);
        command
            .arg("--data")
            .arg(self.data())
            .current_dir(self.dir.path());
        command
    }

    /// Runs a command that must succeed; gives its standard output.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "pinion {arguments:?}: {}\n{}{}",
            output.status,
            stdout(&output),
            stderr(&output)
        );
        stdout(&output)
    }

    /// Runs a command with JSON output and parses it.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let mut arguments = arguments.to_vec();
        arguments.extend(["--output", "json"]);
        let text = self.run(&arguments);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    /// Runs a command that must fail with this exit code; gives its standard error.
    pub fn fails(&self, arguments: &[&str], code: i32) -> String {
        let output = self.command(arguments).output().unwrap();
        assert_eq!(
            output.status.code(),
            Some(code),
            "pinion {arguments:?}\n{}{}",
            stdout(&output),
            stderr(&output)
        );
        stderr(&output)
    }

    /// Runs a command with text on its standard input.
    pub fn run_with_input(&self, arguments: &[&str], input: &str) -> Output {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).unwrap();
        drop(stdin);
        child.wait_with_output().unwrap()
    }
}

/// A running `pinion serve`; killed when dropped, unless it was stopped.
pub struct Server {
    child: Option<std::process::Child>,
    /// What the ready file says.
    pub addresses: Value,
}

impl Server {
    /// Serves the store on a free port and a Unix socket.
    pub fn start(store: &Store) -> Server {
        let ready = store.path("ready.json");
        let _ = std::fs::remove_file(&ready);
        let socket = store.path("s");
        let child = store
            .command(&["serve", "--flight", "127.0.0.1:0"])
            .arg("--uds")
            .arg(&socket)
            .arg("--ready-file")
            .arg(&ready)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut server = Server {
            child: Some(child),
            addresses: Value::Null,
        };
        server.addresses = wait_for_json(&ready, server.child.as_mut().unwrap());
        server
    }

    /// The URL of one of its addresses.
    pub fn url(&self, kind: &str) -> String {
        let address = &self.addresses[kind];
        address
            .as_str()
            .or_else(|| address[0].as_str())
            .unwrap()
            .to_owned()
    }

    /// Runs a command through the server; it must succeed.
    pub fn run(&self, kind: &str, arguments: &[&str]) -> String {
        let output = pinion(arguments)
            .args(["--server", &self.url(kind)])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            stderr(&output)
        );
        stdout(&output)
    }

    /// Asks it to end, and gives its exit code.
    pub fn stop(mut self) -> Option<i32> {
        let mut child = self.child.take().unwrap();
        // The shell's own `kill`: a bare machine has no program of that name.
        let killed = Command::new("sh")
            .args(["-c", "kill \"$0\"", &child.id().to_string()])
            .status()
            .unwrap();
        assert!(killed.success());
        child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn wait_for_json(path: &Path, child: &mut std::process::Child) -> Value {
    for _ in 0..3_000 {
        if let Ok(text) = std::fs::read_to_string(path) {
            return serde_json::from_str(&text).unwrap();
        }
        if let Some(status) = child.try_wait().unwrap() {
            let mut said = String::new();
            if let Some(mut stderr) = child.stderr.take() {
                let _ = std::io::Read::read_to_string(&mut stderr, &mut said);
            }
            panic!("serve ended before it was ready: {status}\n{said}");
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("serve was not ready in 30 s");
}
