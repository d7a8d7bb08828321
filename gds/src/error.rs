//! What can go wrong between a file and a device.

use std::io;

use crate::backend::LoadPath;

/// Why memory could not be had, filled or read.
#[derive(Debug, thiserror::Error)]
pub enum GdsError {
    /// The device has no room for an allocation. Nothing was allocated.
    #[error("device {device}: no room for {bytes} bytes; {free_bytes} are free")]
    OutOfMemory {
        /// Which device, as in [`crate::DeviceInfo::name`].
        device: String,
        /// Bytes asked for, rounded to the device's granularity.
        bytes: u64,
        /// Bytes free when it was asked.
        free_bytes: u64,
    },
    /// The driver refused a call.
    #[error("{call} failed with {code} ({name})")]
    Driver {
        /// The function.
        call: &'static str,
        /// Its result.
        code: i32,
        /// The driver's name of the code, or `unknown`.
        name: String,
    },
    /// cuFile refused a call. Codes from 5001 on are its own, smaller ones are of the system.
    #[error("{call} failed with {code} ({meaning})")]
    CuFile {
        /// The function.
        call: &'static str,
        /// Its result, positive.
        code: i32,
        /// What the code means, or `unknown`.
        meaning: &'static str,
    },
    /// A library could not be loaded, or lacks a function.
    #[error("{library}: {problem}")]
    Library {
        /// Name or path.
        library: String,
        /// What the loader said.
        problem: String,
    },
    /// A file ended before the bytes that were asked for: what was loaded is void.
    #[error(
        "{path}: {got_bytes} of {wanted_bytes} bytes at offset {offset}: the file is cut short"
    )]
    ShortRead {
        /// The file.
        path: String,
        /// Where the read began.
        offset: u64,
        /// Bytes asked for.
        wanted_bytes: u64,
        /// Bytes that came.
        got_bytes: u64,
    },
    /// The system refused something.
    #[error("cannot {action}")]
    Io {
        /// What was being done, with the file's name where there is one.
        action: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A range that does not lie in its region. Nothing was touched.
    #[error("bytes {offset} to {end} are outside a region of {region_bytes} bytes")]
    OutOfRange {
        /// First byte.
        offset: u64,
        /// One past the last byte.
        end: u64,
        /// Length of the region.
        region_bytes: u64,
    },
    /// Two pieces of one load go to the same bytes. Nothing was touched.
    #[error("two pieces of a load overlap: both go to byte {offset} of the region")]
    Overlap {
        /// The first such byte of the second piece.
        offset: u64,
    },
    /// The region belongs to another backend.
    #[error("a region of {theirs} was given to the backend {ours}")]
    ForeignRegion {
        /// Whose it is.
        theirs: String,
        /// Who was asked.
        ours: String,
    },
    /// Pinned host memory is at its cap, and nothing in flight came back in time.
    #[error(
        "pinned host memory is full: {in_use_bytes} of {cap_bytes} bytes are in use, {wanted_bytes} more were asked for"
    )]
    PinnedFull {
        /// Bytes asked for.
        wanted_bytes: u64,
        /// Bytes in use or in flight.
        in_use_bytes: u64,
        /// The cap.
        cap_bytes: u64,
    },
    /// A load path that was required is not to be had here.
    #[error("load path {path} cannot be used: {reason}")]
    PathUnavailable {
        /// The path asked for.
        path: LoadPath,
        /// The probe's reason, and what to change.
        reason: String,
    },
}
