//! The traced level where nobody has taught it the registers of the processor.

use std::io;
use std::sync::atomic::AtomicBool;

use crate::{Outcome, SandboxError, Step, Stream};

/// What is missing.
pub(crate) const MISSING: Option<&str> = Some("The traced level knows x86-64 processors only so far.");

pub(crate) fn run(_: &Step, _: &mut dyn FnMut(Stream, &[u8]), _: &AtomicBool) -> Result<Outcome, SandboxError> {
    Err(SandboxError::Impossible { reason: MISSING.unwrap_or_default().to_owned() })
}

pub(crate) mod calls {
    use libc::c_long;

    pub(crate) fn always() -> Vec<c_long> {
        Vec::new()
    }

    pub(crate) fn by_value() -> Vec<(c_long, &'static [u32])> {
        Vec::new()
    }

    pub(crate) fn by_pointer() -> Vec<(c_long, u32)> {
        Vec::new()
    }

    pub(crate) fn by_bits() -> Vec<(c_long, u32)> {
        Vec::new()
    }

    pub(crate) fn missing() -> Vec<c_long> {
        Vec::new()
    }
}

pub(crate) mod probe {
    use super::io;

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Failed {
        Ptrace,
        Filter,
    }

    pub(crate) fn attempt() -> Result<(), (Failed, io::Error)> {
        Err((Failed::Ptrace, io::Error::from_raw_os_error(libc::ENOSYS)))
    }
}
