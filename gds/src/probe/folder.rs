//! Facts of the data directory: its file system, its disk, and what cuFile asks about both.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::machine::{Root, Space};

/// What the data directory lies on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FolderFacts {
    /// The directory, or the nearest one above that exists.
    pub path: PathBuf,
    /// `ext4`, `xfs`, `tmpfs` …
    pub file_system: Option<String>,
    /// What it was mounted with.
    pub mount_options: Option<String>,
    /// The disk; `None` for file systems that have none.
    pub disk: Option<Disk>,
    /// Room in it.
    pub space: Option<Space>,
    /// Whether files can be read round the page cache.
    pub direct_io: DirectIo,
    /// What udev recorded of the disk. cuFile registers no file of a disk without it.
    pub udev: Udev,
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// `nvme0n1p2`; the numbers where the kernel does not name it.
    pub name: String,
    /// Major and minor number: `259:2`.
    pub number: String,
    /// How it is attached.
    pub kind: DiskKind,
}

/// How a disk is attached, as far as it matters to GPUDirect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskKind {
    /// NVMe: the kind that GPUDirect works with.
    Nvme,
    /// A disk of a virtual machine's host.
    Virtio,
    /// Put together of others: device mapper or RAID.
    Stacked,
    /// Anything else.
    Other,
}

/// Whether `O_DIRECT` reads work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DirectIo {
    /// A file was written and read back.
    Works,
    /// The file system refused.
    Refused(String),
    /// Nothing could be written there to try it on.
    NotTried(String),
}

/// What `/run/udev/data` has of the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Udev {
    /// Both properties that cuFile reads.
    Complete,
    /// The entry lacks one of them.
    Lacks {
        /// The entry.
        entry: String,
        /// `ID_FS_USAGE` or `ID_FS_TYPE`.
        property: String,
    },
    /// There is no entry.
    Absent {
        /// The entry that would be read.
        entry: String,
    },
    /// No disk, no entry.
    NotNeeded,
}

impl FolderFacts {
    /// Looks at `folder`, or at the nearest directory above that exists. Writes a file of 4 KiB
    /// there and removes it.
    pub fn look(root: &Root, folder: &Path) -> FolderFacts {
        let path = existing(folder);
        let mount = root
            .text("/proc/self/mountinfo")
            .and_then(|text| mount_of(&text, &path));
        let disk = disk_of(root, &path);
        FolderFacts {
            space: Space::of(&path),
            direct_io: try_direct_io(&path),
            udev: disk
                .as_ref()
                .map_or(Udev::NotNeeded, |disk| udev_of(root, disk)),
            file_system: mount.as_ref().map(|mount| mount.file_system.clone()),
            mount_options: mount.map(|mount| mount.options),
            disk,
            path,
        }
    }
}

fn existing(folder: &Path) -> PathBuf {
    let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    absolute
        .ancestors()
        .find_map(|dir| fs::canonicalize(dir).ok().filter(|dir| dir.is_dir()))
        .unwrap_or(absolute)
}

struct Mount {
    file_system: String,
    options: String,
}

/// The mount that `path` is reached through: the longest mount point above it, the last of
/// those mounted over one another.
fn mount_of(mountinfo: &str, path: &Path) -> Option<Mount> {
    let mut best: Option<(usize, Mount)> = None;
    for line in mountinfo.lines() {
        // `36 35 98:0 / /mnt rw,noatime shared:1 - ext3 /dev/root rw,errors=continue`
        let Some((front, back)) = line.split_once(" - ") else {
            continue;
        };
        let Some(point) = front.split(' ').nth(4).map(unescape) else {
            continue;
        };
        let mut back = back.split(' ');
        let Some(file_system) = back.next() else {
            continue;
        };
        let length = Path::new(&point).components().count();
        if path.starts_with(&point) && best.as_ref().is_none_or(|(longest, _)| length >= *longest) {
            let options = [front.split(' ').nth(5), back.nth(1)];
            best = Some((
                length,
                Mount {
                    file_system: file_system.to_owned(),
                    options: options.into_iter().flatten().collect::<Vec<_>>().join(","),
                },
            ));
        }
    }
    best.map(|(_, mount)| mount)
}

/// `\040` and its kind, which stand for blanks in the kernel's tables.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let octal = (*first == b'\\')
            .then(|| after.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn disk_of(root: &Root, path: &Path) -> Option<Disk> {
    let device = fs::metadata(path).ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    if major == 0 {
        return None; // tmpfs, overlay, network file systems
    }
    Some(named_disk(root, format!("{major}:{minor}")))
}

fn named_disk(root: &Root, number: String) -> Disk {
    let link = root.path(&format!("/sys/dev/block/{number}"));
    let target = fs::read_link(&link).unwrap_or_default();
    let name = target.file_name().map(|n| n.to_string_lossy().into_owned());
    let text = target.to_string_lossy();
    let kind = if text.contains("/nvme") {
        DiskKind::Nvme
    } else if text.contains("/virtio") {
        DiskKind::Virtio
    } else if name
        .as_ref()
        .is_some_and(|n| n.starts_with("dm-") || n.starts_with("md"))
    {
        DiskKind::Stacked
    } else {
        DiskKind::Other
    };
    Disk {
        name: name.unwrap_or_else(|| number.clone()),
        number,
        kind,
    }
}

fn udev_of(root: &Root, disk: &Disk) -> Udev {
    let entry = format!("/run/udev/data/b{}", disk.number);
    let Some(text) = root.text(&entry) else {
        return Udev::Absent { entry };
    };
    let lacking = ["ID_FS_USAGE", "ID_FS_TYPE"].into_iter().find(|property| {
        let start = format!("E:{property}=");
        !text.lines().any(|line| line.starts_with(&start))
    });
    match lacking {
        Some(property) => Udev::Lacks {
            entry,
            property: property.to_owned(),
        },
        None => Udev::Complete,
    }
}

const BLOCK_BYTES: usize = 4096;

/// A file of one block in the data directory, gone when this is dropped.
#[derive(Debug)]
pub(super) struct TrialFile(PathBuf);

impl TrialFile {
    /// Makes it.
    pub(super) fn create(folder: &Path) -> io::Result<TrialFile> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!(".gds-probe-{}-{number}", std::process::id()));
        let file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)?;
        let trial = TrialFile(path);
        file.write_all_at(&[7; BLOCK_BYTES], 0)?;
        file.sync_all()?;
        Ok(trial)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TrialFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn try_direct_io(folder: &Path) -> DirectIo {
    match TrialFile::create(folder) {
        Err(error) => DirectIo::NotTried(format!("cannot write there: {error}")),
        Ok(file) => match read_directly(file.path()) {
            Ok(true) => DirectIo::Works,
            Ok(false) => DirectIo::Refused("it read other bytes than were written".to_owned()),
            Err(error) => DirectIo::Refused(error.to_string()),
        },
    }
}

