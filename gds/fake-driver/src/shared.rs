//! The memory of a device that several processes share: `PINION_FAKE_GPU_SHARED` names a folder,
//! and each allocation of any process is a file there.
//!
//! Whoever has an allocation, by a handle, a descriptor on its way, or a mapping, has the one open
//! file with a lock on it. The kernel lets go of the lock when the last of them is gone, however
//! its process ended. So a file that can be locked is nobody's: its bytes are free again.
//! Allocations are not counted and made in one step: two processes that allocate at the same
//! moment may together get more than there is.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::settings;

/// How the files of allocations, and memfds, are called.
const NAME: &str = "pinion-fake-gpu";

static NEXT: AtomicU64 = AtomicU64::new(1);

/// The folder, if processes share their devices.
fn folder() -> Option<&'static Path> {
    settings::from_environment().shared.as_deref()
}

/// A name that tells an importer the device, and whether third parties may map the memory.
pub(crate) fn name(device: usize, rdma: bool) -> String {
    format!("{NAME}-{device}-{}", u8::from(rdma))
}

/// Device and flag of a name, as `/proc/self/fd` shows it; `None` for any other file.
pub(crate) fn parse_name(link: &Path) -> Option<(i32, bool)> {
    let link = link.to_str()?;
    let file = link
        .strip_prefix("/memfd:")
        .or_else(|| link.rsplit('/').next())?;
    let mut facts = file
        .split(' ')
        .next()?
        .strip_prefix(NAME)?
        .split('-')
        .skip(1);
    Some((facts.next()?.parse().ok()?, facts.next()? == "1"))
}

/// A new file of that length for an allocation; `None` when nothing is shared.
pub(crate) fn create(name: &str, bytes: usize) -> Option<io::Result<OwnedFd>> {
    let folder = folder()?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    Some(create_in(
        folder,
        &format!("{name}-{}-{number}", std::process::id()),
        bytes,
    ))
}

fn create_in(folder: &Path, name: &str, bytes: usize) -> io::Result<OwnedFd> {
    // Under a name that nobody counts until it is locked and has its length.
    let unready = folder.join(format!("new-{name}"));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&unready)?;
    file.lock_shared()?;
    file.set_len(bytes as u64)?;
    fs::rename(unready, folder.join(name))?;
    Ok(file.into())
}

/// Bytes of a device that any process has; `None` when nothing is shared. Removes what nobody has
/// any more.
pub(crate) fn taken_bytes(device: usize) -> Option<u64> {
    let prefix = format!("{NAME}-{device}-");
    let entries = fs::read_dir(folder()?).ok()?.flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    Some(named.map(|entry| bytes_if_held(&entry.path())).sum())
}

fn bytes_if_held(path: &Path) -> u64 {
    // Gone between the listing and now: another process removed it.
    let Ok(file) = File::open(path) else { return 0 };
    if file.try_lock().is_ok() {
        let _ = fs::remove_file(path);
        return 0;
    }
    file.metadata().map_or(0, |facts| facts.len())
}
