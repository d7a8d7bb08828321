//! The parent's side: a child that may hang, crash or babble, and a time after which it is
//! given up.
//!
//! A child in an endless loop is killed. One that is stuck in the kernel cannot be: it is left
//! behind, with a thread that collects it should it ever end. Nothing here waits for it.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::report::{Event, Fate, Findings, Order, Step};

/// The hidden command of the server binary that is the child.
pub const CHILD_COMMAND: &str = "gds-probe";

/// How long a killed child has to be gone.
const KILL_GRACE: Duration = Duration::from_millis(300);
/// All that a child may write: more is no report.
const MAX_OUTPUT_BYTES: u64 = 1 << 20;
/// What is kept of the libraries' own words.
const SAID_BYTES: usize = 2048;

/// The binary to run: the setting, else this very program, also when its file was replaced.
pub fn probe_binary(setting: Option<&Path>) -> PathBuf {
    setting.map_or_else(|| PathBuf::from("/proc/self/exe"), Path::to_owned)
}

/// Runs a child until its last line, or until `limit` is over.
pub(super) fn ask(binary: &Path, order: &Order, limit: Duration) -> Findings {
    let deadline = Instant::now() + limit;
    let argument = match serde_json::to_string(order) {
        Ok(argument) => argument,
        Err(error) => return Findings::none(Fate::NotStarted(error.to_string())),
    };
    let spawned = Command::new(binary)
        .args([CHILD_COMMAND, &argument])
        // libcufile writes a log into its working directory unless it is told where.
        .env("CUFILE_LOGFILE_PATH", "/dev/null")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    match spawned {
        Ok(child) => watch(child, deadline),
        Err(error) => Findings::none(Fate::NotStarted(format!("{}: {error}", binary.display()))),
    }
}

fn watch(mut child: Child, deadline: Instant) -> Findings {
    let events = child.stdout.take().map(read_events);
    let said = child.stderr.take().map(keep_tail).unwrap_or_default();
    let mut findings = Findings::none(Fate::Finished);
    let heard = match events {
        Some(events) => listen(&events, deadline, &mut findings),
        None => Heard::Silence(None),
    };
    findings.fate = match heard {
        Heard::End => {
            // Its report is complete; leaving may still hang in a library's destructor.
            let _ = end(&mut child, Instant::now() + KILL_GRACE);
            Fate::Finished
        }
        Heard::Silence(during) => match wait_until(&mut child, deadline) {
            Some(status) => Fate::Died {
                during,
                status: status.to_string(),
            },
            None => timed_out(&mut child, during),
        },
        Heard::TooLate(during) => timed_out(&mut child, during),
    };
    findings.said = String::from_utf8_lossy(&said.lock()).trim().to_owned();
    leave(child);
    findings
}

fn timed_out(child: &mut Child, during: Option<Step>) -> Fate {
    Fate::TimedOut {
        during,
        killed: end(child, Instant::now()),
    }
}

enum Heard {
    End,
    /// It closed its output without a last line.
    Silence(Option<Step>),
    TooLate(Option<Step>),
}

fn listen(events: &Receiver<Event>, deadline: Instant, findings: &mut Findings) -> Heard {
    let mut during = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match events.recv_timeout(left) {
            Ok(Event::End) => return Heard::End,
            Ok(Event::Begin(step)) => during = Some(step),
            Ok(event) => findings.add(event),
            Err(RecvTimeoutError::Disconnected) => return Heard::Silence(during),
            Err(RecvTimeoutError::Timeout) => return Heard::TooLate(during),
        }
    }
}

/// Reads on a thread of its own, which an abandoned child keeps.
fn read_events(output: impl Read + Send + 'static) -> Receiver<Event> {
    let (send, receive) = mpsc::channel();
    let read = move || {
        for line in BufReader::new(output.take(MAX_OUTPUT_BYTES)).lines() {
            // A line that is no event comes from a binary that is no probe: without a last
            // line it counts as one that died.
            let Ok(line) = line else { return };
            if let Ok(event) = serde_json::from_str(&line)
                && send.send(event).is_err()
            {
                return;
            }
        }
    };
    start_thread("gds-probe-out", read);
    receive
}

fn keep_tail(mut output: impl Read + Send + 'static) -> Arc<Mutex<Vec<u8>>> {
    let tail = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&tail);
    let read = move || {
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            let mut kept = kept.lock();
            kept.extend_from_slice(&buffer[..count]);
            let surplus = kept.len().saturating_sub(SAID_BYTES);
            kept.drain(..surplus);
        }
    };
    start_thread("gds-probe-err", read);
    tail
}

/// Without a thread there is no report: the receiver is told that its sender is gone.
fn start_thread(name: &str, work: impl FnOnce() + Send + 'static) {
    let started = thread::Builder::new().name(name.to_owned()).spawn(work);
    if let Err(error) = started {
        tracing::warn!(%error, name, "cannot start a thread");
    }
}

fn wait_until(child: &mut Child, deadline: Instant) -> Option<ExitStatus> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(2)),
            Ok(None) | Err(_) => return None,
        }
    }
}

