//! Pins over a real store and the host backend, step by step.

mod fills;
mod follow;
mod lent;
mod memory;
mod slots;
mod world;
