//! One random case of the property test: a table, operations on it, and the comparison of
//! every answer with the oracle's.

mod compare;
mod follow;
mod loads;
mod restarts;
mod rng;
mod table;
pub mod values;
mod world;

pub use loads::SPILLED_LOADS;
pub use rng::Rng;
pub use world::World;