/// Something that may be killed and may not go.
trait Mortal {
    fn kill(&mut self);
    fn is_gone(&mut self) -> bool;
}

impl Mortal for Child {
    fn kill(&mut self) {
        let _ = Child::kill(self);
    }

    fn is_gone(&mut self) -> bool {
        matches!(self.try_wait(), Ok(Some(_)))
    }
}

/// Lets it leave by itself until `patience` is over, then kills it. True when it is gone within
/// the grace that a killed process has.
fn end(child: &mut impl Mortal, patience: Instant) -> bool {
    while Instant::now() < patience {
        if child.is_gone() {
            return true;
        }
        thread::sleep(Duration::from_millis(2));
    }
    child.kill();
    let grace = Instant::now() + KILL_GRACE;
    loop {
        if child.is_gone() {
            return true;
        }
        if Instant::now() >= grace {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// Collects a child that is still there when it ends, on a thread that nobody waits for.
fn leave(mut child: Child) {
    if !child.is_gone() {
        start_thread("gds-probe-left", move || {
            let _ = child.wait();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::report::{Errand, Loaded, Outcome};
    use std::os::unix::fs::PermissionsExt;

    fn order() -> Order {
        Order {
            libcufile: PathBuf::from("libcufile.so.0"),
            trial_file: None,
            errand: Errand::Strict,
        }
    }

    /// A binary that does what a line of shell does.
    fn ask_script(script: &str, limit: Duration) -> (Findings, Duration) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("probe");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let began = Instant::now();
        (ask(&path, &order(), limit), began.elapsed())
    }

    #[test]
    fn what_a_child_found_is_kept_to_its_last_line() {
        let (findings, _) = ask_script(
            r#"echo '{"begin":"init"}'; echo '{"driver":{"no":"not there"}}'; echo noise
               echo '{"open":{"code":5001,"name":"x"}}'; echo '"end"'; echo loud >&2"#,
            Duration::from_secs(10),
        );
        assert_eq!(findings.fate, Fate::Finished);
        assert_eq!(findings.driver, Some(Loaded::No("not there".to_owned())));
        let code = findings.open.map(|open: Outcome| open.code);
        assert_eq!(code, Some(5001));
    }

    #[test]
    fn an_endless_loop_is_killed_and_the_report_says_where_it_was() {
        let script = r#"echo '{"init":{"code":0,"name":"ok"}}'; echo '{"begin":"open"}'
                        while :; do :; done"#;
        let (findings, elapsed) = ask_script(script, Duration::from_millis(500));
        let during = Some(Step::Open);
        assert_eq!(
            findings.fate,
            Fate::TimedOut {
                during,
                killed: true
            }
        );
        assert!(findings.init.unwrap().is_ok(), "what came before is kept");
        assert!(elapsed < Duration::from_secs(3), "{elapsed:?}");
    }

    #[test]
    fn a_crash_is_told_with_its_signal() {
        let script = r#"echo '{"begin":"register"}'; kill -SEGV $$"#;
        let (findings, _) = ask_script(script, Duration::from_secs(10));
        let Fate::Died { during, status } = findings.fate else {
            panic!("{findings:?}");
        };
        assert_eq!(during, Some(Step::Register));
        assert!(status.contains("11"), "{status}");
    }

    #[test]
    fn a_binary_that_is_no_probe_counts_as_one_that_died() {
        let (findings, _) = ask_script("echo hello", Duration::from_secs(10));
        assert!(matches!(findings.fate, Fate::Died { during: None, .. }));
        let findings = ask(Path::new("/nonexistent"), &order(), Duration::from_secs(1));
        assert!(matches!(findings.fate, Fate::NotStarted(_)), "{findings:?}");
    }

    #[test]
    fn a_flood_of_output_is_no_report_and_takes_no_memory() {
        let (findings, elapsed) = ask_script("exec yes", Duration::from_secs(5));
        assert!(!matches!(findings.fate, Fate::Finished));
        assert!(elapsed < Duration::from_secs(7), "{elapsed:?}");
    }

    #[test]
    fn the_end_of_what_libraries_print_is_kept() {
        let script = "yes spam | head -2000 >&2; echo the last word >&2; sleep 0.1; echo '\"end\"'";
        let (findings, _) = ask_script(script, Duration::from_secs(10));
        assert!(
            findings.said.ends_with("the last word"),
            "{}",
            findings.said
        );
        assert!(findings.said.len() <= SAID_BYTES);
    }

    /// A process in the kernel's hands: signals do not reach it.
    struct Stuck {
        kills: u32,
    }

    impl Mortal for Stuck {
        fn kill(&mut self) {
            self.kills += 1;
        }

        fn is_gone(&mut self) -> bool {
            false
        }
    }

    #[test]
    fn a_child_stuck_in_the_kernel_is_left_behind_not_awaited() {
        let began = Instant::now();
        let mut stuck = Stuck { kills: 0 };
        assert!(!end(&mut stuck, Instant::now()));
        assert_eq!(stuck.kills, 1);
        assert!(began.elapsed() < KILL_GRACE * 3);
    }
}
