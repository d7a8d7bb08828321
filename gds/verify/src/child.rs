//! Parts of the program in processes of their own: a crash or a hang costs one part, not the run.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::config::Config;

/// What a child printed, and how it ended.
#[derive(Debug)]
pub struct Told {
    pub lines: Vec<Value>,
    /// `None` when it ended well.
    pub trouble: Option<String>,
}

/// Runs this program again for one part, for `limit` at most. What it printed until a crash or
/// the limit is kept.
pub fn run(config: &Config, part: &str, limit: Duration) -> Told {
    let spawned = std::env::current_exe().and_then(|program| {
        Command::new(program)
            .args(&config.arguments)
            .args(["--child", part])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
    });
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            return Told {
                lines: Vec::new(),
                trouble: Some(format!("cannot start a process: {error}")),
            };
        }
    };
    let lines = collect(child.stdout.take(), |line| serde_json::from_str(&line).ok());
    let words = collect(child.stderr.take(), Some);
    let ended = wait(&mut child, limit);
    // What it left running could hold the pipes open: do not wait for that.
    let patience = Duration::from_millis(500);
    let lines = lines.recv_timeout(patience).unwrap_or_default();
    let words = words.recv_timeout(patience).unwrap_or_default();
    let trouble = match ended {
        None => Some(format!("stopped after {} s", limit.as_secs())),
        Some(status) if status.success() => None,
        Some(status) => {
            let last = words.last().map(|line| format!(": {line}"));
            Some(format!("{}{}", describe(status), last.unwrap_or_default()))
        }
    };
    Told { lines, trouble }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with status {code}"),
        (_, Some(signal)) => format!("ended by signal {signal}"),
        _ => "ended".to_owned(),
    }
}

/// Waits for the end, or kills at the limit: then `None`.
fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if start.elapsed() > limit {
            let _ = child.kill();
            // One that is stuck in the kernel does not end: it is left behind.
            std::thread::sleep(Duration::from_millis(50));
            let _ = child.try_wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Reads lines on a thread of their own, until the pipe closes.
fn collect<T: Send + 'static>(
    pipe: Option<impl Read + Send + 'static>,
    parse: impl Fn(String) -> Option<T> + Send + 'static,
) -> mpsc::Receiver<Vec<T>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let lines = pipe
            .into_iter()
            .flat_map(|pipe| BufReader::new(pipe).lines());
        let lines = lines.map_while(Result::ok).filter_map(parse).collect();
        let _ = sender.send(lines);
    });
    receiver
}
