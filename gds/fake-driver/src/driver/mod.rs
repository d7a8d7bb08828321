//! The driver's functions, by subject. Each is NVIDIA's function of that name, with the contract
//! of the CUDA driver API reference; what is modelled of it and what is not stands in `CLAIMS.md`.
#![allow(missing_docs, non_snake_case)]

pub mod context;
pub mod copy;
pub mod device;
pub mod event;
pub mod host;
pub mod memory;
pub mod module;
pub mod pointer;
pub mod pool;
pub mod stream;
pub mod symbols;
pub mod vmm;
