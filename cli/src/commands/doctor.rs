//! `pinion doctor`: what of this machine works for Pinion, what does not, and why.

use std::fmt::Write as _;
use std::path::Path;

use clap::Args;
use console::{Style, style};
use pinion_gds::GdsError;
use pinion_gds::probe::Line;
use pinion_gds::probe::{
    Choice, Fate, Findings, LoadSettings, MachineFacts, ProbeReport, State, Verdict, choose,
};
use serde_json::{Value, json};

use crate::args::{GlobalArgs, OutputForm};
use crate::error::{CliError, CliResult, escape_control};
use crate::gpu;
use crate::output::{print_json, print_text};

/// Looks at this machine: which load paths to GPU memory work and which do not, why, and what to
/// change; the data directory's disk; limits that Pinion may run into.
#[derive(Debug, Args)]
#[command(
    after_help = "GPU drivers are asked in a child process that is given up after ten seconds, so this ends in\n\
    under twelve whatever they do. A few files are read, one of 4 KiB is written to the data\n\
    directory and removed, and what the driver said is kept in it (gds-probe.json) for the next\n\
    start of a server. It exits with 0 when it could look at everything, also when little works;\n\
    --verbose adds what the libraries printed. See docs/gpu.md.\n\n\
    EXAMPLES:\n  \
    pinion doctor\n  \
    pinion doctor --data /var/lib/pinion --config pinion.toml\n  \
    pinion doctor --output json\n  \
    PINION__GDS__CUFILE=venv/lib/python3.12/site-packages/nvidia/cu13/lib/libcufile.so.0 pinion doctor"
)]
pub struct DoctorArgs {}

impl DoctorArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let data = gpu::folder(&config);
        let mut probe = gpu::probe(&config, &data);
        probe.afresh = true;
        probe.default_open = true;
        let report = probe.run();
        let wanted = gpu::load_settings(&config);
        let examined = Examined {
            lines: report
                .lines()
                .into_iter()
                .chain(server_lines(
                    &data,
                    config.path("lane.path").as_deref(),
                    &report.machine,
                ))
                .collect(),
            choice: choose(wanted, &report),
            wanted,
            report,
        };
        if OutputForm::of(&config) == OutputForm::Json {
            print_json(&examined.json())?;
        } else {
            print_text(&examined.text(global.verbose > 0))?;
        }
        match &examined.report.found.fate {
            Fate::NotStarted(problem) => Err(CliError::new(format!(
                "the drivers were not asked: the probe could not be started: {problem}"
            ))
            .hint("let gds.probe_binary name the pinion binary, or unset it")),
            _ => Ok(()),
        }
    }
}

/// All that there is to tell.
struct Examined {
    report: ProbeReport,
    lines: Vec<Line>,
    wanted: LoadSettings,
    choice: Result<Choice, GdsError>,
}

impl Examined {
    fn json(&self) -> Value {
        let chosen = match &self.choice {
            Ok(choice) => json!({
                "path": choice.path.to_string(),
                "reason": choice.reason,
                "refused": null,
            }),
            Err(error) => json!({ "path": null, "reason": null, "refused": error.to_string() }),
        };
        json!({
            "load_paths": self.report.verdicts(),
            "chosen": chosen,
            "facts": self.lines,
            "report": self.report,
        })
    }

    /// Lines for people. Styles vanish where the output is no terminal.
    fn text(&self, verbose: bool) -> String {
        let mut text = format!("{}\n", style("load paths").bold());
        for verdict in self.report.verdicts() {
            text.push_str(&verdict_text(&verdict));
        }
        text.push_str(&self.choice_text());
        let width = self
            .lines
            .iter()
            .map(|line| line.name.chars().count())
            .max()
            .unwrap_or(0);
        let mut area = "";
        for line in &self.lines {
            if line.area != area {
                area = line.area;
                let _ = writeln!(text, "\n{}", style(area).bold());
            }
            text.push_str(&line_text(line, width));
        }
        if verbose {
            text.push_str(&said_text("the probe", Some(&self.report.found)));
            text.push_str(&said_text(
                "the default open",
                self.report.default_open.as_ref(),
            ));
        }
        let seconds = self.report.elapsed_ms as f64 / 1000.0;
        let _ = writeln!(text, "\nlooked for {seconds:.1} s");
        text
    }

    fn choice_text(&self) -> String {
        let wanted = match self.wanted.load_path {
            Some(path) => format!("gds.load_path = \"{path}\""),
            None => "gds.load_path = \"auto\"".to_owned(),
        };
        match &self.choice {
            Ok(choice) => format!("  a server takes {} ({wanted})\n", choice.path),
            Err(error) => format!(
                "  {}: {}\n",
                style("a server would not start").red(),
                escape_control(&error.to_string())
            ),
        }
    }
}

fn verdict_text(verdict: &Verdict) -> String {
    if verdict.usable {
        return format!("  {:<7} {}\n", verdict.path, style("works").green());
    }
    let mut text = String::new();
    let mut label = verdict.path.to_string();
    let mut word = "no";
    for reason in &verdict.reasons {
        let why = escape_control(&reason.why);
        let _ = writeln!(
            text,
            "  {label:<7} {}  {why}",
            style(format!("{word:<3}")).yellow()
        );
        if let Some(change) = &reason.change {
            let _ = writeln!(text, "  {:<7} {:<3}  -> {}", "", "", escape_control(change));
        }
        label.clear();
        word = "";
    }
    text
}

