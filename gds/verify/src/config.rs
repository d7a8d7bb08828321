//! What to run, on which libraries, for how long: parsed from the arguments once.

use std::path::PathBuf;
use std::time::Duration;

/// The help text.
pub const HELP: &str = "\
Checks the claims of the fake driver against a real one, and measures what a GPU is needed for.

usage: gds-verify [OPTIONS]

  --driver PATH      the driver [libcuda.so.1]
  --cufile PATH      cuFile; without it the checks and figures of cuFile are left out
  --folder PATH      where the test file is written, on the disk to measure [.]
  --file-mib N       its size [2048]
  --each-ms N        how long one figure is measured [400]
  --limit-seconds N  everything together [240]
  --only A,B         these parts alone (claims, or the name of a measurement)
  --skip A,B         without these parts
  --claim NR         this claim alone
  --output FORM      table or json [table]
  --out FILE         the JSON is written there as well

Exit status: 0, also when a claim differs (that is a finding); 2 for bad arguments; 3 when there is
no driver or no device; 4 when a part broke.";

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    Table,
    Json,
}

/// See [`HELP`].
#[derive(Debug, Clone)]
pub struct Config {
    pub driver: PathBuf,
    pub cufile: Option<PathBuf>,
    pub folder: PathBuf,
    pub file_bytes: u64,
    pub each: Duration,
    pub limit: Duration,
    pub only: Vec<String>,
    pub skip: Vec<String>,
    pub claim: Option<String>,
    pub output: Output,
    pub out: Option<PathBuf>,
    /// Whether cuFile's open with its defaults is known to come back: where there is no
    /// `/proc/modules`, that of some versions never does.
    pub cufile_opens: bool,
    /// The part that this process is the child for.
    pub child: Option<String>,
    /// The arguments, for children.
    pub arguments: Vec<String>,
}

impl Config {
    /// Reads arguments.
    ///
    /// # Errors
    ///
    /// A sentence for the operator; empty when help was asked for.
    pub fn parse(arguments: Vec<String>) -> Result<Config, String> {
        let mut config = Config {
            driver: "libcuda.so.1".into(),
            cufile: None,
            folder: ".".into(),
            file_bytes: 2048 << 20,
            each: Duration::from_millis(400),
            limit: Duration::from_secs(240),
            only: Vec::new(),
            skip: Vec::new(),
            claim: None,
            output: Output::Table,
            out: None,
            cufile_opens: true,
            child: None,
            arguments: Vec::new(),
        };
        let mut rest = arguments.clone().into_iter();
        while let Some(name) = rest.next() {
            if name == "--help" || name == "-h" {
                return Err(String::new());
            }
            let value = rest.next().ok_or_else(|| format!("{name} needs a value"))?;
            config.set(&name, value)?;
        }
        config.arguments = arguments;
        Ok(config)
    }

    fn set(&mut self, name: &str, value: String) -> Result<(), String> {
        match name {
            "--driver" => self.driver = value.into(),
            "--cufile" => self.cufile = Some(value.into()),
            "--folder" => self.folder = value.into(),
            "--file-mib" => self.file_bytes = number(name, &value, 1 << 20)? << 20,
            "--each-ms" => self.each = Duration::from_millis(number(name, &value, 60_000)?),
            "--limit-seconds" => {
                self.limit = Duration::from_secs(number(name, &value, 86_400)?);
            }
            "--only" => self.only = list(&value),
            "--skip" => self.skip = list(&value),
            "--claim" => self.claim = Some(value),
            "--output" => {
                self.output = match value.as_str() {
                    "table" => Output::Table,
                    "json" => Output::Json,
                    _ => return Err(format!("--output is table or json, not {value}")),
                }
            }
            "--out" => self.out = Some(value.into()),
            "--child" => self.child = Some(value),
            "--cufile-opens" => self.cufile_opens = value == "yes",
            _ => return Err(format!("no option {name}; --help lists them")),
        }
        Ok(())
    }

    /// Notes for the children that cuFile's open does not come back.
    pub fn cufile_hangs(&mut self) {
        self.cufile_opens = false;
        let note = ["--cufile-opens".to_owned(), "no".to_owned()];
        self.arguments.extend(note);
    }

    /// The first name in `--only` and `--skip` that is none of these.
    pub fn unknown_part(&self, known: &[&str]) -> Option<&str> {
        let mut named = self.only.iter().chain(&self.skip).map(String::as_str);
        named.find(|name| !known.contains(name))
    }

    /// Whether a part is asked for.
    pub fn wants(&self, part: &str) -> bool {
        let named = |list: &[String]| list.iter().any(|one| one == part);
        let asked = match self.claim {
            Some(_) => part == "claims",
            None => self.only.is_empty() || named(&self.only),
        };
        asked && !named(&self.skip)
    }
}

fn number(name: &str, value: &str, most: u64) -> Result<u64, String> {
    let number = value.parse().ok().filter(|n| (1..=most).contains(n));
    number.ok_or_else(|| format!("{name} is a number from 1 to {most}, not {value}"))
}

fn list(value: &str) -> Vec<String> {
    value.split(',').map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text.split_whitespace().map(str::to_owned).collect())
    }

    #[test]
    fn parts_are_chosen_by_name() {
        let config = parse("--only bus,claims --skip bus").unwrap();
        assert!(config.wants("claims") && !config.wants("bus") && !config.wants("disk"));
        assert!(parse("").unwrap().wants("disk"));
        assert!(!parse("--claim L1").unwrap().wants("disk"));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_option_named() {
        for (text, named) in [
            ("--each-ms 0", "--each-ms"),
            ("--file-mib x", "--file-mib"),
            ("--output xml", "--output"),
            ("--driver", "--driver"),
            ("--nothing 1", "--nothing"),
        ] {
            assert!(parse(text).unwrap_err().contains(named), "{text}");
        }
    }
}
