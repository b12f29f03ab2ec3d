//! The traced level: an ordinary user without any capability or namespace, as in the restricted pods of Kubernetes.
//!
//! The step's processes are traced (`ptrace(2)`); a seccomp filter stops them at the calls that name files or tell who somebody is, and
//! only there ([`calls`]). Paths are led into the root folder ([`paths`]), ids and owners are made up and recorded as at the
//! single-id level ([`tracer`], [`files`], [`ids`]), programs get the linker of the step ([`exec`]).
//! There is no isolation: a step may reach whatever this user may. Only who plays along sees a root of its own.

pub(crate) mod calls;
mod child;
mod exec;
mod files;
mod ids;
mod memory;
mod modes;
mod paths;
mod place;
pub(crate) mod probe;
mod process;
mod ptrace;
mod registers;
mod socket;
mod tracer;

use std::fs;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, channel};

use crate::cgroup::Cgroup;
use crate::child::Stage;
use crate::credentials::Credentials;
use crate::failure::Context as _;
use crate::owners::{self, Owners};
use crate::prepare::Scratch;
use crate::reap::{self, Pipes};
use crate::step::{self, Program, Streams};
use crate::syscall::{self, check};
use crate::{Level, Network, Outcome, Root, SandboxError, Step, Stream, limits, mounts, seccomp, socket as forward};

use self::tracer::{Ended, Tracer};

/// What is missing on every machine like this one.
pub(crate) const MISSING: Option<&str> = None;

type Table = Vec<(PathBuf, u32, u32, Option<(u32, u32, u32)>)>;

pub(crate) fn run(step: &Step, output: &mut dyn FnMut(Stream, &[u8]), cancel: &AtomicBool) -> Result<Outcome, SandboxError> {
    refuse(step)?;
    let Root::Dir(root) = &step.root else {
        return Err(SandboxError::Impossible { reason: "the traced level cannot mount an overlay: give it a plain folder".to_owned() });
    };
    let resources = limits::resources(Level::Traced, &step.limits)?;
    let cgroup = Cgroup::new(Level::Traced, &step.limits)?;
    let real = |path: &Path| fs::canonicalize(path).context(|| format!("resolving {}", path.display()));
    let (root, scratch) = (real(root)?, real(&step.scratch)?);
    let root_fd = mounts::open_path(&root).context(|| format!("opening the root folder {}", root.display()))?;
    // What is in the engine's memory is not the step's business, though it is the same user.
    // SAFETY: numbers only.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0 as libc::c_ulong, 0, 0, 0) };
    let mut placed = place::Placed::new(&root, &scratch);
    let mut recorded = owners::of_folder(root_fd.as_fd(), &step.lower_owners);
    let result = placed.fill(step).and_then(|()| {
        placed.own(step, &mut recorded);
        follow(step, &mut placed, recorded, &scratch, &cgroup, &resources, output, cancel)
    });
    placed.stubs.remove();
    drop(placed);
    Scratch(&scratch).clear();
    let (mut outcome, recorded) = result?;
    outcome.owners = table(&root, root_fd.as_fd(), recorded).context(|| "collecting the owners of the changed files".to_owned())?;
    outcome.out_of_memory = cgroup.out_of_memory();
    outcome.peak_memory = cgroup.peak_memory().or(outcome.peak_memory);
    Ok(outcome)
}

fn refuse(step: &Step) -> Result<(), SandboxError> {
    let refused = |option: &str, reason: &str| {
        Err(SandboxError::Refused { option: option.to_owned(), level: Level::Traced.name(), reason: reason.to_owned() })
    };
    if step.network == Network::None {
        return refused("--network none", "a network namespace needs CAP_SYS_ADMIN or user namespaces; leave the option out");
    }
    if step.limits.shm_size.is_some() {
        return refused("--shm-size", "/dev/shm is an ordinary folder here, which has no size; leave the option out");
    }
    if step.insecure {
        return refused("--security insecure", "this user has no capabilities to give; build where another level works");
    }
    Ok(())
}

