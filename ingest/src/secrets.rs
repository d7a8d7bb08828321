//! Secrets in options: `${env:NAME}` and `${file:PATH}` stand for text that no file of ours
//! holds. They are read at every connection, so a changed secret counts from the next one on.
//!
//! The operator's own options may name any variable and any file. A table's options are written
//! by whoever may apply tables, who also chooses the brokers: they reach only variables that
//! begin with [`TABLE_VARIABLES`] and files in the directory for secrets.

use std::path::{Component, Path};

/// Variables that the options of a table may name begin so.
pub(crate) const TABLE_VARIABLES: &str = "PINION_SECRET_";
/// A secret is no longer than this.
const MAX_BYTES: u64 = 1 << 20;

/// Whose options they are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Reach<'a> {
    /// The operator's.
    Server,
    /// A table's; with the directory for secrets, where there is one.
    Table(Option<&'a Path>),
}

/// `value` with every reference replaced. The error never holds a secret.
pub(crate) fn resolve(value: &str, reach: Reach<'_>) -> Result<String, String> {
    let mut resolved = String::with_capacity(value.len());
    let mut rest = value;
    while let Some(start) = rest.find("${") {
        let (before, reference) = rest.split_at(start);
        resolved.push_str(before);
        let end = reference
            .find('}')
            .ok_or_else(|| "a reference \"${\" has no end \"}\"".to_owned())?;
        let name = reference.get(2..end).unwrap_or_default();
        resolved.push_str(&read(name, reach)?);
        rest = reference.get(end + 1..).unwrap_or_default();
    }
    resolved.push_str(rest);
    Ok(resolved)
}

fn read(reference: &str, reach: Reach<'_>) -> Result<String, String> {
    if let Some(name) = reference.strip_prefix("env:") {
        return variable(name, reach);
    }
    if let Some(path) = reference.strip_prefix("file:") {
        return file(path, reach);
    }
    Err(format!(
        "\"${{{reference}}}\" is no reference: write ${{env:NAME}} or ${{file:/path}}"
    ))
}

fn variable(name: &str, reach: Reach<'_>) -> Result<String, String> {
    if matches!(reach, Reach::Table(_)) && !name.starts_with(TABLE_VARIABLES) {
        return Err(format!(
            "the options of a table reach only environment variables that begin with \
             {TABLE_VARIABLES}, not {name}"
        ));
    }
    std::env::var(name).map_err(|_| format!("the environment variable {name} is not set"))
}

fn file(path: &str, reach: Reach<'_>) -> Result<String, String> {
    let named = Path::new(path);
    let path = match reach {
        Reach::Server => named.to_owned(),
        Reach::Table(None) => {
            return Err(
                "the options of a table reach files only in kafka.secrets_dir, which is not set"
                    .to_owned(),
            );
        }
        Reach::Table(Some(dir)) => {
            let inside = named.strip_prefix(dir).unwrap_or(named);
            let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
            if !inside.components().all(plain) {
                return Err(format!(
                    "the options of a table reach only files in kafka.secrets_dir ({}), not {path}",
                    dir.display()
                ));
            }
            dir.join(inside)
        }
    };
    let cannot = |e: std::io::Error| format!("cannot read {}: {e}", path.display());
    let size_bytes = std::fs::metadata(&path).map_err(cannot)?.len();
    if size_bytes > MAX_BYTES {
        return Err(format!(
            "{} has {size_bytes} bytes; a secret has at most {MAX_BYTES}",
            path.display()
        ));
    }
    let text = std::fs::read_to_string(&path).map_err(cannot)?;
    // Editors end files with a line break that is not part of the secret.
    Ok(text.trim_end_matches(['\n', '\r']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_replaced_wherever_they_stand() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("password");
        std::fs::write(&path, "s3cret\n").expect("write");
        let value = format!("user:${{file:{}}}@${{env:PATH}}", path.display());
        let resolved = resolve(&value, Reach::Server).expect("resolved");
        let search = std::env::var("PATH").expect("PATH");
        assert_eq!(resolved, format!("user:s3cret@{search}"));
        assert_eq!(
            resolve("plain $ {x}", Reach::Server).as_deref(),
            Ok("plain $ {x}")
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let missing = |text| resolve(text, Reach::Server).expect_err("missing");
        assert!(missing("${env:PINION_NOT_SET_7}").contains("PINION_NOT_SET_7 is not set"));
        assert!(missing("${file:/no/such}").contains("/no/such"));
        assert!(missing("${vault:x}").contains("${env:NAME}"));
        assert!(missing("${env:X").contains("no end"));
    }

    #[test]
    fn a_tables_options_reach_only_what_is_meant_for_them() {
        let dir = tempfile::tempdir().expect("directory");
        std::fs::write(dir.path().join("p"), "x").expect("write");
        let reach = Reach::Table(Some(dir.path()));
        assert_eq!(resolve("${file:p}", reach).as_deref(), Ok("x"));
        let whole = format!("${{file:{}/p}}", dir.path().display());
        assert_eq!(resolve(&whole, reach).as_deref(), Ok("x"));
        for refused in ["${file:/etc/passwd}", "${file:../p}", "${env:PATH}"] {
            let error = resolve(refused, reach).expect_err(refused);
            assert!(error.contains("reach only"), "{error}");
        }
        assert!(resolve("${file:p}", Reach::Table(None)).is_err());
    }
}
