//! Chores of the repository: tidy, fixtures, references.
fn main() {}
