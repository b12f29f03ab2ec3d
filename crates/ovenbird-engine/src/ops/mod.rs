//! What each kind of vertex does.

pub mod file;
