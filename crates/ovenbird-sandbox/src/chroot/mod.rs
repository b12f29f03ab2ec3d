//! The chroot level: root inside an ordinary container, which may neither mount nor unshare.
//!
//! There is no isolation here beyond the container's own. What other levels mount is put into the root folder before the step
//! ([`place`]) and taken out again after it; a small supervisor process ([`supervisor`]) ends everything that the step started.

pub(crate) mod copy;
mod place;
mod supervisor;

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::cgroup::Cgroup;
use crate::child::Child;
use crate::failure::Context;
use crate::prepare::Scratch;
use crate::reap::{self, Running};
use crate::step::{self, Program, Streams};
use crate::{DEFAULT_HOSTNAME, Level, Network, Outcome, Root, SandboxError, Step, Stream, limits, mounts, socket, syscall};

pub(crate) fn run(step: &Step, output: &mut dyn FnMut(Stream, &[u8]), cancel: &AtomicBool) -> Result<Outcome, SandboxError> {
    let refused = |option: &str, reason: &str| SandboxError::Refused {
        option: option.to_owned(),
        level: Level::Chroot.name(),
        reason: reason.to_owned(),
    };
    if step.network == Network::None {
        return Err(refused(
            "--network none",
            "a network namespace needs CAP_SYS_ADMIN; give it to the container, or leave the option out",
        ));
    }
    if step.limits.shm_size.is_some() {
        return Err(refused("--shm-size", "mounting /dev/shm needs CAP_SYS_ADMIN; give it to the container, or leave the option out"));
    }
    // The name that every step has is in /etc/hostname; one that was asked for is for programs that ask the kernel.
    if step.hostname != DEFAULT_HOSTNAME {
        return Err(refused("--hostname", "a name of its own needs CAP_SYS_ADMIN; give it to the container, or leave the option out"));
    }
    let Root::Dir(root) = &step.root else {
        return Err(SandboxError::Impossible { reason: "the chroot level cannot mount an overlay: give it a plain folder".to_owned() });
    };
    let resources = limits::resources(Level::Chroot, &step.limits)?;
    let cgroup = Cgroup::new(Level::Chroot, &step.limits)?;
    let scratch = Scratch(&step.scratch);
    let root = mounts::open_path(root).context(|| format!("opening the root folder {}", root.display()))?;
    let mut placed = place::Placed::new(root.as_fd(), &step.scratch);
    let result = match placed.fill(step) {
        Ok(sockets) => start(step, root.as_raw_fd(), &cgroup, &resources).and_then(|running| follow(running, &sockets, output, cancel)),
        Err(error) => Err(error),
    };
    let undone = placed.undo();
    scratch.clear();
    let mut outcome = result?;
    undone?;
    outcome.out_of_memory = cgroup.out_of_memory();
    outcome.peak_memory = cgroup.peak_memory().or(outcome.peak_memory);
    Ok(outcome)
}

struct Started {
    running: Running,
    report: std::os::fd::OwnedFd,
}

fn start(step: &Step, root: RawFd, cgroup: &Cgroup, resources: &[(u32, libc::rlimit64)]) -> Result<Started, SandboxError> {
    // SAFETY: the caller keeps the root open.
    let root_fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(root) };
    let program = Program::new(root_fd, step)?;
    let streams = Streams::new(&step.stdin).context(|| "making pipes".to_owned())?;
    let report = syscall::pipe().context(|| "making a pipe".to_owned())?;
    let go = syscall::pipe().context(|| "making a pipe".to_owned())?;
    let mut keep: Vec<RawFd> = vec![root];
    keep.extend(streams.child());
    keep.sort_unstable();
    let mut keep_too = keep.clone();
    keep_too.extend([report.1.as_raw_fd(), go.0.as_raw_fd()]);
    keep_too.sort_unstable();
    let child = Child {
        program: &program.path,
        argv: program.argv.as_ptr(),
        envp: program.envp.as_ptr(),
        cwd: &program.cwd,
        stdio: [streams.stdin.as_raw_fd(), streams.stdout.1.as_raw_fd(), streams.stderr.1.as_raw_fd()],
        errors: streams.errors.1.as_raw_fd(),
        go: streams.go.0.as_raw_fd(),
        keep: &keep,
        root,
        proc: None,
        filter: None,
        recorder: None,
        limits: resources,
        bounding: None,
        ids: Some((step.user.uid, step.user.gid)),
        groups: &step.user.groups,
        caps: None,
    };
    let supervisor = supervisor::Supervisor { child: &child, keep: &keep_too, report: report.1.as_raw_fd(), go: go.0.as_raw_fd() };
    let (pid, pidfd) = step::clone(0, &supervisor).context(|| "clone".to_owned())?;
    let mut running = Running { pid, pidfd, stdout: streams.stdout.0, stderr: streams.stderr.0, kill: libc::SIGTERM, reaped: false };
    cgroup.add(pid)?;
    // SAFETY: one byte of a constant.
    unsafe { libc::write(go.1.as_raw_fd(), [1u8].as_ptr().cast(), 1) };
    drop((streams.stdin, streams.stdout.1, streams.stderr.1, streams.errors.1, streams.go.0, report.1, go));
    step::start(&streams.go.1, &streams.errors.0, step, &mut running)?;
    Ok(Started { running, report: report.0 })
}

fn follow(
    started: Started,
    sockets: &place::Sockets,
    output: &mut dyn FnMut(Stream, &[u8]),
    cancel: &AtomicBool,
) -> Result<Outcome, SandboxError> {
    let Started { mut running, report } = started;
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stopping = step::Stop(&stop);
        for (listener, to) in sockets {
            let stop = &stop;
            scope.spawn(move || socket::forward(listener, to, stop));
        }
        let ended = running.follow(output, cancel);
        drop(running);
        drop(stopping);
        debug_assert!(stop.load(Ordering::Relaxed));
        let ended = ended.context(|| "following the step".to_owned())?;
        let mut outcome = Outcome { code: reap::exit_code(ended.status), cancelled: ended.cancelled, ..Outcome::default() };
        if let Some(report) = supervisor::read(&report) {
            outcome.code = reap::exit_code(report.status);
            outcome.cpu_micros = report.cpu_micros;
            outcome.peak_memory = Some(report.max_rss);
        }
        Ok(outcome)
    })
}