fn read_directly(path: &Path) -> io::Result<bool> {
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    let mut memory = vec![0; 2 * BLOCK_BYTES];
    let start = memory.as_ptr().align_offset(BLOCK_BYTES);
    let block = &mut memory[start..start + BLOCK_BYTES];
    let got = file.read_at(block, 0)?;
    Ok(got == BLOCK_BYTES && block.iter().all(|byte| *byte == 7))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,data=journal
30 27 0:27 / /data rw - tmpfs tmpfs rw,size=9k
31 27 0:28 / /data rw,noatime shared:3 - xfs /dev/nvme0n1 rw,attr2
32 27 0:29 / /with\\040blank rw - btrfs /dev/sdb rw
";

    fn file_system(path: &str) -> String {
        mount_of(MOUNTS, Path::new(path)).unwrap().file_system
    }

    #[test]
    fn the_longest_and_last_mount_point_above_a_path_is_its_mount() {
        assert_eq!(file_system("/srv/store"), "ext4");
        assert_eq!(file_system("/data/store"), "xfs");
        assert_eq!(file_system("/database"), "ext4");
        assert_eq!(file_system("/with blank/x"), "btrfs");
        let root = mount_of(MOUNTS, Path::new("/")).unwrap();
        assert_eq!(root.options, "rw,relatime,rw,data=journal");
        assert!(mount_of("nonsense\n", Path::new("/")).is_none());
    }

    #[test]
    fn a_disk_is_named_and_told_apart_by_where_its_link_leads() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::at(dir.path());
        let links = root.path("/sys/dev/block");
        fs::create_dir_all(&links).unwrap();
        for (number, target, kind) in [
            (
                "259:2",
                "../../devices/pci0000:00/nvme/nvme0/nvme0n1/nvme0n1p2",
                DiskKind::Nvme,
            ),
            (
                "254:0",
                "../../devices/pci0000:00/virtio1/block/vda",
                DiskKind::Virtio,
            ),
            (
                "253:3",
                "../../devices/virtual/block/dm-3",
                DiskKind::Stacked,
            ),
            (
                "8:1",
                "../../devices/pci0000:00/ata1/block/sda/sda1",
                DiskKind::Other,
            ),
        ] {
            std::os::unix::fs::symlink(target, links.join(number)).unwrap();
            let disk = named_disk(&root, number.to_owned());
            assert_eq!(disk.kind, kind, "{target}");
            assert!(target.ends_with(&disk.name));
        }
        assert_eq!(named_disk(&root, "7:7".to_owned()).name, "7:7");
    }

    #[test]
    fn an_udev_entry_needs_both_properties() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::at(dir.path());
        let disk = named_disk(&root, "254:0".to_owned());
        let entry = "/run/udev/data/b254:0".to_owned();
        assert_eq!(
            udev_of(&root, &disk),
            Udev::Absent {
                entry: entry.clone()
            }
        );

        fs::create_dir_all(root.path("/run/udev/data")).unwrap();
        fs::write(root.path(&entry), "S:disk\nE:ID_FS_USAGE=filesystem\n").unwrap();
        let property = "ID_FS_TYPE".to_owned();
        assert_eq!(
            udev_of(&root, &disk),
            Udev::Lacks {
                entry: entry.clone(),
                property
            }
        );

        fs::write(
            root.path(&entry),
            "E:ID_FS_USAGE=filesystem\nE:ID_FS_TYPE=ext4\n",
        )
        .unwrap();
        assert_eq!(udev_of(&root, &disk), Udev::Complete);
    }

    #[test]
    fn a_folder_that_is_not_there_yet_is_judged_by_the_one_above_and_left_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let facts = FolderFacts::look(&Root::default(), &dir.path().join("a/b"));
        assert_eq!(facts.path, dir.path().canonicalize().unwrap());
        assert!(facts.file_system.is_some());
        assert!(facts.space.unwrap().total_bytes > 0);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_nobody_can_write_to_is_not_tried() {
        let facts = FolderFacts::look(&Root::default(), Path::new("/proc/self"));
        assert!(
            matches!(facts.direct_io, DirectIo::NotTried(_)),
            "{facts:?}"
        );
        assert_eq!(facts.disk, None);
        assert_eq!(facts.udev, Udev::NotNeeded);
    }
}
