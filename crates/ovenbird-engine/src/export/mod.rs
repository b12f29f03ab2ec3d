//! Snapshots to images, images to files.

pub mod assemble;
pub mod cache;
pub mod leak;
pub mod output;
pub mod squash;
