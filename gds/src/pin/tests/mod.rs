//! Pins over a real store and the host backend, step by step.

mod fills;
mod follow;
mod memory;
mod slots;
mod world;
