//! What to load: paths, patterns and URIs to files, in the order given, each pattern sorted.
//!
//! A local file is opened where it is. An object is copied to a file without a name first,
//! so that every reader may seek and memory follows neither its size nor the network.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::TryStreamExt;
use glob::{MatchOptions, Pattern};
use object_store::path::Path as ObjectPath;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use pinion_schemas::BatchFormat;
use url::Url;

use super::report::LoadError;

/// A wildcard does not match across folders; `**` does.
const MATCH: MatchOptions = MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: true,
};

/// A file to load.
pub(super) struct InputFile {
    /// Path or URI.
    pub name: String,
    pub format: BatchFormat,
    pub bytes: u64,
    place: Place,
}

enum Place {
    Local(PathBuf),
    Remote {
        store: Arc<dyn ObjectStore>,
        path: ObjectPath,
    },
}

/// Finds the files that `uris` name. `format` overrules what their names say.
///
/// # Errors
///
/// A name without a file, a pattern without a match, or a file of unknown format.
pub(super) fn resolve(
    uris: &[String],
    format: Option<BatchFormat>,
) -> Result<Vec<InputFile>, LoadError> {
    let mut files = Vec::new();
    for uri in uris {
        let found = match uri.split_once("://") {
            Some(("file", _)) => local(&local_path(uri)?, uri)?,
            Some(_) => remote(uri)?,
            None => local(uri, uri)?,
        };
        for (name, bytes, place) in found {
            let Some(format) = format.or_else(|| format_of(&name)) else {
                return Err(LoadError::UnknownFormat { file: name });
            };
            files.push(InputFile {
                name,
                format,
                bytes,
                place,
            });
        }
    }
    Ok(files)
}

/// The format that a file name tells.
pub(super) fn format_of(name: &str) -> Option<BatchFormat> {
    let extension = Path::new(name).extension()?.to_str()?.to_ascii_lowercase();
    Some(match extension.as_str() {
        "parquet" | "pq" => BatchFormat::Parquet,
        "csv" | "tsv" => BatchFormat::Csv,
        "jsonl" | "ndjson" | "json" => BatchFormat::Jsonl,
        "arrow" | "arrows" | "feather" | "ipc" => BatchFormat::Arrow,
        _ => return None,
    })
}

type Found = Vec<(String, u64, Place)>;

fn local_path(uri: &str) -> Result<String, LoadError> {
    let bad = |problem: String| LoadError::Uri {
        uri: uri.to_owned(),
        problem,
    };
    let url = Url::parse(uri).map_err(|e| bad(e.to_string()))?;
    let path = url
        .to_file_path()
        .map_err(|()| bad("it names no local path".to_owned()))?;
    path.into_os_string()
        .into_string()
        .map_err(|_| bad("the path is no UTF-8".to_owned()))
}

