//! Workers on other machines, through the system's `ssh`: one host, or a pool of hosts with slots.
//!
//! A slot is a lock that the worker holds in the state directory of its host (`worker --slots`), so that callers on several machines
//! together never use more, and one that died gives its slot back. A host that cannot be used is left out, and it is said why.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::ffi::OsString;
use std::fmt;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io::{BufRead as _, BufReader, Cursor, Read as _};
use std::path::PathBuf;
use std::process::Command;
use std::str::FromStr;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use ovenbird_engine::Event;

use super::process::start;
use super::{Launcher, Pipe, WorkerSpec};
use crate::builder::Job;
use crate::error::{Error, Kind};
use crate::request::ParseValueError;
use crate::worker::wire::{Hello, shown};

/// How long a host may take from connecting to its first word.
const BEGIN: Duration = Duration::from_secs(30);

/// Longest first word.
const MAX_WORD: u64 = 64 << 10;

/// Between two rounds through a pool whose slots are all taken.
const PAUSE: (Duration, Duration) = (Duration::from_millis(300), Duration::from_secs(3));

/// How often it is looked whether the build was cancelled.
const LOOK: Duration = Duration::from_millis(20);

/// What of a host is not said gets these values.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostDefaults {
    /// Builds at once.
    pub slots: Option<usize>,
    /// The program there.
    pub command: Option<String>,
    /// State directory there.
    pub root: Option<PathBuf>,
}

/// `ssh://[USER@]HOST[:PORT][?slots=N&command=PROGRAM&root=DIR]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    user: Option<String>,
    name: String,
    port: Option<u16>,
    said: HostDefaults,
}

impl FromStr for Host {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |why: &str| ParseValueError {
            reason: format!("{text:?} is no host for builds: {why}; expected ssh://[USER@]HOST[:PORT][?slots=N&command=PROGRAM&root=DIR]"),
        };
        let rest = text.strip_prefix("ssh://").ok_or_else(|| wrong("it does not begin with ssh://"))?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let place = place.strip_suffix('/').unwrap_or(place);
        let (user, place) = place.rsplit_once('@').map_or((None, place), |(user, place)| (Some(user), place));
        let (name, port) = match place.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((address, "")) => (address, None),
            Some((address, rest)) => (address, Some(rest.strip_prefix(':').ok_or_else(|| wrong("behind the address stands no port"))?)),
            None => place.split_once(':').map_or((place, None), |(name, port)| (name, Some(port))),
        };
        // What begins with a dash would be an option of ssh.
        let plain = |text: &str, more: &str| {
            !text.is_empty()
                && !text.starts_with('-')
                && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c) || more.contains(c))
        };
        if !plain(name, ":%") {
            return Err(wrong("the host has a character that no host has"));
        }
        if user.is_some_and(|user| !plain(user, "")) {
            return Err(wrong("the user has a character that no user has (a password does not go there: ssh keys are used)"));
        }
        let port = port.map(|port| port.parse().map_err(|_| wrong("the port is no number up to 65535"))).transpose()?;
        let mut said = HostDefaults::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("slots", slots)) => {
                    said.slots = Some(slots.parse().ok().filter(|slots| *slots > 0).ok_or_else(|| wrong("slots is no number from 1"))?);
                }
                Some(("command", command)) if !command.is_empty() && !command.starts_with('-') => said.command = Some(command.into()),
                Some(("root", root)) if root.starts_with('/') => said.root = Some(root.into()),
                _ => return Err(wrong(&format!("{pair:?} is not known"))),
            }
        }
        Ok(Self { user: user.map(Into::into), name: name.into(), port, said })
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ssh://")?;
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        if self.name.contains(':') { write!(f, "[{}]", self.name) } else { f.write_str(&self.name) }?;
        self.port.iter().try_for_each(|port| write!(f, ":{port}"))
    }
}

impl Host {
    /// With values for what was not said.
    #[must_use]
    pub fn or(mut self, defaults: &HostDefaults) -> Self {
        let said = &mut self.said;
        said.slots = said.slots.or(defaults.slots);
        said.command = said.command.take().or_else(|| defaults.command.clone());
        said.root = said.root.take().or_else(|| defaults.root.clone());
        self
    }

