//! The commands, one file each: its flags, its examples, what it does.

pub mod apply;
pub mod check;
pub mod completions;
pub mod config;
pub mod dead_letters;
pub mod delete;
pub mod demo;
pub mod describe;
pub mod doctor;
pub mod flush;
pub mod get;
pub mod init;
pub mod leases;
pub mod load;
pub mod ls;
pub mod merge;
pub mod pin;
pub mod pins;
pub mod plan;
pub mod put;
pub mod scan;
pub mod serve;
pub mod source;
pub mod top;
pub mod unpin;
pub mod version;