/// The program that the step begins with runs, or has said why it cannot.
struct Started {
    pidfd: OwnedFd,
}

/// What the tracing thread is given.
struct Job<'a> {
    step: &'a Step,
    placed: (paths::Paths, Program),
    recorded: Owners,
    scratch: &'a Path,
    cgroup: &'a Cgroup,
    resources: &'a [(u32, libc::rlimit64)],
    streams: Ends,
}

/// The child's ends of its pipes, and both of those between it and the tracing thread.
struct Ends {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
    errors: OwnedFd,
    go: (OwnedFd, OwnedFd),
    ready: (OwnedFd, OwnedFd),
    /// Closed at the end.
    _done: OwnedFd,
}

#[allow(clippy::too_many_arguments, reason = "one caller; each is another part of the step")]
fn follow(
    step: &Step,
    placed: &mut place::Placed<'_>,
    recorded: Owners,
    scratch: &Path,
    cgroup: &Cgroup,
    resources: &[(u32, libc::rlimit64)],
    output: &mut dyn FnMut(Stream, &[u8]),
    cancel: &AtomicBool,
) -> Result<(Outcome, Owners), SandboxError> {
    let path = placed.program(step).context(|| "looking for the program".to_owned())?;
    let path = path.ok_or_else(|| step::missing_program(step))?;
    let program = Program::found(path, step)?;
    let pipe = || syscall::pipe().context(|| "making a pipe".to_owned());
    let Streams { stdin, stdout, stderr, errors, go } = Streams::new(&step.stdin).context(|| "making pipes".to_owned())?;
    let (ready, done) = (pipe()?, pipe()?);
    let streams = Ends { stdin, stdout: stdout.1, stderr: stderr.1, errors: errors.1, go, ready, _done: done.1 };
    let paths = std::mem::replace(&mut placed.paths, paths::Paths::new(Vec::new()));
    let job = Job { step, placed: (paths, program), recorded, scratch, cgroup, resources, streams };
    let stop = AtomicBool::new(false);
    let sockets = &placed.sockets;
    std::thread::scope(|scope| {
        let stopping = step::Stop(&stop);
        for (listener, to) in sockets {
            let stop = &stop;
            scope.spawn(move || forward::forward(listener, to, stop));
        }
        let (sender, receiver) = channel();
        let tracing = std::thread::Builder::new()
            .name("ovenbird-tracer".to_owned())
            .spawn_scoped(scope, move || trace(job, &sender))
            .context(|| "starting a thread".to_owned())?;
        let followed = receiver.recv().ok().map(|Started { pidfd }| {
            let end = End(pidfd);
            let failure = read_failure(errors.0, step);
            let pipes = Pipes { stdout: stdout.0.as_fd(), stderr: stderr.0.as_fd(), end: done.0.as_fd() };
            let cancelled = pipes.follow(output, cancel, || end.now());
            (failure, cancelled)
        });
        drop(stopping);
        let (ended, recorded) = tracing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let Some((failure, cancelled)) = followed else { return Err(impossible("the tracing thread said nothing")) };
        if let Some(error) = failure? {
            return Err(error);
        }
        let micros = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
        let outcome = Outcome {
            code: reap::exit_code(ended.status),
            cancelled: cancelled.context(|| "following the step".to_owned())?,
            peak_memory: Some(ended.usage.ru_maxrss as u64 * 1024),
            cpu_micros: micros(ended.usage.ru_utime) + micros(ended.usage.ru_stime),
            ..Outcome::default()
        };
        Ok((outcome, recorded))
    })
}

fn impossible(reason: &str) -> SandboxError {
    SandboxError::Impossible { reason: reason.to_owned() }
}

/// Ends the step when it goes out of scope, on panics too.
struct End(OwnedFd);

impl End {
    fn now(&self) {
        // It may have ended just now.
        let _ = syscall::signal(self.0.as_fd(), libc::SIGKILL);
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.now();
    }
}

