//! What programs did wrong: recorded, printed, and fatal in strict mode.

use std::fs::OpenOptions;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

use crate::settings;

static RECORDED: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Records a violation. With `PINION_FAKE_GPU_STRICT=1`, or after `fake_strict(1)`, the process
/// ends here.
pub(crate) fn violation(text: String) {
    eprintln!("fake driver: VIOLATION: {text}");
    if let Some(folder) = &settings::from_environment().report {
        let file = folder.join(format!("{}.violations", std::process::id()));
        // A report that cannot be written must not change what the program sees.
        if let Ok(mut file) = OpenOptions::new().create(true).append(true).open(file) {
            let _ = writeln!(file, "{text}");
        }
    }
    RECORDED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(text);
    if settings::is_strict() {
        std::process::abort();
    }
}

/// All since the start or the last [`clear`].
pub(crate) fn recorded() -> Vec<String> {
    RECORDED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
}

/// Forgets them.
pub(crate) fn clear() {
    RECORDED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clear();
}
