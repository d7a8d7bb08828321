//! `pinion plan`: what `pinion apply` would do.

use std::io::Read;
use std::path::PathBuf;

use clap::Args;
use pinion_schemas::Definition;

use crate::args::{GlobalArgs, OutputForm};
use crate::asks::PlanStep;
use crate::error::{CliError, CliResult};
use crate::output::{print_json, print_text};
use crate::target::{Access, Target};

/// Shows what apply would do, and changes nothing.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion plan weather.toml\n  \
    pinion plan tables/*.toml --output json")]
pub struct PlanArgs {
    /// Definition files in TOML; - is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

impl PlanArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let definitions = read_definitions(&self.files)?;
        let target = Target::open(&config, Access::Read)?;
        let steps = target.apply(definitions, false)?;
        print_steps(OutputForm::of(&config), &steps)
    }
}

/// Reads and checks definition files. Every file is read before the first error is told, so
/// that one run shows the first problem of each.
pub fn read_definitions(files: &[PathBuf]) -> CliResult<Vec<(Definition, String)>> {
    let mut definitions = Vec::with_capacity(files.len());
    let mut problems: Vec<String> = Vec::new();
    for file in files {
        let name = file.display();
        let text = if file.as_os_str() == "-" {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map(|_| text)
        } else {
            std::fs::read_to_string(file)
        };
        let text = match text {
            Ok(text) => text,
            Err(error) => {
                problems.push(format!("cannot read {name}: {error}"));
                continue;
            }
        };
        match Definition::parse_toml(&text) {
            Ok(definition) => definitions.push((definition, text)),
            Err(error) => problems.push(format!("{name}: {error}")),
        }
    }
    match problems.split_last() {
        None => Ok(definitions),
        Some((last, others)) => {
            for problem in others {
                eprint!("{}", CliError::new(problem.as_str()).render());
            }
            Err(CliError::new(last.as_str()))
        }
    }
}

/// Prints the steps of a plan or an apply.
pub fn print_steps(form: OutputForm, steps: &[PlanStep]) -> CliResult {
    if form == OutputForm::Json {
        return print_json(&steps);
    }
    let mut text = String::new();
    for step in steps {
        let sign = match step.plan.as_str() {
            "create" => '+',
            "change" => '~',
            _ => '=',
        };
        text.push_str(&format!("{sign} {} {}\n", step.plan, step.what()));
        for change in &step.changes {
            text.push_str(&format!("    {change}\n"));
        }
    }
    print_text(&text)
}
