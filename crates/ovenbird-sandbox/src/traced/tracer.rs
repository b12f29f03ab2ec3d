//! Follows every thread of a step from stop to stop.
//!
//! A call that names files goes on with the paths of the machine; at its end the caller's own arguments are put back. Calls that
//! only tell something, or that this user may do as well as the caller, are answered here and do not happen: one stop instead of two.
//! When the step's first process is over, so is everything else.

use std::collections::{HashMap, HashSet};
use std::io;
use std::mem;

use libc::c_int;

use super::exec::Programs;
use super::memory::Memory;
use super::paths::{Caller, Found, Paths};
use super::process::{After, Answered, Inside, Instead, Process, Task, Verdict};
use super::ptrace::{self, Event};
use super::registers::{Registers, failed};
use super::socket::Addresses;
use crate::credentials::Credentials;
use crate::owners::Owners;

/// Refusals of one call that are mended by giving the owner his bits back: a path has no more folders.
const OPENINGS_MAX: usize = 2048;

pub(super) struct Tracer {
    pub(super) paths: Paths,
    pub(super) owners: Owners,
    pub(super) programs: Programs,
    pub(super) addresses: Addresses,
    processes: HashMap<i32, Process>,
    tasks: HashMap<i32, Task>,
    /// New threads that stopped before their maker said that it had made them.
    early: HashSet<i32>,
    first: i32,
    /// User and group that own everything on the disk.
    pub(super) disk: (u32, u32),
    /// What the step is to take for the machine's name.
    pub(super) host_name: Vec<u8>,
}

/// How the first process ended.
pub(super) struct Ended {
    pub(super) status: c_int,
    pub(super) usage: libc::rusage,
}

impl Tracer {
    /// `first` is traced already, and has not run yet.
    pub(super) fn new(first: i32, user: Credentials, paths: Paths, owners: Owners, programs: Programs, addresses: Addresses) -> Tracer {
        // SAFETY: these never fail.
        let disk = unsafe { (libc::geteuid(), libc::getegid()) };
        Tracer {
            paths,
            owners,
            programs,
            addresses,
            processes: HashMap::from([(first, Process::new(first, user))]),
            tasks: HashMap::from([(first, Task { process: first, inside: None })]),
            early: HashSet::new(),
            first,
            disk,
            host_name: Vec::new(),
        }
    }

    /// Until nothing of the step is left.
    pub(super) fn follow(&mut self) -> io::Result<Ended> {
        let mut ended = None;
        while let Some((thread, event)) = ptrace::next() {
            if let Event::Gone { status, usage } = event {
                self.gone(thread);
                if thread == self.first {
                    ended = Some((status, *usage));
                    self.end_all();
                }
                continue;
            }
            if ended.is_some() {
                // It was made while the end came.
                kill(thread);
                let _ = ptrace::go_on(thread, 0);
                continue;
            }
            // A thread that was killed meanwhile cannot go on: its end is the next event.
            let _ = self.stopped(thread, &event);
        }
        let (status, usage) = ended.ok_or_else(|| io::Error::other("the step's first process was lost"))?;
        Ok(Ended { status, usage })
    }

    fn stopped(&mut self, thread: i32, event: &Event) -> io::Result<()> {
        match event {
            Event::Entry => self.entry(thread),
            Event::End => self.end(thread),
            Event::Made { vfork } => {
                self.made(thread, *vfork)?;
                ptrace::go_on(thread, 0)
            }
            Event::Exec => {
                self.executed(thread)?;
                ptrace::go_on(thread, 0)
            }
            Event::Signal(signal) => ptrace::go_on(thread, *signal),
            Event::Group => ptrace::stay(thread),
            Event::Stop if !self.tasks.contains_key(&thread) => {
                self.early.insert(thread);
                Ok(())
            }
            Event::Stop => ptrace::go_on(thread, 0),
            Event::Gone { .. } => Ok(()),
        }
    }

    fn gone(&mut self, thread: i32) {
        self.early.remove(&thread);
        // Perhaps it died between making somebody and saying so.
        for early in mem::take(&mut self.early) {
            self.adopt(early);
        }
        if let Some(task) = self.tasks.remove(&thread) {
            if let (Some(process), Some(inside)) = (self.processes.get(&task.process), &task.inside) {
                process.free(inside.slot);
            }
            if task.process == thread {
                self.processes.remove(&thread);
            }
        }
    }

