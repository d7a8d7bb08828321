//! What the benchmark programs share: `--name value` arguments, and the CPU time used.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::str::FromStr;

/// Arguments of the form `--name value`.
pub struct Arguments {
    values: BTreeMap<String, String>,
}

impl Arguments {
    /// The process's arguments. Prints `usage` and exits when they are not of that form or
    /// one is not named in it.
    pub fn parse(usage: &str) -> Arguments {
        let mut values = BTreeMap::new();
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let name = word
                .strip_prefix("--")
                .filter(|name| usage.contains(&format!("--{name} ")));
            match (name, words.next()) {
                (Some(name), Some(value)) => values.insert(name.to_owned(), value),
                _ => {
                    eprintln!("{usage}");
                    std::process::exit(2);
                }
            };
        }
        Arguments { values }
    }

    pub fn text(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// A required argument.
    pub fn needed(&self, name: &str) -> &str {
        self.text(name).unwrap_or_else(|| {
            eprintln!("--{name} is needed");
            std::process::exit(2);
        })
    }

    pub fn number<T: FromStr>(&self, name: &str, default: T) -> T {
        match self.text(name) {
            None => default,
            Some(text) => text.parse().unwrap_or_else(|_| {
                eprintln!("--{name} {text}: no such number");
                std::process::exit(2);
            }),
        }
    }
}

/// Seconds of CPU that this process has used, in user and kernel mode. Ticks of 10 ms.
pub fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The command's name may hold blanks; it ends at the last parenthesis.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: f64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<f64>().ok())
        .sum();
    ticks / 100.0
}
