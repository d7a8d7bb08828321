//! Tests over whole segments.
