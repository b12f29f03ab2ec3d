//! Resource limits of a process (`setrlimit`).

use crate::{Level, Limits, SandboxError};

/// Docker's names (`docker/go-units`) and the kernel's numbers.
const NAMES: [(&str, u32); 16] = [
    ("as", libc::RLIMIT_AS),
    ("core", libc::RLIMIT_CORE),
    ("cpu", libc::RLIMIT_CPU),
    ("data", libc::RLIMIT_DATA),
    ("fsize", libc::RLIMIT_FSIZE),
    ("locks", libc::RLIMIT_LOCKS),
    ("memlock", libc::RLIMIT_MEMLOCK),
    ("msgqueue", libc::RLIMIT_MSGQUEUE),
    ("nice", libc::RLIMIT_NICE),
    ("nofile", libc::RLIMIT_NOFILE),
    ("nproc", libc::RLIMIT_NPROC),
    ("rss", libc::RLIMIT_RSS),
    ("rtprio", libc::RLIMIT_RTPRIO),
    ("rttime", libc::RLIMIT_RTTIME),
    ("sigpending", libc::RLIMIT_SIGPENDING),
    ("stack", libc::RLIMIT_STACK),
];

/// The `--ulimit` options as (resource, limit).
pub(crate) fn resources(level: Level, limits: &Limits) -> Result<Vec<(u32, libc::rlimit64)>, SandboxError> {
    limits.ulimits.iter().map(|(name, soft, hard)| resource(level, name, *soft, *hard)).collect()
}

fn resource(level: Level, name: &str, soft: i64, hard: i64) -> Result<(u32, libc::rlimit64), SandboxError> {
    let refused = |reason: String| SandboxError::Refused { option: format!("--ulimit {name}={soft}:{hard}"), level: level.name(), reason };
    let Some((_, resource)) = NAMES.iter().find(|(known, _)| *known == name) else {
        let known: Vec<&str> = NAMES.iter().map(|(known, _)| *known).collect();
        return Err(refused(format!("there is no limit {name:?}; use one of {}", known.join(", "))));
    };
    let value = |value: i64| match value {
        -1 => Some(libc::RLIM64_INFINITY),
        _ => u64::try_from(value).ok(),
    };
    let (Some(cur), Some(max)) = (value(soft), value(hard)) else {
        return Err(refused("a limit is a number, or -1 for none".to_owned()));
    };
    if cur > max {
        return Err(refused("the soft limit is above the hard limit".to_owned()));
    }
    // SAFETY: an all-zero limit is valid.
    let mut now: libc::rlimit64 = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid.
    let known = unsafe { libc::syscall(libc::SYS_prlimit64, 0, *resource, std::ptr::null::<libc::rlimit64>(), &raw mut now) } == 0;
    if known && max > now.rlim_max && !crate::caps::has(crate::caps::SYS_RESOURCE) {
        return Err(refused(format!(
            "the engine's own hard limit is {} and it may not raise it (CAP_SYS_RESOURCE); raise it for the engine",
            now.rlim_max
        )));
    }
    if known && max > now.rlim_max && !matches!(level, Level::Root | Level::Chroot) {
        return Err(refused(format!("the engine's own hard limit is {}; only real root may raise it", now.rlim_max)));
    }
    Ok((*resource, libc::rlimit64 { rlim_cur: cur, rlim_max: max }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ulimits() {
        for (name, soft, hard, want) in [
            ("nofile", 64, 128, Ok((libc::RLIMIT_NOFILE, 64, 128))),
            ("core", 0, 0, Ok((libc::RLIMIT_CORE, 0, 0))),
            ("fsize", 1, 2, Ok((libc::RLIMIT_FSIZE, 1, 2))),
            ("nofiles", 1, 2, Err("no limit \"nofiles\"")),
            ("NOFILE", 1, 2, Err("no limit")),
            ("nofile", 3, 2, Err("soft limit is above")),
            ("nofile", -2, 2, Err("a limit is a number")),
        ] {
            let got = resource(Level::Rootless, name, soft, hard).map(|(id, limit)| (id, limit.rlim_cur, limit.rlim_max));
            match (got, want) {
                (Ok(got), Ok(want)) => assert_eq!(got, want, "{name}"),
                (Err(error), Err(want)) => assert!(error.to_string().contains(want), "{name}: {error}"),
                (got, want) => panic!("{name}={soft}:{hard}: {got:?}, not {want:?}"),
            }
        }
    }
}
