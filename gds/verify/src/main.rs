//! Checks the claims of the fake driver against the driver that is there, and measures what needs
//! a GPU: see `README.md` and `--help`.
//!
//! - [`claims`]: one function a row of `gds/fake-driver/CLAIMS.md`
//! - [`measure`]: what is measured; most of it by the types of `pinion-gds`, beside plain calls
//! - [`sys`]: the plain calls; all unsafe code
//! - [`child`], [`figures`], [`report`]: parts run as processes, what they tell, what is printed

mod child;
mod claims;
mod config;
mod figures;
mod lane;
mod measure;
mod report;
#[allow(unsafe_code)]
mod sys;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use claims::{Claim, Named, Verdict};
use config::{Config, HELP, Output};
use report::Report;

/// The most that one claim may take: it is hung then.
const CLAIM_LIMIT: Duration = Duration::from_secs(15);
/// The most that cuFile may take to open.
const CUFILE_LIMIT: Duration = Duration::from_secs(8);
/// Claims tried at once.
const CLAIMS_AT_ONCE: usize = 4;
/// Less than this is not worth starting a part for.
const LEAST: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let config = match Config::parse(std::env::args().skip(1).collect()) {
        Ok(config) => config,
        Err(problem) if problem.is_empty() => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(problem) => {
            eprintln!("gds-verify: {problem}");
            return ExitCode::from(2);
        }
    };
    let mut known = vec!["claims"];
    known.extend(measure::PARTS[1..].iter().map(|part| part.name));
    if let Some(name) = config.unknown_part(&known) {
        eprintln!("gds-verify: no part {name}; there are {}", known.join(", "));
        return ExitCode::from(2);
    }
    match &config.child {
        Some(part) => child_main(&config, part),
        None => Run::new(config).all(),
    }
}