fn line_text(line: &Line, width: usize) -> String {
    let (word, look) = match line.state {
        State::Ok => ("ok", Style::new().green()),
        State::Note => ("-", Style::new().dim()),
        State::Bad => ("no", Style::new().yellow()),
    };
    let mut text = format!(
        "  {}  {:<width$}  {}\n",
        look.apply_to(format!("{word:<2}")),
        line.name,
        escape_control(&line.says)
    );
    if let Some(change) = &line.change {
        let _ = writeln!(text, "      {:<width$}  -> {}", "", escape_control(change));
    }
    text
}

fn said_text(who: &str, findings: Option<&Findings>) -> String {
    let Some(findings) = findings.filter(|findings| !findings.said.is_empty()) else {
        return String::new();
    };
    let mut text = format!("\n{}\n", style(format!("printed during {who}")).bold());
    for line in findings.said.lines() {
        let _ = writeln!(text, "  {}", escape_control(line));
    }
    text
}

/// Fewer open files than this are soon used up by mapped segments and connections.
const FEW_OPEN_FILES: u64 = 4096;

/// What a server runs into that has no GPU.
fn server_lines(data: &Path, lane: Option<&Path>, machine: &MachineFacts) -> Vec<Line> {
    let line = |name: &str, state, says: String| Line::new("server", name, state, says);
    let store = if gpu::is_store(data) {
        line("store", State::Ok, format!("{} is one", data.display()))
    } else {
        line("store", State::Note, format!("{} is none", data.display()))
            .change("pinion init --data DIR makes one")
    };
    let open_files = match machine.open_files {
        None => line("open files", State::Ok, "any number".to_owned()),
        Some(count) if count >= FEW_OPEN_FILES => {
            line("open files", State::Ok, format!("up to {count}"))
        }
        Some(count) => line("open files", State::Bad, format!("up to {count}")).change(format!(
            "raise the limit to {FEW_OPEN_FILES} or more (ulimit -n, LimitNOFILE)"
        )),
    };
    let lane = match lane {
        None => line("local lane", State::Note, "lane.path is not set".to_owned()),
        Some(path) => lane_line(path),
    };
    vec![store, open_files, lane]
}

/// A Unix socket's path may have so many bytes.
const SOCKET_PATH_BYTES: usize = 107;

fn lane_line(path: &Path) -> Line {
    use std::os::unix::fs::FileTypeExt as _;
    let shown = path.display();
    let line = |state, says: String| Line::new("server", "local lane", state, says);
    if path.as_os_str().len() > SOCKET_PATH_BYTES {
        return line(State::Bad, format!("{shown} is too long for a socket")).change(format!(
            "let lane.path have {SOCKET_PATH_BYTES} bytes at most"
        ));
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            line(State::Bad, format!("{shown} is there, and no socket"))
                .change("remove it, or let lane.path name another file")
        }
        Ok(_) => match connect(path) {
            Ok(()) => line(State::Ok, format!("{shown}: a server answers")),
            Err(rustix::io::Errno::CONNREFUSED) => line(
                State::Note,
                format!("{shown} was left by a server that is gone; the next one replaces it"),
            ),
            Err(rustix::io::Errno::AGAIN) => {
                line(State::Note, format!("{shown}: a server is busy"))
            }
            Err(error) => line(State::Bad, format!("{shown}: {error}"))
                .change("join the socket's group, or run as the server's user"),
        },
        Err(_) => match path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            Some(dir) if rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_err() => line(
                State::Bad,
                format!("{} cannot be written to, or is not there", dir.display()),
            )
            .change("make it, and let the server's user write to it"),
            _ => line(State::Ok, format!("{shown} can be made; no server has")),
        },
    }
}

/// Connects without waiting, and hangs up.
fn connect(path: &Path) -> rustix::io::Result<()> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_gds::LoadPath;
    use pinion_gds::probe::Reason;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_path_that_does_not_work_has_a_line_for_each_reason_and_each_change() {
        let verdict = Verdict {
            path: LoadPath::Direct,
            usable: false,
            reasons: vec![
                Reason {
                    why: "one".to_owned(),
                    change: Some("two".to_owned()),
                },
                Reason {
                    why: "three\u{1b}".to_owned(),
                    change: None,
                },
            ],
        };
        let text = console::strip_ansi_codes(&verdict_text(&verdict)).into_owned();
        assert_eq!(
            text,
            "  direct  no   one\n               -> two\n               three\\u{1b}\n"
        );
    }

    #[test]
    fn the_lane_is_told_from_a_dead_one_a_file_and_a_long_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lane");
        assert_eq!(lane_line(&path).state, State::Ok);
        let listener = UnixListener::bind(&path).unwrap();
        assert!(lane_line(&path).says.contains("answers"));
        drop(listener);
        assert!(lane_line(&path).says.contains("is gone"));
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        assert_eq!(lane_line(&path).state, State::Bad);
        assert_eq!(
            lane_line(&dir.path().join("x".repeat(200))).state,
            State::Bad
        );
        assert_eq!(lane_line(Path::new("/nowhere/at/all")).state, State::Bad);
    }

    #[test]
    fn few_open_files_are_told() {
        let mut machine = MachineFacts::look(&pinion_gds::probe::Root::default());
        machine.open_files = Some(256);
        let lines = server_lines(Path::new("."), None, &machine);
        let files = lines.iter().find(|line| line.name == "open files").unwrap();
        assert_eq!(files.state, State::Bad);
        assert!(files.change.is_some());
    }
}
