//! Snapshots to images, images to files.

pub mod assemble;
pub mod leak;
pub mod output;
