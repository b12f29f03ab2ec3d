//! What a step sees of the network: its three files in `/etc`, and the loopback device.

use std::fmt::Write as _;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::syscall::check;
use crate::{Network, Step};

/// More than any real `resolv.conf`.
const RESOLV_MAX: u64 = 64 * 1024;

/// (path, content) of the generated files. `machine`: the host name that the step really has, when it is not its own.
pub(crate) fn files(step: &Step, machine: Option<&str>) -> [(&'static str, Vec<u8>); 3] {
    [
        ("/etc/resolv.conf", resolv(step, &machine_resolv())),
        ("/etc/hosts", hosts(step, machine)),
        ("/etc/hostname", format!("{}\n", step.hostname).into_bytes()),
    ]
}

fn machine_resolv() -> Vec<u8> {
    let mut text = Vec::new();
    // A machine without the file has no name servers; that is no reason to fail.
    if let Ok(file) = std::fs::File::open("/etc/resolv.conf") {
        let _ = file.take(RESOLV_MAX).read_to_end(&mut text);
    }
    text
}

fn resolv(step: &Step, machine: &[u8]) -> Vec<u8> {
    if step.network == Network::None {
        return Vec::new();
    }
    if step.dns.is_empty() {
        return machine.to_vec();
    }
    let mut out: Vec<u8> = machine
        .split_inclusive(|byte| *byte == b'\n')
        .filter(|line| !line.trim_ascii_start().starts_with(b"nameserver"))
        .flatten()
        .copied()
        .collect();
    if out.last().is_some_and(|byte| *byte != b'\n') {
        out.push(b'\n');
    }
    for server in &step.dns {
        out.extend_from_slice(format!("nameserver {server}\n").as_bytes());
    }
    out
}

fn hosts(step: &Step, machine: Option<&str>) -> Vec<u8> {
    let mut out = String::from("127.0.0.1\tlocalhost");
    if !step.hostname.is_empty() && step.hostname != "localhost" {
        let _ = write!(out, " {}", step.hostname);
    }
    out.push_str("\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    // The chroot level keeps the machine's name: programs that look their own name up must find it.
    if let Some(name) = machine.filter(|name| !name.is_empty() && *name != step.hostname) {
        let _ = writeln!(out, "127.0.1.1\t{name}");
    }
    for (name, address) in &step.hosts {
        let _ = writeln!(out, "{address}\t{name}");
    }
    out.into_bytes()
}

/// Switches the loopback device of this thread's network namespace on.
pub(crate) fn loopback_up() -> io::Result<()> {
    // SAFETY: no pointers; the descriptor is fresh.
    let socket = unsafe {
        let raw = check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0).into())? as i32;
        OwnedFd::from_raw_fd(raw)
    };
    // SAFETY: an all-zero request is valid; the kernel reads and writes only the request.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS as _, &raw mut request).into())?;
        request.ifr_ifru.ifru_flags |= (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw mut request).into()).map(drop)
    }
}