fn local(path: &str, given: &str) -> Result<Found, LoadError> {
    let none = || LoadError::NoFiles {
        pattern: given.to_owned(),
    };
    let as_path = Path::new(path);
    if as_path.is_file() {
        return Ok(vec![local_file(as_path.to_owned())?]);
    }
    let (pattern, folder) = match as_path.is_dir() {
        // A folder stands for the files below it that look like data.
        true => (
            format!("{}/**/*", Pattern::escape(path.trim_end_matches('/'))),
            true,
        ),
        false => (path.to_owned(), false),
    };
    let matches = glob::glob_with(&pattern, MATCH).map_err(|e| LoadError::Uri {
        uri: given.to_owned(),
        problem: e.to_string(),
    })?;
    let mut paths = Vec::new();
    for found in matches {
        let path = found.map_err(|e| {
            let path = e.path().to_owned();
            LoadError::io("read", &path, e.into())
        })?;
        if path.is_file() && (!folder || format_of(&path.to_string_lossy()).is_some()) {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        return Err(none());
    }
    paths.into_iter().map(local_file).collect()
}

fn local_file(path: PathBuf) -> Result<(String, u64, Place), LoadError> {
    let meta = fs::metadata(&path).map_err(|e| LoadError::io("read", &path, e))?;
    Ok((path.display().to_string(), meta.len(), Place::Local(path)))
}

fn remote(uri: &str) -> Result<Found, LoadError> {
    // Up to the folder before the first wildcard the URI is a place, after it a pattern.
    let wildcard = uri.find(['*', '[']);
    let place = match wildcard {
        Some(at) => uri
            .get(..at)
            .and_then(|head| head.rfind('/'))
            .and_then(|end| uri.get(..=end)),
        None => Some(uri),
    }
    .unwrap_or(uri);
    let bad = |problem: String| LoadError::Uri {
        uri: uri.to_owned(),
        problem,
    };
    let failed = |source| LoadError::Remote {
        uri: uri.to_owned(),
        source,
    };
    let url = Url::parse(place).map_err(|e| bad(e.to_string()))?;
    let (store, base) =
        object_store::parse_url_opts(&url, settings()).map_err(|e| bad(e.to_string()))?;
    let store: Arc<dyn ObjectStore> = Arc::from(store);
    let pattern = match wildcard {
        Some(_) => {
            let rest = uri.get(place.len()..).unwrap_or_default();
            let below = if base.as_ref().is_empty() {
                String::new()
            } else {
                format!("{base}/")
            };
            let text = format!("{}{rest}", Pattern::escape(&below));
            Some(Pattern::new(&text).map_err(|e| bad(e.to_string()))?)
        }
        None => None,
    };
    let objects = block_on(list(store.as_ref(), &base, pattern.as_ref()))?.map_err(failed)?;
    if objects.is_empty() {
        return Err(LoadError::NoFiles {
            pattern: uri.to_owned(),
        });
    }
    let origin = url.as_str().trim_end_matches('/');
    let origin = origin
        .strip_suffix(base.as_ref())
        .unwrap_or(origin)
        .trim_end_matches('/')
        .to_owned();
    Ok(objects
        .into_iter()
        .map(|object| {
            let name = format!("{origin}/{}", object.location);
            let place = Place::Remote {
                store: Arc::clone(&store),
                path: object.location,
            };
            (name, object.size, place)
        })
        .collect())
}

/// Settings for object stores: the variables their own tools read.
fn settings() -> impl Iterator<Item = (String, String)> {
    std::env::vars().filter_map(|(name, value)| {
        let known = ["AWS_", "AZURE_", "GOOGLE_"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        known.then(|| (name.to_ascii_lowercase(), value))
    })
}

/// The objects that match, or, without a pattern, the object at `base` or else those below.
async fn list(
    store: &dyn ObjectStore,
    base: &ObjectPath,
    pattern: Option<&Pattern>,
) -> Result<Vec<ObjectMeta>, object_store::Error> {
    if pattern.is_none() {
        match store.head(base).await {
            Ok(object) => return Ok(vec![object]),
            Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let mut objects: Vec<ObjectMeta> = store.list(Some(base)).try_collect().await?;
    objects.retain(|object| {
        let name = object.location.as_ref();
        match pattern {
            Some(pattern) => pattern.matches_with(name, MATCH),
            None => format_of(name).is_some(),
        }
    });
    objects.sort_by(|a, b| a.location.cmp(&b.location));
    Ok(objects)
}

fn block_on<T>(future: impl Future<Output = T>) -> Result<T, LoadError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| LoadError::io("start the network for", Path::new("a load"), source))?;
    Ok(runtime.block_on(future))
}

impl InputFile {
    /// Opens the file; an object is copied to a nameless file in `temporary_dir` first.
    pub(super) fn open(&self, temporary_dir: &Path) -> Result<File, LoadError> {
        match &self.place {
            Place::Local(path) => File::open(path).map_err(|e| LoadError::io("open", path, e)),
            Place::Remote { store, path } => {
                let io = |e| LoadError::io("write a temporary file in", temporary_dir, e);
                let failed = |source| LoadError::Remote {
                    uri: self.name.clone(),
                    source,
                };
                let mut file = tempfile::tempfile_in(temporary_dir).map_err(io)?;
                block_on(async {
                    let mut chunks = store.get(path).await.map_err(failed)?.into_stream();
                    while let Some(chunk) = chunks.try_next().await.map_err(failed)? {
                        file.write_all(&chunk).map_err(io)?;
                    }
                    Ok::<(), LoadError>(())
                })??;
                file.seek(SeekFrom::Start(0)).map_err(io)?;
                Ok(file)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use object_store::PutPayload;
    use object_store::memory::InMemory;

    use super::*;

    fn names(uri: &Path) -> Result<Vec<String>, LoadError> {
        let files = resolve(&[uri.display().to_string()], None)?;
        let name = |f: &InputFile| f.name.rsplit('/').next().unwrap_or_default().to_owned();
        Ok(files.iter().map(name).collect())
    }

    #[test]
    fn a_path_a_pattern_and_a_folder_find_their_files_in_order() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("part")).unwrap();
        for name in [
            "b.csv",
            "a.csv",
            "notes.txt",
            "part/c.parquet",
            "odd [1].csv",
        ] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        let at = |name: &str| dir.path().join(name);
        assert_eq!(names(&at("a.csv")).unwrap(), ["a.csv"]);
        assert_eq!(names(&at("odd [1].csv")).unwrap(), ["odd [1].csv"]);
        assert_eq!(names(&at("?.csv")).unwrap(), ["a.csv", "b.csv"]);
        assert_eq!(names(&at("**/*.parquet")).unwrap(), ["c.parquet"]);
        assert_eq!(
            names(dir.path()).unwrap(),
            ["a.csv", "b.csv", "odd [1].csv", "c.parquet"]
        );
        let uri = format!("file://{}/a.csv", dir.path().display());
        assert_eq!(resolve(&[uri], None).unwrap()[0].bytes, 1);
        assert!(matches!(
            names(&at("none*.csv")),
            Err(LoadError::NoFiles { .. })
        ));
        assert!(matches!(
            names(&at("gone.csv")),
            Err(LoadError::NoFiles { .. })
        ));
        assert!(matches!(
            names(&at("notes.txt")),
            Err(LoadError::UnknownFormat { .. })
        ));
        assert!(matches!(
            resolve(&["gopher://host/file.csv".to_owned()], None),
            Err(LoadError::Uri { .. })
        ));
    }

    #[test]
    fn objects_are_matched_within_their_folder() {
        let store = InMemory::new();
        let found = block_on(async {
            for name in [
                "in/a.csv",
                "in/b.csv",
                "in/deep/c.csv",
                "in/readme",
                "other/a.csv",
            ] {
                store
                    .put(&ObjectPath::from(name), PutPayload::from_static(b"x"))
                    .await
                    .unwrap();
            }
            let base = ObjectPath::from("in");
            let pattern = Pattern::new("in/*.csv").unwrap();
            let names = |objects: Vec<ObjectMeta>| -> Vec<String> {
                objects
                    .into_iter()
                    .map(|o| o.location.to_string())
                    .collect()
            };
            (
                names(list(&store, &base, Some(&pattern)).await.unwrap()),
                names(list(&store, &base, None).await.unwrap()),
                names(
                    list(&store, &ObjectPath::from("in/readme"), None)
                        .await
                        .unwrap(),
                ),
            )
        })
        .unwrap();
        assert_eq!(found.0, ["in/a.csv", "in/b.csv"]);
        assert_eq!(found.1, ["in/a.csv", "in/b.csv", "in/deep/c.csv"]);
        assert_eq!(found.2, ["in/readme"]);
    }
}