    /// What the shell there runs.
    fn remote_command(&self, WorkerSpec { flags, arguments }: &WorkerSpec) -> String {
        let mut words = vec![self.said.command.clone().unwrap_or_else(|| "ovenbird".into())];
        if let Some(root) = &self.said.root {
            words.extend(["--root".into(), root.display().to_string()]);
        }
        words.extend(flags.iter().map(|flag| flag.to_string_lossy().into_owned()));
        words.push("worker".into());
        if let Some(slots) = self.said.slots {
            words.extend(["--slots".into(), slots.to_string()]);
        }
        words.extend(arguments.iter().map(|word| word.to_string_lossy().into_owned()));
        let quoted: Vec<String> = words.iter().map(|word| format!("'{}'", word.replace('\'', r"'\''"))).collect();
        format!("exec {}", quoted.join(" "))
    }

    fn ssh(&self, spec: &WorkerSpec) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["-T".into()];
        // Nobody is there to answer questions, and a host that went away must be noticed.
        for option in ["BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=15", "ServerAliveCountMax=3"] {
            arguments.extend(["-o".into(), option.into()]);
        }
        if let Some(port) = self.port {
            arguments.extend(["-p".into(), port.to_string().into()]);
        }
        if let Some(user) = &self.user {
            arguments.extend(["-l".into(), user.into()]);
        }
        arguments.extend(["--".into(), self.name.clone().into(), self.remote_command(spec).into()]);
        arguments
    }
}

/// Starts workers on the first host with a free slot.
#[derive(Debug, Clone)]
pub struct SshLauncher {
    hosts: Vec<Host>,
}

/// What a host said.
enum Met {
    Started(Pipe),
    Busy,
    Dead(String),
}

impl SshLauncher {
    /// Over these hosts.
    pub fn new(hosts: Vec<Host>) -> Self {
        Self { hosts }
    }

    /// Connects and listens to the first word.
    fn meet(host: &Host, spec: &WorkerSpec, job: &Job) -> Result<Met, Error> {
        let mut command = Command::new("ssh");
        command.args(host.ssh(spec));
        let Pipe { to, from, mut life } = start(command, "ssh")?;
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut word = vec![];
            let read = (&mut from).take(MAX_WORD).read_until(b'\n', &mut word);
            let _ = tell.send((read.map(|_| word), from));
        });
        let end = Instant::now() + BEGIN;
        let (word, from) = loop {
            match told.recv_timeout(LOOK) {
                Ok(met) => break met,
                Err(_) if job.cancel.is_cancelled() => return Err(Error::new(Kind::Cancelled, "cancelled")),
                Err(_) if Instant::now() < end => {}
                Err(_) => return Ok(Met::Dead(format!("it said nothing in {} s", BEGIN.as_secs()))),
            }
        };
        let word = word.unwrap_or_default();
        if word.is_empty() {
            let how = life.wait(Duration::from_secs(2)).unwrap_or_else(|| "it closed the connection".into());
            let hint = if how.contains("not found") || how.contains("127") {
                format!(": is ovenbird installed there? Its place can be said with ?command=PROGRAM ({how})")
            } else {
                format!(": {how}")
            };
            return Ok(Met::Dead(format!("no worker began{hint}")));
        }
        Ok(match serde_json::from_slice(&word) {
            Ok(First::Busy) => Met::Busy,
            Ok(First::Hello(hello)) => match hello.check() {
                Ok(()) => Met::Started(Pipe { to, from: Box::new(Cursor::new(word).chain(from)), life }),
                Err(error) => Met::Dead(format!("{error}; install the same version at both ends")),
            },
            // The worker itself says what is wrong.
            Ok(First::Failed) => Met::Started(Pipe { to, from: Box::new(Cursor::new(word).chain(from)), life }),
            Err(_) => Met::Dead(format!(
                "it said {:?}, which no worker says; a login script must not print anything",
                shown(word.trim_ascii(), 160)
            )),
        })
    }
}

/// The first word of a worker.
#[derive(serde::Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
enum First {
    Hello(Hello),
    Busy,
    Failed,
}