/// A child: does one part and prints lines for the parent.
fn child_main(config: &Config, part: &str) -> ExitCode {
    let outcome = match part.split_once(':').unwrap_or((part, "")) {
        ("claim", number) => match claims::all().find(|claim| claim.number == number) {
            Some(claim) => {
                let verdict = claim.check(config);
                let line = serde_json::json!({"word": verdict.word(), "text": verdict.text()});
                println!("{line}");
                // Whatever the check left running or broken need not be ended in order.
                std::process::exit(0);
            }
            None => Err(format!("no claim {number}")),
        },
        ("touch", _) => touch(config),
        ("open-cufile", _) => open_cufile(config),
        ("make-and-die", _) => claims::make_and_die(config),
        ("produce", bytes) => match bytes.parse() {
            Ok(bytes) => measure::produce(config, bytes).map_err(|error| error.to_string()),
            Err(_) => Err("produce:BYTES".to_owned()),
        },
        (name, _) => match measure::PARTS.iter().find(|part| part.name == name) {
            Some(part) => part.run(config).map_err(|error| explain(error.as_ref())),
            None => Err(format!("no part {name}")),
        },
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes.
fn explain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    let causes: String = causes.map(|cause| format!(": {cause}")).collect();
    format!("{error}{causes}")
}

/// Reads device memory as if it were the program's: see claim M2.
fn touch(config: &Config) -> Result<(), String> {
    let driver = claims::open(config)?;
    let address = driver.alloc(claims::MIB).named("cuMemAlloc")?;
    println!("touching");
    let _ = std::io::stdout().flush();
    println!("{}", sys::process::touch(address));
    Ok(())
}

/// Only opens cuFile with its defaults, to see whether that comes back.
fn open_cufile(config: &Config) -> Result<(), String> {
    let path = config.cufile.as_ref().ok_or("no cuFile")?;
    let _driver = claims::open(config)?;
    let _ = sys::cufile::CuFile::load(path)?.open();
    Ok(())
}

/// The parent.
struct Run {
    config: Config,
    start: Instant,
    report: Report,
}

impl Run {
    fn new(config: Config) -> Run {
        Run {
            config,
            start: Instant::now(),
            report: Report::default(),
        }
    }

    fn all(mut self) -> ExitCode {
        let facts = measure::PARTS[0];
        let told = child::run(&self.config, facts.name, facts.limit.min(self.left()));
        told.lines.iter().for_each(|line| self.report.take(line));
        if !self.report.has_facts() {
            let why = told.trouble.unwrap_or_else(|| "it says nothing".to_owned());
            eprintln!("gds-verify: no usable device: {why}");
            return ExitCode::from(3);
        }
        self.try_cufile();
        if self.config.wants("claims") {
            self.claims();
        } else {
            self.report.missing("claims", "not asked for");
        }
        let data = measure::data_file(&self.config.folder);
        for part in &measure::PARTS[1..] {
            self.part(part, &data);
        }
        let _ = std::fs::remove_file(&data);
        self.print()
    }

    /// Opens cuFile once in a child: where that hangs, nothing else tries it.
    fn try_cufile(&mut self) {
        if self.config.cufile.is_none() {
            return;
        }
        let told = child::run(&self.config, "open-cufile", CUFILE_LIMIT.min(self.left()));
        if let Some(trouble) = told.trouble {
            let why = format!("{trouble}: what needs it is left out");
            self.report.missing("cuFile's open with its defaults", why);
            self.config.cufile_hangs();
        }
    }

    fn left(&self) -> Duration {
        self.config.limit.saturating_sub(self.start.elapsed())
    }

    fn say(&self, what: &str) {
        eprintln!("[{:>5.1} s] {what}", self.start.elapsed().as_secs_f64());
    }

    fn part(&mut self, part: &measure::Part, data: &Path) {
        if !self.config.wants(part.name) {
            self.report.missing(part.name, "not asked for");
            return;
        }
        if part.reads_file && !data.exists() {
            self.say("writing the test file");
            if let Err(error) = write_data(data, self.config.file_bytes) {
                let _ = std::fs::remove_file(data);
                self.report
                    .missing(part.name, format!("no test file: {error}"));
                self.report.broken_parts += 1;
                return;
            }
        }
        let left = self.left();
        if left < LEAST {
            self.report
                .missing(part.name, "the time was over (--limit-seconds)");
            return;
        }
        self.say(&format!("{}: {}", part.name, part.about));
        let told = child::run(&self.config, part.name, part.limit.min(left));
        told.lines.iter().for_each(|line| self.report.take(line));
        if let Some(trouble) = told.trouble {
            self.report
                .missing(&format!("the rest of {}", part.name), trouble);
            self.report.broken_parts += 1;
        }
    }

    fn claims(&mut self) {
        let wanted = |claim: &Claim| {
            let only = self.config.claim.as_deref();
            only.is_none_or(|only| only == claim.number)
        };
        let claims: Vec<Claim> = claims::all().filter(wanted).collect();
        if claims.is_empty() {
            let number = self.config.claim.clone().unwrap_or_default();
            self.report
                .missing(&format!("claim {number}"), "there is no such claim");
            self.report.broken_parts += 1;
        }
        let (alone, together): (Vec<Claim>, Vec<Claim>) =
            claims.iter().partition(|claim| claim.alone);
        let mut verdicts = self.try_all(&together, CLAIMS_AT_ONCE);
        verdicts.extend(self.try_all(&alone, 1));
        for claim in claims {
            let found = verdicts.iter().find(|(of, _)| of.number == claim.number);
            match found {
                Some((_, verdict)) => self.report.claim(claim, verdict.clone()),
                None => {
                    let why = "the time was over (--limit-seconds)".to_owned();
                    self.report.claim(claim, Verdict::Unchecked(why));
                }
            }
        }
    }

    /// Tries claims, some at a time, until the time is over.
    fn try_all(&self, claims: &[Claim], at_once: usize) -> Vec<(Claim, Verdict)> {
        let next = AtomicUsize::new(0);
        let verdicts = Mutex::new(Vec::new());
        let work = || {
            while let Some(claim) = claims.get(next.fetch_add(1, Ordering::Relaxed)) {
                let left = self.left();
                if left < LEAST {
                    return;
                }
                let verdict = self.try_one(claim, left.min(CLAIM_LIMIT));
                self.say(&format!("{} {}", claim.number, verdict.word()));
                if let Ok(mut verdicts) = verdicts.lock() {
                    verdicts.push((*claim, verdict));
                }
            }
        };
        std::thread::scope(|threads| {
            for _ in 0..at_once.min(claims.len()) {
                threads.spawn(work);
            }
        });
        verdicts.into_inner().unwrap_or_default()
    }

    fn try_one(&self, claim: &Claim, limit: Duration) -> Verdict {
        let told = child::run(&self.config, &format!("claim:{}", claim.number), limit);
        let verdict = told
            .lines
            .first()
            .and_then(|line| Verdict::parse(line["word"].as_str()?, line["text"].as_str()?));
        verdict.unwrap_or_else(|| {
            let trouble = told.trouble.unwrap_or_else(|| "it said nothing".to_owned());
            Verdict::Differs(format!("the check broke off: {trouble}"))
        })
    }

    fn print(mut self) -> ExitCode {
        self.report.elapsed = self.start.elapsed();
        let json = self.report.json();
        let text = match self.config.output {
            Output::Table => self.report.table(),
            Output::Json => format!("{json:#}\n"),
        };
        print!("{text}");
        if let Some(path) = &self.config.out
            && let Err(error) = std::fs::write(path, format!("{json:#}\n"))
        {
            eprintln!("gds-verify: {}: {error}", path.display());
            return ExitCode::from(4);
        }
        match self.report.broken_parts {
            0 => ExitCode::SUCCESS,
            _ => ExitCode::from(4),
        }
    }
}

/// Bytes that neither a disk nor a file system can make smaller, on the disk at the return.
fn write_data(path: &Path, bytes: u64) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut block = vec![0_u8; 1 << 20];
    for _ in 0..bytes >> 20 {
        for word in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&block)?;
    }
    file.sync_all()?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}
