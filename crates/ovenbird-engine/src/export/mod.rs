//! Snapshots to images, images to files.

pub mod assemble;
pub mod output;
