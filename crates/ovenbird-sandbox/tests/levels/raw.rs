//! This program inside a step: calls that no applet makes. What each does is printed.
#![allow(unsafe_code, reason = "the calls are what this is about")]

use std::path::Path;
use std::process::ExitCode;

use libc::c_long;
use ovenbird_sandbox::{Level, Step};

use crate::cases::Case;
use crate::fixture::{Place, install};

/// In the place of a case's name; what follows is which calls.
pub(crate) const NAME: &str = "raw-";
/// What tells the process that nobody is to trace from others.
pub(crate) const SECONDS: &str = "OVENBIRD_SANDBOX_SECONDS";

fn install_self(what: &str, place: &Place, step: &mut Step) {
    install(Path::new("/proc/self/exe"), &place.path("lower/inside"), place);
    step.env.push(format!("{}={NAME}{what}", crate::CASE).into());
}

/// `/inside` starts such a process.
pub(crate) fn asking_not_to_be_traced(place: &Place, step: &mut Step, seconds: &str) {
    install_self("untraced", place, step);
    step.env.push(format!("{SECONDS}={seconds}").into());
}

/// Found by the process that runs the step, which is its alone.
fn seconds() -> String {
    format!("7000.{}", std::process::id())
}

pub(crate) fn cases() -> Vec<Case> {
    vec![Case {
        name: "asking_not_to_be_traced",
        levels: &[Level::Root, Level::Traced],
        script: "/inside",
        set_up: |place, step| asking_not_to_be_traced(place, step, &seconds()),
        check: |ran| {
            ran.says(&format!("clone 0\nclone3 -{}\n", libc::ENOSYS));
            assert_eq!(crate::sleeping(&seconds()), 0);
        },
    }]
}

pub(crate) fn run(what: &str) -> ExitCode {
    match what {
        "untraced" => untraced(),
        _ => return ExitCode::from(2),
    }
    ExitCode::SUCCESS
}

fn told(name: &str, result: c_long) {
    let error = std::io::Error::last_os_error().raw_os_error().unwrap_or_default();
    println!("{name} {}", if result < 0 { -c_long::from(error) } else { result });
}

/// A process that looks like `sleep SECONDS` and asks not to be traced, in the way that has its flags in registers and in the one that has them in memory.
fn untraced() {
    use std::os::unix::process::CommandExt as _;
    if std::env::args().next().as_deref() != Some("sleep") {
        let seconds = std::env::var(SECONDS).unwrap_or_default();
        println!("{}", std::process::Command::new("/inside").arg0("sleep").arg(seconds).exec());
        return;
    }
    let flags = c_long::from(libc::CLONE_UNTRACED | libc::SIGCHLD);
    // SAFETY: without a stack it is a fork; this process has one thread.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if child == 0 {
        // SAFETY: numbers only. Nobody would let it open or start anything.
        unsafe {
            libc::setsid();
            libc::close(1);
            libc::close(2);
            libc::sleep(7000);
            libc::_exit(1);
        }
    }
    told("clone", child.min(0));
    let memory: [u64; 11] = [libc::CLONE_UNTRACED as u64, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0, 0, 0, 0];
    // SAFETY: a struct of that size.
    let child = unsafe { libc::syscall(libc::SYS_clone3, memory.as_ptr(), size_of_val(&memory)) };
    if child == 0 {
        // SAFETY: numbers only.
        unsafe { libc::_exit(0) };
    }
    told("clone3", child.min(0));
}
