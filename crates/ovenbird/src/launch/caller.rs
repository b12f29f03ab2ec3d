//! Who started a worker, so that the next caller on this machine knows what nobody waits for any more.

use std::fmt;
use std::fs;

use ovenbird_oci::Digest;

/// A process: machine, boot, process-id namespace, process id, and when it started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caller {
    machine: String,
    boot: String,
    namespace: String,
    pid: u32,
    started: String,
}

fn read(path: &str) -> String {
    fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// When a process started, in ticks since the boot. Source: proc_pid_stat(5), field 22.
fn started(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses, which may have anything in it.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    (state != "Z").then(|| fields.nth(18).unwrap_or_default().to_owned())
}

impl Caller {
    /// This process.
    pub(super) fn own() -> Self {
        let namespace = fs::read_link("/proc/self/ns/pid").map(|link| link.display().to_string()).unwrap_or_default();
        let pid = std::process::id();
        Self {
            // The id itself is nobody's business.
            machine: Digest::of(format!("ovenbird {}", read("/etc/machine-id")).as_bytes()).hex()[..16].to_owned(),
            boot: read("/proc/sys/kernel/random/boot_id"),
            namespace: namespace.chars().filter(char::is_ascii_digit).collect(),
            pid,
            started: started(pid).unwrap_or_default(),
        }
    }

    /// As [`fmt::Display`] writes it.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('/').map(str::to_owned);
        let mut part = || parts.next();
        Some(Self { machine: part()?, boot: part()?, namespace: part()?, pid: part()?.parse().ok()?, started: part()? })
    }

    /// Is it surely gone? Of other machines and other namespaces nothing is known.
    pub(super) fn is_gone(&self, own: &Self) -> bool {
        if self.boot != own.boot {
            return self.machine == own.machine && !own.machine.is_empty();
        }
        self.namespace == own.namespace && started(self.pid).as_ref() != Some(&self.started)
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}/{}", self.machine, self.boot, self.namespace, self.pid, self.started)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_gone() {
        let own = Caller::own();
        assert_eq!(Caller::parse(&own.to_string()).as_ref(), Some(&own));
        assert!(!own.is_gone(&own));
        let with = |change: &dyn Fn(&mut Caller)| {
            let mut other = own.clone();
            change(&mut other);
            other.is_gone(&own)
        };
        assert!(with(&|c| c.started = "1".into()), "another process has the number now");
        assert!(with(&|c| c.pid = u32::MAX));
        assert!(with(&|c| c.boot = "before".into()));
        assert!(!with(&|c| (c.boot, c.machine) = ("x".into(), "another".into())), "of another machine nothing is known");
        assert!(!with(&|c| (c.namespace, c.pid) = ("1".into(), u32::MAX)));
        assert_eq!(Caller::parse("a/b"), None);
    }
}
