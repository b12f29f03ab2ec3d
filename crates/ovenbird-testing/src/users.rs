//! Two ordinary users of the machine: one with subordinate ids, one without.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::{Error, Result, cache, process};

/// An ordinary user that tests run the command as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// Has ranges in `/etc/subuid` and `/etc/subgid`.
    SubId,
    /// Has none.
    Plain,
}

/// Ids of a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ids {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
}

impl User {
    /// Login name.
    pub fn name(self) -> &'static str {
        match self {
            Self::SubId => "ovenbird-test-subid",
            Self::Plain => "ovenbird-test-plain",
        }
    }

    /// Makes the user if missing (needs root) and returns its ids.
    pub fn ensure(self) -> Result<Ids> {
        let _lock = cache::lock("users")?;
        if self.ids().is_none() {
            if !rustix::process::geteuid().is_root() {
                return Err(Error::Missing(format!("user {} does not exist; only root can make it", self.name())));
            }
            // System users get no subordinate ids from useradd, ordinary ones may.
            let mut add = Command::new("useradd");
            add.args(["--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", self.name()]);
            process::output(&mut add)?;
        }
        if self == Self::SubId {
            for file in ["/etc/subuid", "/etc/subgid"] {
                add_range(Path::new(file), self.name())?;
            }
        }
        self.ids().ok_or_else(|| Error::Missing(format!("user {} is not in /etc/passwd", self.name())))
    }

    fn ids(self) -> Option<Ids> {
        let passwd = fs::read_to_string("/etc/passwd").ok()?;
        let line = passwd.lines().find(|line| line.split(':').next() == Some(self.name()))?;
        let mut fields = line.split(':').skip(2);
        Some(Ids { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? })
    }
}

/// Appends a range of 65,536 ids above all ranges of the file.
fn add_range(file: &Path, user: &str) -> Result<()> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let mut next = 100_000u64;
    for line in text.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        if fields.first() == Some(&user) {
            return Ok(());
        }
        if let [_, start, count] = fields[..]
            && let (Ok(start), Ok(count)) = (start.parse::<u64>(), count.parse::<u64>())
        {
            next = next.max(start + count);
        }
    }
    let separator = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    crate::AtPath::at(fs::write(file, format!("{text}{separator}{user}:{next}:65536\n")), "cannot write", file)
}
