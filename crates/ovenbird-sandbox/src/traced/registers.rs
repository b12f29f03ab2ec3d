//! Registers of a stopped thread: the only place that knows the processor.

use std::io;

use libc::{c_int, c_long};

use super::ptrace;

/// What lies below the stack pointer and still belongs to the program.
const RED_ZONE: u64 = 128;

#[derive(Clone, Copy)]
pub(super) struct Registers(libc::user_regs_struct);

impl Registers {
    pub(super) fn of(thread: i32) -> io::Result<Registers> {
        // SAFETY: all-zero registers are valid; the kernel fills them.
        let mut registers = Registers(unsafe { std::mem::zeroed() });
        ptrace::request(ptrace::GETREGS, thread, 0, (&raw mut registers.0).cast())?;
        Ok(registers)
    }

    pub(super) fn give(&self, thread: i32) -> io::Result<()> {
        ptrace::request(ptrace::SETREGS, thread, 0, (&raw const self.0).cast_mut().cast()).map(drop)
    }

    /// Number of the call.
    pub(super) fn call(&self) -> c_long {
        self.0.orig_rax as c_long
    }

    pub(super) fn arguments(&self) -> [u64; 6] {
        [self.0.rdi, self.0.rsi, self.0.rdx, self.0.r10, self.0.r8, self.0.r9]
    }

    pub(super) fn set_argument(&mut self, index: usize, value: u64) {
        let place = match index {
            0 => &mut self.0.rdi,
            1 => &mut self.0.rsi,
            2 => &mut self.0.rdx,
            3 => &mut self.0.r10,
            4 => &mut self.0.r8,
            _ => &mut self.0.r9,
        };
        *place = value;
    }

    pub(super) fn set_arguments(&mut self, values: [u64; 6]) {
        for (index, value) in values.into_iter().enumerate() {
            self.set_argument(index, value);
        }
    }

    pub(super) fn result(&self) -> i64 {
        self.0.rax as i64
    }

    /// At the entry of a call: it does not happen, and this is its result.
    pub(super) fn answer(&mut self, value: i64) {
        self.0.orig_rax = u64::MAX;
        self.0.rax = value as u64;
    }

    /// At the end of a call: the program makes it again.
    pub(super) fn again(&mut self, call: c_long) {
        self.0.rax = call as u64;
        self.0.orig_rax = u64::MAX;
        self.0.rip -= SYSCALL_LENGTH;
    }

    pub(super) fn stack(&self) -> u64 {
        self.0.rsp
    }

    pub(super) fn set_stack(&mut self, to: u64) {
        self.0.rsp = to;
    }

    /// The highest address below the stack that is free for `size` bytes.
    pub(super) fn below_stack(&self, size: u64) -> Option<u64> {
        Some(self.0.rsp.checked_sub(RED_ZONE)?.checked_sub(size)? & !15)
    }
}

const SYSCALL_LENGTH: u64 = 2;

/// `EM_X86_64`.
pub(super) const MACHINE: u16 = 62;

/// The result of a call as the kernel gives it: negative numbers of errors.
pub(super) fn failed(result: i64) -> Option<c_int> {
    (-4095..0).contains(&result).then_some(-result as c_int)
}
