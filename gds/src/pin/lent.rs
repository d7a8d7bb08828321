//! Pins that are lent: the table's own files instead of a copy.
//!
//! What a frozen pin in host memory would hold lies on disk already where the snapshot is clean
//! ([`pinion_feature_store::Snapshot::clean`]): in files that never change, that any process of
//! this machine can map, and that are in memory once, whoever maps them. Such a pin has files
//! where others have slots, takes nothing of the device's budget, and leaves keys to the
//! segments' own indexes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pinion_feature_store::{CleanSnapshot, Snapshot};

use super::device::Device;
use super::error::PinError;
use super::fill::{EncodedBytes, FillReport};
use super::generation::Generation;
use super::keys::Epoch;
use super::pin::Spec;
use super::refresh::next_ring;
use super::request::PinForm;
use super::ring::Ring;
use crate::backend::{DeviceInfo, DeviceKind};
use crate::layout::{Layout, PinMode, Shape, Used};

/// Files of one pin: the kernel passes no more descriptors with one message.
const MAX_FILES: usize = 253;

/// How a pin is made.
#[derive(Debug)]
pub(crate) enum Choice {
    Lend(CleanSnapshot),
    Copy { why: String },
}

/// Lends what can be lent, unless columns are asked for.
///
/// # Errors
///
/// Where segments are asked for and cannot be had: `Form`, or `NotClean` with what is in the way.
pub(crate) fn choose(
    spec: &Spec,
    device: &DeviceInfo,
    snapshot: &Snapshot,
) -> Result<Choice, PinError> {
    let copy = |why: String| Ok(Choice::Copy { why });
    if spec.form == Some(PinForm::Columns) {
        return copy("columns were asked for".to_owned());
    }
    let is_demanded = spec.form == Some(PinForm::Segments);
    if let Some(problem) = unfit(spec.mode, device) {
        return if is_demanded {
            Err(PinError::Form { problem })
        } else {
            copy(problem)
        };
    }
    match snapshot.clean(spec.features.as_deref(), MAX_FILES)? {
        Ok(files) => Ok(Choice::Lend(files)),
        Err(why) if is_demanded => Err(PinError::NotClean {
            table: snapshot.table().to_owned(),
            why,
        }),
        Err(why) => copy(why.to_string()),
    }
}

fn unfit(mode: PinMode, device: &DeviceInfo) -> Option<String> {
    if device.kind != DeviceKind::Host {
        return Some(format!("files cannot be mapped on {}", device.name));
    }
    (mode == PinMode::Fresh).then(|| "a fresh pin changes, files do not".to_owned())
}

/// What a pin that is lent is made of.
pub(crate) struct Lent {
    pub ring: Ring,
    pub newest: Generation,
    pub epoch: Arc<Epoch>,
    pub report: FillReport,
}

/// Makes it: no row is read, nothing is allocated.
pub(crate) fn lend(
    device: &Device,
    snapshot: &Snapshot,
    files: CleanSnapshot,
) -> Result<Lent, PinError> {
    files.keep_files();
    let rows = files.rows();
    let files = Arc::new(files);
    let layout = Layout {
        number: 1,
        kind: PinMode::Frozen,
        device: device.backend.device().clone(),
        slots: 0,
        // There is no slot that anything could lie in.
        shape: Shape {
            capacity_rows: rows,
            slot_bytes: 0,
            shared_validity: None,
            columns: Vec::new(),
        },
    };
    let newest = Generation {
        layout: 1,
        slot: 0,
        number: 1,
        snapshot: snapshot.id(),
        positions: Arc::clone(snapshot.positions()),
        published: Instant::now(),
        bytes_written: 0,
        used: Arc::new(Used {
            rows,
            parts: Vec::new(),
        }),
    };
    Ok(Lent {
        epoch: Arc::new(Epoch::of_files(snapshot.definition(), Arc::clone(&files))?),
        ring: Ring::lent(next_ring(), layout, files),
        newest,
        report: FillReport {
            path: device.backend.path(),
            reason: None,
            loaded_bytes: 0,
            encoded: EncodedBytes::default(),
            rows,
            elapsed: Duration::ZERO,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_lent_on_the_host_alone_and_to_frozen_pins() {
        let device = |kind| DeviceInfo {
            kind,
            uuid: "GPU-1".to_owned(),
            ordinal: 0,
            name: "a GPU".to_owned(),
        };
        let gpu = unfit(PinMode::Frozen, &device(DeviceKind::Cuda));
        assert_eq!(gpu.unwrap(), "files cannot be mapped on a GPU");
        assert!(unfit(PinMode::Fresh, &device(DeviceKind::Host)).is_some());
        assert_eq!(unfit(PinMode::Frozen, &device(DeviceKind::Host)), None);
    }
}