/// What the child says before it has become the program.
fn read_failure(errors: OwnedFd, step: &Step) -> Result<Option<SandboxError>, SandboxError> {
    let mut message = Vec::new();
    fs::File::from(errors).read_to_end(&mut message).context(|| "reading the child's error pipe".to_owned())?;
    let word = |at: usize| message.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes);
    let (Some(stage), Some(errno)) = (word(0), word(4)) else { return Ok(None) };
    Ok(Some(step::failure(step, Stage::from_number(stage), io::Error::from_raw_os_error(errno as i32))))
}

/// The tracing thread: it makes the first process, and nothing of the step outlives it.
fn trace(job: Job<'_>, started: &Sender<Started>) -> Result<(Ended, Owners), SandboxError> {
    let Job { step, placed: (paths, program), recorded, scratch, cgroup, resources, streams } = job;
    let programs = scratch.join("programs");
    fs::create_dir(&programs).context(|| format!("making {}", programs.display()))?;
    let messages = streams.stderr.try_clone().context(|| "copying a descriptor".to_owned())?;
    let Ends { stdin, stdout, stderr, errors, go, ready, _done } = streams;
    let mut keep: Vec<RawFd> = [&stdin, &stdout, &stderr, &errors, &go.0, &ready.1].iter().map(|fd| fd.as_raw_fd()).collect();
    keep.sort_unstable();
    let child = child::Child {
        program: &program.path,
        argv: program.argv.as_ptr(),
        envp: program.envp.as_ptr(),
        cwd: &program.cwd,
        stdio: [stdin.as_raw_fd(), stdout.as_raw_fd(), stderr.as_raw_fd()],
        errors: errors.as_raw_fd(),
        ready: ready.1.as_raw_fd(),
        go: go.0.as_raw_fd(),
        keep: &keep,
        limits: resources,
        filters: [seccomp::docker(), seccomp::tracer()],
    };
    let (pid, pidfd) = step::clone(0, &child).context(|| "clone".to_owned())?;
    drop((stdin, stdout, stderr, errors, go.0, ready.1));
    let traced = cgroup.add(pid).and_then(|()| wait_for(&ready.0).and_then(|()| ptrace::seize(pid)).context(|| "ptrace".to_owned()));
    if let Err(error) = traced {
        let _ = syscall::signal(pidfd.as_fd(), libc::SIGKILL);
        let _ = reap::wait4(pid);
        return Err(error);
    }
    // A caller that went away has killed it already.
    let _ = started.send(Started { pidfd });
    // SAFETY: one byte of a constant.
    unsafe { libc::write(go.1.as_raw_fd(), [1u8].as_ptr().cast(), 1) };
    drop(go.1);
    let user = Credentials::new(step.user.uid, step.user.gid, step.user.groups.clone());
    let programs = exec::Programs::new(programs, messages.into());
    let mut tracer = Tracer::new(pid, user, paths, recorded, programs, socket::Addresses::default());
    let ended = tracer.follow().context(|| "tracing the step".to_owned())?;
    Ok((ended, tracer.into_owners()))
}

fn wait_for(ready: &OwnedFd) -> io::Result<()> {
    let mut byte = 0u8;
    // SAFETY: one byte of room.
    match check(unsafe { libc::read(ready.as_raw_fd(), (&raw mut byte).cast(), 1) } as libc::c_long)? {
        0 => Err(io::Error::other("the step's first process died")),
        _ => Ok(()),
    }
}

/// The owners of everything in the root, and the modes that the disk does not hold: whoever reads the files next is no root either.
fn table(root: &Path, root_fd: std::os::fd::BorrowedFd<'_>, mut recorded: Owners) -> io::Result<Table> {
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            let host = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str());
            let looked = modes::look(host, false, owners::MASK).map_err(io::Error::from_raw_os_error)?;
            modes::open_one(&mut recorded, host, &looked);
            if u32::from(looked.stx_mode) & libc::S_IFMT == libc::S_IFDIR {
                folders.push(path);
            }
        }
    }
    owners::table(root_fd, root, &recorded, (0, 0))
}
