//! The Dockerfile language: text in, typed tree and diagnostics out.
//!
//! Pure: this crate does no I/O, reads no environment and no clock. The parser never fails; it
//! reports. Word expansion happens when the frontend lowers an instruction, so the tree keeps raw
//! words. It must not know of builds, registries or file systems.

pub mod ast;
pub mod diagnostic;
pub mod duration;
pub mod expand;
pub mod ignore;
pub mod lint;
pub mod mount;
pub mod parse;
pub mod redact;
pub mod suggest;

pub use ast::Dockerfile;
pub use diagnostic::{Diagnostic, Severity, Span};
pub use parse::{Parsed, parse, parse_instruction};
