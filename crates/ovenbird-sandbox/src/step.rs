//! One step at the levels with namespaces.
//!
//! Two threads: a helper leaves the engine's namespaces, mounts, clones the child (whose parent-death signal hangs on the helper)
//! and takes everything down again; the caller's thread passes output on. Between them go two messages: "running" and "ended".

use std::ffi::{CString, OsStr};
use std::io::{self, Seek as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender, channel};

use libc::c_char;

use crate::cgroup::Cgroup;
use crate::child::{self, Child, Proc, Stage};
use crate::failure::Context;
use crate::notify::Recorder;
use crate::owners::{self, Owners};
use crate::prepare::{self, Filled, Rooted, Scratch, Sockets};
use crate::reap::{self, Running};
use crate::syscall::{self, c_bytes, c_path, check};
use crate::{Level, Outcome, Root, SandboxError, Step, Stream, caps, limits, mounts, seccomp, socket};

type Table = Vec<(PathBuf, u32, u32, Option<(u32, u32, u32)>)>;

/// The engine's side of one step.
#[derive(Clone, Copy)]
struct Job<'a> {
    level: Level,
    step: &'a Step,
    cgroup: &'a Cgroup,
    resources: &'a [(u32, libc::rlimit64)],
    running: &'a Sender<Started>,
    ended: &'a Receiver<Owners>,
}

/// First message: the child runs the step's program.
struct Started {
    running: Running,
    recorder: Option<Recorder>,
    sockets: Sockets,
}

pub(crate) fn run(level: Level, step: &Step, output: &mut dyn FnMut(Stream, &[u8]), cancel: &AtomicBool) -> Result<Outcome, SandboxError> {
    let resources = limits::resources(level, &step.limits)?;
    let cgroup = Cgroup::new(level, &step.limits)?;
    let (running_tx, running_rx) = channel();
    let (ended_tx, ended_rx) = channel();
    let (cgroup, resources) = (&cgroup, &resources[..]);
    // `move`: when `output` panics, the sender goes first, or the helper would wait for ever.
    std::thread::scope(move |scope| {
        let helper = std::thread::Builder::new()
            .name("ovenbird-step".to_owned())
            .spawn_scoped(scope, move || helper(Job { level, step, cgroup, resources, running: &running_tx, ended: &ended_rx }))
            .context(|| "starting a thread".to_owned())?;
        let followed = match running_rx.recv() {
            Ok(started) => Some(follow(started, output, cancel)),
            Err(_) => None,
        };
        let (outcome, recorded) = match followed {
            Some(Ok((outcome, recorded))) => (Ok(outcome), recorded),
            Some(Err(error)) => (Err(error), Owners::default()),
            None => (Ok(Outcome::default()), Owners::default()),
        };
        // The helper is gone only when it failed before.
        let _ = ended_tx.send(recorded);
        let table = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let mut outcome = outcome?;
        outcome.owners = table;
        outcome.out_of_memory = cgroup.out_of_memory();
        outcome.peak_memory = cgroup.peak_memory().or(outcome.peak_memory);
        Ok(outcome)
    })
}

fn follow(started: Started, output: &mut dyn FnMut(Stream, &[u8]), cancel: &AtomicBool) -> Result<(Outcome, Owners), SandboxError> {
    let Started { mut running, recorder, sockets } = started;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Also when `output` panics: the scope waits for these threads.
        let stopping = Stop(&stop);
        for (listener, to) in &sockets {
            let stop = &stop;
            scope.spawn(move || socket::forward(listener, to, stop));
        }
        let recording = recorder.map(|recorder| scope.spawn(|| recorder.serve(&stop)));
        let ended = running.follow(output, cancel);
        // Kills what an error left alive: the recorder ends with the last process of the step.
        drop(running);
        drop(stopping);
        let recorded = recording.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        let ended = ended.context(|| "following the step".to_owned())?;
        let outcome = Outcome {
            code: reap::exit_code(ended.status),
            cancelled: ended.cancelled,
            peak_memory: Some(ended.max_rss),
            cpu_micros: ended.cpu_micros,
            ..Outcome::default()
        };
        Ok((outcome, recorded.unwrap_or_default()))
    })
}