    /// Lets a new thread go whose maker has not said anything (yet).
    fn adopt(&mut self, thread: i32) {
        let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<i32>().ok());
        let process = field("Tgid:").unwrap_or(thread);
        let parent = field("PPid:").filter(|parent| self.processes.contains_key(parent)).unwrap_or(self.first);
        if let (None, Some(parent)) = (self.processes.get(&process), self.processes.get(&parent)) {
            // Whether they share memory is not known: then they share its slots.
            let child = parent.child(process, true);
            self.processes.insert(process, child);
        }
        self.tasks.entry(thread).or_insert(Task { process, inside: None });
        let _ = ptrace::go_on(thread, 0);
    }

    fn end_all(&self) {
        for thread in self.tasks.keys().chain(&self.early) {
            kill(*thread);
        }
    }

    fn made(&mut self, thread: i32, vfork: bool) -> io::Result<()> {
        let new = ptrace::message(thread)?;
        let Some(task) = self.tasks.get(&thread) else { return Ok(()) };
        let maker = task.process;
        let registers = Registers::of(thread)?;
        let flags = if registers.call() == libc::SYS_clone { registers.arguments()[0] as c_int } else { 0 };
        let process = if flags & libc::CLONE_THREAD != 0 { maker } else { new };
        if process == new
            && let Some(maker) = self.processes.get(&maker)
        {
            let child = maker.child(new, vfork || flags & libc::CLONE_VM != 0);
            self.processes.entry(new).or_insert(child);
        }
        self.tasks.entry(new).or_insert(Task { process, inside: None });
        if self.early.remove(&new) {
            let _ = ptrace::go_on(new, 0);
        }
        Ok(())
    }

    fn entry(&mut self, thread: i32) -> io::Result<()> {
        let mut registers = Registers::of(thread)?;
        if registers.call() == libc::SYS_clone {
            // Whoever makes processes that nobody traces leaves something behind: the flag goes.
            registers.set_argument(0, registers.arguments()[0] & !(libc::CLONE_UNTRACED as u64));
            registers.give(thread)?;
            return ptrace::go_on(thread, 0);
        }
        let verdict = match self.call(thread, &registers) {
            Ok(Verdict::Instead(instead)) => self.instead(thread, &mut registers, instead),
            other => other,
        };
        match verdict {
            Ok(Verdict::Kernel) => return ptrace::go_on(thread, 0),
            Ok(Verdict::Set | Verdict::Instead(_)) => {
                registers.give(thread)?;
                return ptrace::go_to_end(thread);
            }
            Ok(Verdict::Answer(value)) => registers.answer(value),
            Err(error) => registers.answer(-i64::from(error)),
        }
        registers.give(thread)?;
        ptrace::go_on(thread, 0)
    }

    fn instead(&mut self, thread: i32, registers: &mut Registers, instead: Instead) -> Answered {
        let before = *registers;
        let Instead { bytes, numbers, list, after, hosts } = instead;
        let round = |size: usize| size.next_multiple_of(8);
        let listed = list.as_ref().map_or(0, |(_, strings, pointers)| {
            8 * (strings.len() + pointers.len() + 1) + strings.iter().map(|string| round(string.len() + 1)).sum::<usize>()
        });
        let size = listed + bytes.iter().map(|(_, bytes)| round(bytes.len())).sum::<usize>();
        let process = self.process(thread)?;
        let (start, slot) = process.room(&before, size as u64)?;
        let mut all = Vec::with_capacity(size);
        for (argument, bytes) in &bytes {
            registers.set_argument(*argument, start + all.len() as u64);
            all.extend_from_slice(bytes);
            all.resize(round(all.len()), 0);
        }
        if let Some((argument, strings, pointers)) = list {
            registers.set_argument(argument, start + all.len() as u64);
            let mut next = start + (all.len() + 8 * (strings.len() + pointers.len() + 1)) as u64;
            for string in &strings {
                all.extend(next.to_ne_bytes());
                next += round(string.len() + 1) as u64;
            }
            all.extend(pointers.iter().chain([&0]).flat_map(|pointer| pointer.to_ne_bytes()));
            for string in strings {
                all.extend(string);
                all.push(0);
                all.resize(round(all.len()), 0);
            }
        }
        if let Err(error) = process.memory().and_then(|memory| memory.write(start, &all)) {
            process.free(slot);
            return Err(error);
        }
        for (argument, number) in numbers {
            registers.set_argument(argument, number);
        }
        if let Some(task) = self.tasks.get_mut(&thread) {
            task.inside = Some(Inside { before, after, hosts, slot });
        }
        Ok(Verdict::Set)
    }

    fn end(&mut self, thread: i32) -> io::Result<()> {
        let inside = self.tasks.get_mut(&thread).and_then(|task| task.inside.take());
        let Some(inside) = inside else { return ptrace::go_on(thread, 0) };
        if let Ok(process) = self.process(thread) {
            process.free(inside.slot);
        }
        let mut registers = Registers::of(thread)?;
        registers.set_arguments(inside.before.arguments());
        let result = registers.result();
        match failed(result) {
            None => self.succeeded(thread, inside.after, result),
            Some(libc::EACCES) if self.open_up(thread, &inside.hosts) => registers.again(inside.before.call()),
            Some(libc::ETXTBSY) if inside.hosts.iter().any(|host| self.programs.is_busy(host)) => registers.again(inside.before.call()),
            Some(_) => {}
        }
        registers.give(thread)?;
        ptrace::go_on(thread, 0)
    }

    fn succeeded(&mut self, thread: i32, after: After, result: i64) {
        match after {
            After::Nothing | After::Program(_) => {}
            After::Made(host, owner) => self.note(&host, false, owner),
            After::Opened(owner) => self.note(&super::paths::link_of(thread, result as c_int), true, owner),
            // A caller that gave no room for it gets none.
            After::Address(at, room) => drop(self.tell_address(thread, at, room)),
        }
    }

    fn executed(&mut self, thread: i32) -> io::Result<()> {
        // A thread that was not the first of its process has the number of that one now.
        let former = ptrace::message(thread)?;
        let Some(mut task) = self.tasks.remove(&former) else { return Ok(()) };
        let inside = task.inside.take();
        task.process = thread;
        self.tasks.insert(thread, task);
        let Some(Inside { after: After::Program(program), .. }) = inside else { return Ok(()) };
        let Some(process) = self.processes.get_mut(&thread) else { return Ok(()) };
        process.credentials.become_owner(program.mode, program.owner);
        process.program.clone_from(&program.path);
        process.renew(None);
        if let Ok(scratch) = super::exec::settle(thread, process, &program.name) {
            process.renew(scratch);
        }
        Ok(())
    }

    pub(super) fn process(&mut self, thread: i32) -> Result<&mut Process, c_int> {
        let process = self.tasks.get(&thread).ok_or(libc::ESRCH)?.process;
        self.processes.get_mut(&process).ok_or(libc::ESRCH)
    }

    pub(super) fn memory(&mut self, thread: i32) -> Result<&Memory, c_int> {
        self.process(thread)?.memory()
    }

    pub(super) fn is_root(&mut self, thread: i32) -> bool {
        self.process(thread).is_ok_and(|process| process.credentials.user.effective == 0)
    }

    /// Asks the paths on behalf of a thread.
    pub(super) fn with_paths<T>(&mut self, thread: i32, ask: impl FnOnce(&mut Paths, Caller<'_>) -> Result<T, c_int>) -> Result<T, c_int> {
        let number = self.tasks.get(&thread).ok_or(libc::ESRCH)?.process;
        let processes = &self.processes;
        let root = &processes.get(&number).ok_or(libc::ESRCH)?.root;
        let program = |number: i32| processes.get(&number).map(|process| process.program.clone());
        ask(&mut self.paths, Caller { thread, process: number, root, program: &program })
    }

    /// Where a path of a thread is.
    pub(super) fn find(&mut self, thread: i32, dir: c_int, path: &[u8], follow: bool) -> Result<Found, c_int> {
        for _ in 0..OPENINGS_MAX {
            let found = self.with_paths(thread, |paths, caller| paths.find(caller, dir, path, follow));
            let closed = self.paths.closed();
            if found.as_ref().err() != Some(&libc::EACCES) || closed.is_empty() || !self.open_up(thread, &[closed]) {
                return found;
            }
        }
        Err(libc::EACCES)
    }

    /// Where the path at an address is.
    pub(super) fn find_at(&mut self, thread: i32, dir: c_int, at: u64, follow: bool) -> Result<Found, c_int> {
        let path = self.memory(thread)?.read_string(at)?;
        self.find(thread, dir, &path, follow)
    }

    /// Root may everything: gives the disk's owner the bits that he lacks on the way to files. True: something was changed.
    pub(super) fn open_up(&mut self, thread: i32, hosts: &[Vec<u8>]) -> bool {
        let root = self.is_root(thread);
        let mut changed = false;
        for host in hosts.iter().filter(|_| root) {
            if let Some(own) = self.paths.own_part(host) {
                changed |= super::modes::open_up(&mut self.owners, host, own);
            }
        }
        changed
    }

    fn call(&mut self, thread: i32, registers: &Registers) -> Answered {
        let (number, args) = (registers.call(), registers.arguments());
        if let Some(answer) = self.ids(thread, number, args)? {
            return Ok(answer);
        }
        match number {
            libc::SYS_execve => self.execute(thread, libc::AT_FDCWD, args[0], [args[1], args[2]], 0, 0),
            libc::SYS_execveat => self.execute(thread, args[0] as c_int, args[1], [args[2], args[3]], args[4] as c_int, 1),
            libc::SYS_bind | libc::SYS_connect | libc::SYS_sendto | libc::SYS_getsockname | libc::SYS_getpeername => {
                self.address(thread, number, args)
            }
            number => self.file(thread, number, args),
        }
    }

    /// Whatever the step left, by the end of everything.
    pub(super) fn into_owners(self) -> Owners {
        self.owners
    }
}

fn kill(thread: i32) {
    // SAFETY: no pointers. The whole process of the thread dies.
    unsafe { libc::kill(thread, libc::SIGKILL) };
}
