//! Limits of a step as people write them: sizes with suffixes, `ulimit`s.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ParseValueError, bad};

/// Bytes, written like Docker's: `512m`, `1.5g`, `64kb`, `100`. Suffixes are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected =
            || bad(format!("{text:?} is not a size: expected a number of bytes with an optional suffix b, k, m, g or t, for example 512m"));
        let lower = text.trim().to_ascii_lowercase();
        let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let factor: f64 = match lower[digits.len()..].trim_end_matches('b').trim_end_matches('i') {
            "" => 1.0,
            "k" => 1024.0,
            "m" => 1024.0 * 1024.0,
            "g" => 1024.0 * 1024.0 * 1024.0,
            "t" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            _ => return Err(expected()),
        };
        let digits = digits.trim_end();
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
            return Err(expected());
        }
        let bytes = digits.parse::<f64>().map_err(|_| expected())? * factor;
        if bytes >= 9.0e18 { Err(expected()) } else { Ok(Self(bytes as u64)) }
    }
}

/// `--ulimit name=soft[:hard]`; -1 is unlimited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// `nofile`…
    pub name: String,
    /// Soft limit.
    pub soft: i64,
    /// Hard limit.
    pub hard: i64,
}

/// Names of limits that exist on Linux.
const ULIMITS: [&str; 16] = [
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

impl FromStr for Ulimit {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = || bad(format!("{text:?} is not a ulimit: expected NAME=SOFT[:HARD], for example nofile=1024:4096"));
        let number = |n: &str| if n == "unlimited" { Ok(-1) } else { n.parse::<i64>().ok().filter(|n| *n >= -1).ok_or_else(expected) };
        let (name, value) = text.split_once('=').ok_or_else(expected)?;
        if !ULIMITS.contains(&name) {
            return Err(bad(format!("there is no ulimit {name:?}: expected one of {}", ULIMITS.join(", "))));
        }
        let (soft, hard) = match value.split_once(':') {
            Some((soft, hard)) => (number(soft)?, number(hard)?),
            None => (number(value)?, number(value)?),
        };
        if hard != -1 && (soft == -1 || soft > hard) {
            return Err(bad(format!("ulimit {name}: the soft limit {soft} is above the hard limit {hard}")));
        }
        Ok(Self { name: name.into(), soft, hard })
    }
}

/// Limits of each step.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Limits {
    /// `--memory`.
    #[serde(default)]
    pub memory: Option<ByteSize>,
    /// `--cpus`: cores.
    #[serde(default)]
    pub cpus: Option<f64>,
    /// `--ulimit`.
    #[serde(default)]
    pub ulimits: Vec<Ulimit>,
    /// `--shm-size`.
    #[serde(default)]
    pub shm_size: Option<ByteSize>,
}

/// Docker's least memory of a container.
const MEMORY_MIN: u64 = 6 * 1024 * 1024;
/// Docker's least share of a CPU.
const CPUS_MIN: f64 = 0.01;
/// As many as Linux can be built for.
const CPUS_MAX: f64 = 8192.0;

impl Limits {
    /// Refuses values that no machine can have.
    pub fn check(&self) -> Result<(), ParseValueError> {
        // Zero is no limit, as in Docker.
        if self.memory.is_some_and(|memory| (1..MEMORY_MIN).contains(&memory.0)) {
            return Err(bad("--memory is too small: the least is 6m (6 MiB), and 0 is no limit"));
        }
        match self.cpus {
            Some(cpus) if !(CPUS_MIN..=CPUS_MAX).contains(&cpus) => {
                Err(bad(format!("--cpus {cpus} is out of range: give a number from {CPUS_MIN} to {CPUS_MAX}")))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_that_can_be() {
        let check = |memory: Option<u64>, cpus| Limits { memory: memory.map(ByteSize), cpus, ..Limits::default() }.check();
        for (memory, cpus, want) in [
            (None, None, None),
            (Some(0), Some(0.01), None),
            (Some(MEMORY_MIN), Some(1.5), None),
            (Some(MEMORY_MIN - 1), None, Some("6m")),
            (Some(1), None, Some("6m")),
            (None, Some(0.0), Some("from 0.01 to 8192")),
            (None, Some(-1.0), Some("from 0.01 to 8192")),
            (None, Some(1e9), Some("from 0.01 to 8192")),
            (None, Some(f64::NAN), Some("from 0.01 to 8192")),
            (None, Some(f64::INFINITY), Some("from 0.01 to 8192")),
        ] {
            let got = check(memory, cpus).map_err(|error| error.to_string());
            match want {
                None => assert_eq!(got, Ok(()), "{memory:?} {cpus:?}"),
                Some(want) => assert!(got.as_ref().is_err_and(|error| error.contains(want)), "{memory:?} {cpus:?}: {got:?}"),
            }
        }
    }

    #[test]
    fn sizes() {
        for (text, expect) in [
            ("100", Some(100)),
            ("100b", Some(100)),
            ("64k", Some(65536)),
            ("64KB", Some(65536)),
            ("64KiB", Some(65536)),
            ("1.5g", Some(1_610_612_736)),
            ("2 m", Some(2_097_152)),
            ("", None),
            ("m", None),
            ("-1", None),
            ("1x", None),
            ("1.2.3", None),
            ("nan", None),
            ("inf", None),
            ("99999999t", None),
        ] {
            assert_eq!(text.parse::<ByteSize>().ok().map(|b| b.0), expect, "{text}");
        }
    }

    #[test]
    fn ulimits() {
        for (text, expect) in [
            ("nofile=1024", Some((1024, 1024))),
            ("nofile=1024:4096", Some((1024, 4096))),
            ("core=-1", Some((-1, -1))),
            ("core=unlimited", Some((-1, -1))),
            ("nofile=5:unlimited", Some((5, -1))),
            ("nofile=5:4", None),
            ("nofile=-1:4", None),
            ("nofile=-2", None),
            ("files=1", None),
            ("nofile", None),
        ] {
            assert_eq!(text.parse::<Ulimit>().ok().map(|u| (u.soft, u.hard)), expect, "{text}");
        }
    }
}