impl Launcher for SshLauncher {
    fn launch(&self, spec: &WorkerSpec, job: &Job) -> Result<Pipe, Error> {
        let mut dead: BTreeMap<usize, String> = BTreeMap::new();
        let (mut pause, mut said) = (PAUSE.0, false);
        // Callers begin at different hosts.
        let first = RandomState::new().build_hasher().finish() as usize;
        loop {
            for at in 0..self.hosts.len() {
                let at = first.wrapping_add(at) % self.hosts.len();
                let host = &self.hosts[at];
                if dead.contains_key(&at) {
                    continue;
                }
                match Self::meet(host, spec, job)? {
                    Met::Started(pipe) => {
                        job.sink.emit(Event::Message { text: format!("building on {host}") });
                        return Ok(pipe);
                    }
                    Met::Busy => {}
                    Met::Dead(reason) => {
                        if self.hosts.len() > 1 {
                            let message = format!("{host} is left out: {reason}");
                            job.sink.emit(Event::Warning { code: "host".into(), message, line: None });
                        }
                        dead.insert(at, reason);
                    }
                }
            }
            if dead.len() == self.hosts.len() {
                let error = Error::new(Kind::Driver, "no worker can be had over ssh");
                let error = dead.into_iter().fold(error, |error, (at, reason)| error.because(format!("{}: {reason}", self.hosts[at])));
                return Err(error.hint("try `ssh -o BatchMode=yes HOST ovenbird version` by hand"));
            }
            if !said {
                job.sink.emit(Event::Message { text: "every slot is taken: waiting for one".into() });
                said = true;
            }
            let end = Instant::now() + pause;
            while Instant::now() < end {
                if job.cancel.is_cancelled() {
                    return Err(Error::new(Kind::Cancelled, "cancelled"));
                }
                std::thread::sleep(LOOK);
            }
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    fn place(&self) -> String {
        match self.hosts.as_slice() {
            [host] => format!("on {host}"),
            hosts => format!("on one of {} hosts", hosts.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        for (text, expect) in [
            (
                "ssh://h",
                "-T -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=3 -- h exec 'ovenbird' 'worker'",
            ),
            ("ssh://me@h.example:22/", "-p 22 -l me -- h.example exec 'ovenbird' 'worker'"),
            ("ssh://[2001:db8::1]:2222", "-p 2222 -- 2001:db8::1 exec"),
            ("ssh://h?slots=2&command=/opt/it's&root=/var/x", r"-- h exec '/opt/it'\''s' '--root' '/var/x' 'worker' '--slots' '2'"),
            ("ssh://-oProxyCommand=x", "! "),
            ("ssh://-l@h", "! "),
            ("ssh://me:pw@h", "! "),
            ("ssh://h;id", "! "),
            ("ssh://h:99999", "! "),
            ("ssh://", "! "),
            ("h", "! "),
            ("ssh://h?slots=0", "! "),
            ("ssh://h?x=1", "! "),
            ("ssh://h?command=-x", "! "),
            ("ssh://h?root=relative", "! "),
        ] {
            let got = match text.parse::<Host>() {
                Ok(host) => host.ssh(&WorkerSpec::default()).join(" ".as_ref()).into_string().unwrap(),
                Err(error) => format!("! {error}"),
            };
            assert!(got.contains(expect), "{text}: {got}");
        }
    }

    #[test]
    fn what_is_not_said_comes_from_the_pool() {
        let defaults = HostDefaults { slots: Some(3), command: Some("/c".into()), root: Some("/r".into()) };
        let host = "ssh://h?slots=1".parse::<Host>().unwrap().or(&defaults);
        assert_eq!(
            host.remote_command(&WorkerSpec {
                flags: vec!["--isolation-level".into(), "chroot".into()],
                arguments: vec!["--builder".into(), "auto".into()],
            }),
            "exec '/c' '--root' '/r' '--isolation-level' 'chroot' 'worker' '--slots' '1' '--builder' 'auto'"
        );
        assert_eq!("ssh://u@[::1]:9?slots=1".parse::<Host>().unwrap().to_string(), "ssh://u@[::1]:9");
    }
}