/// Sets the flag when it goes out of scope, on panics too.
pub(crate) struct Stop<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

/// The helper thread: from leaving the engine's namespaces to the last clean-up.
fn helper(job: Job<'_>) -> Result<Table, SandboxError> {
    let step = job.step;
    let scratch = Scratch(&step.scratch);
    scratch.make().context(|| format!("making folders in {}", step.scratch.display()))?;
    let home = std::fs::File::open("/proc/thread-self/ns/mnt").context(|| "opening the engine's mount namespace".to_owned())?;
    let result = inside(job, home.as_fd());
    scratch.clear();
    if let Root::Overlay { work, .. } = &step.root {
        // `volatile` leaves a mark there that forbids the next mount.
        let _ = crate::remove::remove(work);
    }
    result
}

fn inside(job: Job<'_>, home: BorrowedFd<'_>) -> Result<Table, SandboxError> {
    let Job { level, step, .. } = job;
    prepare::leave(step)?;
    let rooted = prepare::root(step);
    let result = rooted.map(|mut rooted| {
        let result = live(job, &mut rooted);
        (rooted, result)
    });
    // The old mount namespace dies here, and every mount of the step with it, but for `clean`.
    let back = syscall::setns(home, libc::CLONE_NEWNS).context(|| "returning to the engine's mount namespace".to_owned());
    let (Rooted { root, clean, mut stubs }, result) = result?;
    drop(root);
    stubs.remove();
    let table = match (&result, &step.root, level) {
        (Ok(recorded), Root::Overlay { upper, .. }, Level::SingleId) => {
            owners::table(clean.as_fd(), upper, recorded, (step.user.uid, step.user.gid))
                .context(|| "collecting the owners of the changed files".to_owned())
        }
        (Ok(recorded), Root::Dir(folder), Level::SingleId) => {
            owners::table(clean.as_fd(), folder, recorded, (0, 0)).context(|| "collecting the owners of the changed files".to_owned())
        }
        _ => Ok(Vec::new()),
    };
    drop(clean);
    stubs.prune();
    result?;
    back?;
    let mut table = table?;
    if let Root::Overlay { upper, .. } = &step.root {
        table.retain(|(path, ..)| upper.join(path).symlink_metadata().is_ok());
    }
    Ok(table)
}

/// From the first mount to the end of the step's last process.
fn live(job: Job<'_>, rooted: &mut Rooted) -> Result<Owners, SandboxError> {
    let Job { level, step, .. } = job;
    let filled = prepare::fill(level, step, rooted)?;
    let mut lower = Owners::default();
    if level == Level::SingleId {
        lower = owners::lower(rooted.clean.as_fd(), &step.lower_owners);
        lower.add_mounts(rooted.root.as_fd(), step);
    }
    let started = spawn(job, rooted, filled, lower)?;
    // A caller that went away has dropped (and so killed) the step already.
    let _ = job.running.send(started);
    Ok(job.ended.recv().unwrap_or_default())
}

/// A NULL-terminated array of C strings.
pub(crate) struct Pointers {
    _strings: Vec<CString>,
    pointers: Vec<*const c_char>,
}

// SAFETY: the pointers lead into the strings, which go along.
unsafe impl Send for Pointers {}

impl Pointers {
    pub(crate) fn as_ptr(&self) -> *const *const c_char {
        self.pointers.as_ptr()
    }
}

fn pointers<'a>(values: impl Iterator<Item = &'a OsStr>) -> io::Result<Pointers> {
    let strings: Vec<CString> = values.map(|value| c_bytes(value.as_bytes())).collect::<io::Result<_>>()?;
    let pointers = strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect();
    Ok(Pointers { _strings: strings, pointers })
}

/// What the child becomes, in the form that the kernel takes.
pub(crate) struct Program {
    pub(crate) path: CString,
    pub(crate) argv: Pointers,
    pub(crate) envp: Pointers,
    pub(crate) cwd: CString,
}

impl Program {
    pub(crate) fn new(root: BorrowedFd<'_>, step: &Step) -> Result<Program, SandboxError> {
        let path = prepare::find_program(root, step).context(|| "looking for the program".to_owned())?;
        Program::found(path.ok_or_else(|| missing_program(step))?, step)
    }

