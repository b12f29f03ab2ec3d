//! [`Tree`](super::tree::Tree) over a snapshot and over a plain folder with ignore patterns.
