//! All unsafe code of this program: the driver's and cuFile's functions, called the way a careless
//! program calls them. The checks need what the types of `pinion-gds` make impossible.
//!
//! What keeps it sound on this side: host memory ([`HostBytes`]) is never given back, so no copy
//! outlives it, and is read and written by volatile accesses alone, since a device may write it
//! meanwhile. Device memory is only numbers here. What the driver makes of a misuse is what the
//! checks are about; each runs in a process of its own.

mod abi;
pub mod cufile;
pub mod driver;
pub mod gate;
pub mod host;
pub mod process;