    /// The one at this path of the step.
    pub(crate) fn found(path: CString, step: &Step) -> Result<Program, SandboxError> {
        Ok(Program {
            path,
            argv: pointers(step.args.iter().map(|arg| &**arg)).context(|| "an argument with a NUL byte".to_owned())?,
            envp: pointers(step.env.iter().map(|entry| &**entry)).context(|| "an environment variable with a NUL byte".to_owned())?,
            cwd: c_path(&step.cwd).context(|| "a working directory with a NUL byte".to_owned())?,
        })
    }
}

/// Standard input: a file in memory, or `/dev/null`.
pub(crate) fn stdin(content: &[u8]) -> io::Result<OwnedFd> {
    if content.is_empty() {
        return mounts::open_path(std::path::Path::new("/dev/null")).and_then(|_| std::fs::File::open("/dev/null")).map(OwnedFd::from);
    }
    // SAFETY: constant name; the descriptor is fresh.
    let mut file = unsafe {
        let raw = check(libc::memfd_create(c"stdin".as_ptr(), libc::MFD_CLOEXEC).into())?;
        std::fs::File::from_raw_fd(raw as RawFd)
    };
    file.write_all(content)?;
    file.rewind()?;
    Ok(file.into())
}

fn spawn(job: Job<'_>, rooted: &Rooted, filled: Filled, lower: Owners) -> Result<Started, SandboxError> {
    let Job { level, step, cgroup, resources, .. } = job;
    let program = Program::new(rooted.root.as_fd(), step)?;
    let streams = Streams::new(&step.stdin).context(|| "making pipes".to_owned())?;
    let recorder = (level == Level::SingleId).then(UnixStream::pair).transpose().context(|| "making a socket pair".to_owned())?;
    let available = caps::permitted().context(|| "capget".to_owned())?;
    let mut keep: Vec<RawFd> = vec![rooted.root.as_raw_fd(), filled.proc_target.as_raw_fd(), filled.proc_fallback.as_raw_fd()];
    keep.extend(streams.child());
    keep.extend(recorder.as_ref().map(|(_, theirs)| theirs.as_raw_fd()));
    keep.sort_unstable();
    let child = Child {
        program: &program.path,
        argv: program.argv.as_ptr(),
        envp: program.envp.as_ptr(),
        cwd: &program.cwd,
        stdio: [streams.stdin.as_raw_fd(), streams.stdout.1.as_raw_fd(), streams.stderr.1.as_raw_fd()],
        errors: streams.errors.1.as_raw_fd(),
        go: streams.go.0.as_raw_fd(),
        keep: &keep,
        root: rooted.root.as_raw_fd(),
        proc: Some(Proc { target: filled.proc_target.as_raw_fd(), fallback: filled.proc_fallback.as_raw_fd(), mask: !step.insecure }),
        filter: (!step.insecure).then(seccomp::docker),
        recorder: recorder.as_ref().map(|(_, theirs)| (seccomp::recorder(), theirs.as_raw_fd())),
        limits: resources,
        bounding: (!step.insecure).then_some(caps::DOCKER),
        ids: (level != Level::SingleId).then_some((step.user.uid, step.user.gid)),
        groups: &step.user.groups,
        caps: (!step.insecure).then_some(caps::DOCKER & available),
    };
    let (pid, pidfd) = clone(libc::CLONE_NEWPID, &child).context(|| "clone(pid namespace)".to_owned())?;
    let mut running = Running { pid, pidfd, stdout: streams.stdout.0, stderr: streams.stderr.0, kill: libc::SIGKILL, reaped: false };
    cgroup.add(pid)?;
    drop((streams.stdin, streams.stdout.1, streams.stderr.1, streams.errors.1, streams.go.0));
    start(&streams.go.1, &streams.errors.0, step, &mut running)?;
    let recorder = match recorder {
        Some((ours, theirs)) => {
            drop(theirs);
            let listener = child::receive_descriptor(ours.as_fd()).context(|| "receiving the recorder's listener".to_owned())?;
            let user = (step.user.uid, step.user.gid, step.user.groups.clone());
            listener.map(|listener| Recorder::new(listener, user, pid, lower))
        }
        None => None,
    };
    Ok(Started { running, recorder, sockets: filled.sockets })
}

