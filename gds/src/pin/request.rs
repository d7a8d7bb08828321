//! What is asked for, checked, and what consumers are handed.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::{Value, json};

use super::error::PinError;
use super::generation::Generation;
use super::pin::PinId;
use crate::layout::{Layout, PinMode};

/// Slots of a fresh pin that nobody said a number for.
const FRESH_SLOTS: u32 = 2;

/// The most slots of a pin: descriptors of one message.
pub const MAX_SLOTS: u32 = 16;

const MAX_NAME_BYTES: usize = 128;

/// What to pin.
#[derive(Debug, Clone)]
pub struct PinRequest {
    /// The table.
    pub table: String,
    /// Its columns, in this order; keys and times are named like features. `None`: all.
    pub features: Option<Vec<String>>,
    /// The device's ordinal; `None`: the first one.
    pub device: Option<u32>,
    /// Whether it follows the table.
    pub mode: PinMode,
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
    /// Which pin.
    pub pin: PinId,
    /// What is where.
    pub layout: Arc<Layout>,
    /// The newest generation, unleased: it may be gone in a moment.
    pub newest: Generation,
    /// One descriptor for each slot, in order.
    pub descriptors: Vec<OwnedFd>,
}

impl Shared {
    /// What a consumer is told beside the descriptors.
    pub fn to_json(&self) -> Value {
        json!({
            "pin": self.pin.0,
            "layout": &*self.layout,
            "generation": self.newest.to_json(None),
        })
    }
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

pub(super) fn check_name(name: &str) -> Result<(), PinError> {
    let problem = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_NAME_BYTES {
        "it has more than 128 bytes"
    } else if name.chars().any(char::is_control) {
        "it has control characters"
    } else if name.bytes().all(|byte| byte.is_ascii_digit()) {
        "it is a number, as ids are"
    } else {
        return Ok(());
    };
    Err(PinError::BadName {
        name: name.to_owned(),
        problem,
    })
}
