//! All unsafe code of this crate: each file wraps one foreign thing in safe functions.
//!
//! The rest of the crate denies `unsafe`. What a safe function here relies on is either checked
//! by it or guarded by its types; every block says which.

mod abi;
pub(crate) mod context;
pub(crate) mod cufile;
pub(crate) mod cufile_trial;
pub(crate) mod driver;
pub(crate) mod kernels;
pub(crate) mod map;
pub(crate) mod pinned;
pub(crate) mod scratch;
pub(crate) mod vmm;

pub(crate) use abi::code;