/// Descriptors between engine and child.
pub(crate) struct Streams {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: (OwnedFd, OwnedFd),
    pub(crate) stderr: (OwnedFd, OwnedFd),
    pub(crate) errors: (OwnedFd, OwnedFd),
    pub(crate) go: (OwnedFd, OwnedFd),
}

impl Streams {
    pub(crate) fn new(input: &[u8]) -> io::Result<Streams> {
        Ok(Streams {
            stdin: stdin(input)?,
            stdout: reap::output_pipe()?,
            stderr: reap::output_pipe()?,
            errors: syscall::pipe()?,
            go: syscall::pipe()?,
        })
    }

    /// The child's ends.
    pub(crate) fn child(&self) -> [RawFd; 5] {
        [self.stdin.as_raw_fd(), self.stdout.1.as_raw_fd(), self.stderr.1.as_raw_fd(), self.errors.1.as_raw_fd(), self.go.0.as_raw_fd()]
    }
}

/// Lets the child go and waits until it has become the program, or has said why not.
pub(crate) fn start(go: &OwnedFd, errors: &OwnedFd, step: &Step, running: &mut Running) -> Result<(), SandboxError> {
    // A child that died already shows in the other pipe.
    // SAFETY: one byte of a constant.
    unsafe { libc::write(go.as_raw_fd(), [1u8].as_ptr().cast(), 1) };
    let mut message = [0u32; 2];
    let n = loop {
        // SAFETY: eight bytes of room.
        match check(unsafe { libc::read(errors.as_raw_fd(), message.as_mut_ptr().cast(), size_of_val(&message)) } as libc::c_long) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other.context(|| "reading the child's error pipe".to_owned())?,
        }
    };
    if n == 0 {
        return Ok(());
    }
    let _ = reap::wait4(running.pid);
    running.reaped = true;
    Err(failure(step, Stage::from_number(message[0]), io::Error::from_raw_os_error(message[1] as i32)))
}

/// Why the child has not become the program.
pub(crate) fn failure(step: &Step, stage: Option<Stage>, source: io::Error) -> SandboxError {
    match stage {
        Some(Stage::Exec) => {
            SandboxError::Exec { program: step.args.first().map(|arg| arg.to_string_lossy().into_owned()).unwrap_or_default(), source }
        }
        Some(Stage::Cwd) => SandboxError::Cwd { path: step.cwd.clone(), source },
        _ => SandboxError::Setup { what: stage.map_or("starting the step", Stage::what).to_owned(), source },
    }
}

pub(crate) fn missing_program(step: &Step) -> SandboxError {
    let program = step.args.first().map(|arg| arg.to_string_lossy().into_owned()).unwrap_or_default();
    SandboxError::Exec { program, source: io::Error::new(io::ErrorKind::NotFound, "executable file not found in $PATH of the step") }
}

/// What a copy of this process does instead of going on. Only async-signal-safe things are allowed.
pub(crate) trait Process {
    fn run(&self) -> !;
}

/// Copies this thread into a new process that runs `child`.
pub(crate) fn clone(namespaces: i32, child: &impl Process) -> io::Result<(i32, OwnedFd)> {
    let mut pidfd: RawFd = -1;
    let flags = (namespaces | libc::CLONE_PIDFD | libc::SIGCHLD) as libc::c_ulong;
    let blocked = Blocked::new();
    // SAFETY: without CLONE_VM the child is a copy; it calls only async-signal-safe functions and never returns.
    // The order of the arguments is that of x86-64 and aarch64 for the first three.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0usize, &raw mut pidfd, 0usize, 0usize) };
    if pid == 0 {
        child.run();
    }
    drop(blocked);
    let pid = check(pid)?;
    // SAFETY: the kernel wrote a fresh descriptor.
    Ok((pid as i32, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// All signals blocked: between `clone` and its reset the child would run the engine's handlers.
pub(crate) struct Blocked(libc::sigset_t);

impl Blocked {
    pub(crate) fn new() -> Blocked {
        // SAFETY: sets are initialised by the calls.
        unsafe {
            let (mut all, mut old): (libc::sigset_t, libc::sigset_t) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
            Blocked(old)
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: a set that the system gave.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}
