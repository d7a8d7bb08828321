//! What is asked for, checked, and what consumers are handed.

use std::fmt;
use std::os::fd::OwnedFd;

use super::error::PinError;
use super::mapping::Mapping;
use super::names::DeviceName;
use crate::layout::PinMode;

/// Slots of a fresh pin that nobody said a number for.
const FRESH_SLOTS: u32 = 2;

/// The most slots of a pin: descriptors of one message.
pub const MAX_SLOTS: u32 = 16;

/// How the rows of a pin lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PinForm {
    /// Copied into slots of the device, in the layout of pins.
    Columns,
    /// Not copied: the table's own files are lent.
    Segments,
}

impl fmt::Display for PinForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PinForm::Columns => "columns",
            PinForm::Segments => "segments",
        })
    }
}

/// What to pin.
#[derive(Debug, Clone)]
pub struct PinRequest {
    /// The table.
    pub table: String,
    /// Its columns, in this order; keys and times are named like features. `None`: all.
    pub features: Option<Vec<String>>,
    /// The device; `None`: the first one.
    pub device: Option<DeviceName>,
    /// Whether it follows the table.
    pub mode: PinMode,
    /// How it is to lie; `None`: lent where that is possible, else copied.
    pub form: Option<PinForm>,
    /// Full copies; `None`: 2 of a fresh pin, 1 of a frozen one.
    pub slots: Option<u32>,
    /// Copies that it may grow to when all are leased; `None`: no more than `slots`.
    pub max_slots: Option<u32>,
    /// Its name; `None`: the table's.
    pub name: Option<String>,
}

/// What a consumer needs to map a pin: once for each layout.
#[derive(Debug)]
pub struct Shared {
    /// What it is, and its memory for as long as the consumer has it mapped.
    pub mapping: Mapping,
    /// One descriptor for each slot, or for each lent file, in order.
    pub descriptors: Vec<OwnedFd>,
}

impl PinRequest {
    /// Slots, and slots at most.
    pub(super) fn slots(&self) -> Result<(u32, u32), PinError> {
        let fewest = match self.mode {
            PinMode::Fresh => FRESH_SLOTS,
            PinMode::Frozen => 1,
        };
        let slots = self.slots.unwrap_or(fewest);
        let max_slots = self.max_slots.unwrap_or(slots);
        let problem = match self.mode {
            PinMode::Frozen if (slots, max_slots) != (1, 1) => "a frozen pin has one",
            PinMode::Fresh if slots < FRESH_SLOTS => {
                "a fresh pin needs two: one to read, one to write"
            }
            _ if max_slots < slots => "the most is less than the first",
            _ if max_slots > MAX_SLOTS => "a pin has 16 at most",
            _ => return Ok((slots, max_slots)),
        };
        Err(PinError::Slots {
            slots,
            max_slots,
            problem,
        })
    }
}
