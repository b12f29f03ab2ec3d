//! What this machine allows.

use std::path::Path;

use serde::Serialize;

/// Isolation levels, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Namespaces as root.
    Root,
    /// User namespace with subordinate id ranges (`newuidmap`).
    Rootless,
    /// User namespace with one id; owners are recorded.
    SingleId,
    /// Root inside an ordinary container: `chroot`, no namespaces.
    Chroot,
}

impl Level {
    /// All, best first.
    pub const ALL: [Level; 4] = [Level::Root, Level::Rootless, Level::SingleId, Level::Chroot];

    /// The name that users read and type.
    pub fn name(self) -> &'static str {
        match self {
            Level::Root => "root",
            Level::Rootless => "rootless",
            Level::SingleId => "single-id",
            Level::Chroot => "chroot",
        }
    }
}

/// One level and whether it works here.
#[derive(Debug, Clone, Serialize)]
pub struct LevelStatus {
    /// Which.
    pub level: Level,
    /// Tried and works.
    pub usable: bool,
    /// What is missing and how to get it, one sentence each.
    pub missing: Vec<String>,
}

/// Result of [`probe`].
#[derive(Debug, Clone, Serialize)]
pub struct Probe {
    /// All levels.
    pub levels: Vec<LevelStatus>,
    /// The best usable one; `None`: only builds without `RUN`.
    pub chosen: Option<Level>,
    /// Overlay mounts work with an upper folder below the state folder.
    pub overlay: bool,
}

/// Tries each level in a child process (never changes this one). `state` is where snapshots will live.
pub fn probe(_state: &Path) -> Probe {
    Probe { levels: vec![], chosen: None, overlay: false }
}

/// Like [`probe`], but tries the lower levels too (for `doctor`).
pub fn probe_all(state: &Path) -> Probe {
    probe(state)
}
