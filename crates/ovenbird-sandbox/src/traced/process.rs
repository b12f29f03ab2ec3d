//! What the tracer knows of the processes and threads of a step.

use std::cell::Cell;
use std::rc::Rc;

use libc::c_int;

use super::memory::Memory;
use super::registers::Registers;
use crate::credentials::Credentials;

/// Room for what a call needs instead of its own arguments: two paths.
pub(super) const SLOT: u64 = 2 * (libc::PATH_MAX as u64 + 256);
pub(super) const SLOTS: u32 = 8;

/// A thread group.
pub(super) struct Process {
    pub(super) number: i32,
    pub(super) credentials: Credentials,
    /// The program that it runs, a path of the step.
    pub(super) program: Vec<u8>,
    /// Its root folder, a path of the step.
    pub(super) root: Vec<u8>,
    memory: Option<Memory>,
    /// Where our slots are in its memory.
    pub(super) scratch: Option<u64>,
    /// Which ones are taken: those who share memory share them.
    slots: Rc<Cell<u32>>,
}

impl Process {
    pub(super) fn new(number: i32, credentials: Credentials) -> Process {
        Process { number, credentials, program: Vec::new(), root: Vec::new(), memory: None, scratch: None, slots: Rc::default() }
    }

    /// A new process of this one's making.
    pub(super) fn child(&self, number: i32, shares_memory: bool) -> Process {
        Process {
            number,
            credentials: self.credentials.clone(),
            program: self.program.clone(),
            root: self.root.clone(),
            memory: None,
            scratch: self.scratch,
            slots: if shares_memory { self.slots.clone() } else { Rc::default() },
        }
    }

    /// It has other memory now.
    pub(super) fn renew(&mut self, scratch: Option<u64>) {
        self.memory = None;
        self.scratch = scratch;
        self.slots = Rc::default();
    }

    pub(super) fn memory(&mut self) -> Result<&Memory, c_int> {
        if self.memory.is_none() {
            let memory = Memory::open(self.number).map_err(|error| error.raw_os_error().unwrap_or(libc::EFAULT))?;
            self.memory = Some(memory);
        }
        self.memory.as_ref().ok_or(libc::EFAULT)
    }

    /// Takes room for `size` bytes: a slot, else what is below the stack.
    pub(super) fn room(&self, registers: &Registers, size: u64) -> Result<(u64, Option<u32>), c_int> {
        let free = (0..SLOTS).find(|slot| self.slots.get() & 1 << slot == 0);
        if let (Some(scratch), Some(slot)) = (self.scratch, free)
            && size <= SLOT
        {
            self.slots.set(self.slots.get() | 1 << slot);
            return Ok((scratch + u64::from(slot) * SLOT, Some(slot)));
        }
        registers.below_stack(size).map(|at| (at, None)).ok_or(libc::EFAULT)
    }

    pub(super) fn free(&self, slot: Option<u32>) {
        if let Some(slot) = slot {
            self.slots.set(self.slots.get() & !(1 << slot));
        }
    }
}

/// A thread.
pub(super) struct Task {
    pub(super) process: i32,
    /// The call that it is in with other arguments than its own.
    pub(super) inside: Option<Inside>,
}

pub(super) struct Inside {
    pub(super) before: Registers,
    pub(super) after: After,
    /// The files that it is about, on the machine.
    pub(super) hosts: Vec<Vec<u8>>,
    pub(super) slot: Option<u32>,
}

/// What is to be done when the call has succeeded.
pub(super) enum After {
    Nothing,
    /// The file is new, and this is who owns it.
    Made(Vec<u8>, (u32, u32)),
    /// The same, by the descriptor that the call returns.
    Opened((u32, u32)),
    /// The address of a socket is to be told in words of the step: (where it is, room for it).
    Address(u64, usize),
    Program(Box<Program>),
}

/// What a process becomes.
pub(super) struct Program {
    /// A path of the step.
    pub(super) path: Vec<u8>,
    /// As the caller named it.
    pub(super) name: Vec<u8>,
    /// Mode and owner, for the bits that change ids.
    pub(super) mode: u32,
    pub(super) owner: (u32, u32),
}

/// What becomes of a call.
pub(super) enum Verdict {
    /// It does not happen; this is its result.
    Answer(i64),
    /// As it is.
    Kernel,
    /// With other arguments.
    Instead(Instead),
    /// The arguments are in the registers.
    Set,
}

pub(super) type Answered = Result<Verdict, c_int>;

pub(super) struct Instead {
    /// Arguments that become addresses of these bytes.
    pub(super) bytes: Vec<(usize, Vec<u8>)>,
    /// Arguments that become these numbers.
    pub(super) numbers: Vec<(usize, u64)>,
    /// An argument that becomes an array of pointers: to these strings, then these ones.
    pub(super) list: Option<(usize, Vec<Vec<u8>>, Vec<u64>)>,
    pub(super) after: After,
    pub(super) hosts: Vec<Vec<u8>>,
}

impl Instead {
    /// One argument is another path.
    pub(super) fn path(argument: usize, host: Vec<u8>) -> Instead {
        Instead { hosts: vec![host.clone()], ..Instead::bytes(argument, terminated(&host)) }
    }

    /// One argument is the address of something else.
    pub(super) fn bytes(argument: usize, bytes: Vec<u8>) -> Instead {
        Instead { bytes: vec![(argument, bytes)], numbers: Vec::new(), list: None, after: After::Nothing, hosts: Vec::new() }
    }

    pub(super) fn then(mut self, after: After) -> Verdict {
        self.after = after;
        Verdict::Instead(self)
    }
}

pub(super) fn terminated(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len() + 1);
    out.extend_from_slice(path);
    out.push(0);
    out
}
