//! The distribution API.
