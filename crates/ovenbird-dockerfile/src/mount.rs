//! `RUN --mount=` after expansion.

/// Type of a mount and what only that type has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountKind {
    /// `type=bind` (the default).
    Bind {
        /// `from=`: stage, image or named context; the build context if absent.
        from: Option<String>,
        /// `source=`.
        source: Option<String>,
        /// `rw`.
        writable: bool,
    },
    /// `type=cache`.
    Cache {
        /// `id=`; the target if absent.
        id: Option<String>,
        /// `from=`.
        from: Option<String>,
        /// `source=`.
        source: Option<String>,
        /// `sharing=`.
        sharing: Sharing,
        /// `ro`.
        read_only: bool,
        /// `mode=` of a new folder, octal.
        mode: Option<u32>,
        /// `uid=`.
        uid: Option<u32>,
        /// `gid=`.
        gid: Option<u32>,
    },
    /// `type=tmpfs`.
    Tmpfs {
        /// Bytes.
        size: Option<u64>,
    },
    /// `type=secret`.
    Secret {
        /// `id=`; the base name of the target if absent.
        id: String,
        /// `env=`: name of the variable that gets the value.
        env: Option<String>,
        /// `required=`.
        required: bool,
        /// `mode=`, octal.
        mode: Option<u32>,
        /// `uid=`.
        uid: Option<u32>,
        /// `gid=`.
        gid: Option<u32>,
    },
    /// `type=ssh`.
    Ssh {
        /// `id=`, `default` if absent.
        id: String,
        /// `required=`.
        required: bool,
        /// `mode=`, octal.
        mode: Option<u32>,
        /// `uid=`.
        uid: Option<u32>,
        /// `gid=`.
        gid: Option<u32>,
    },
}

/// `sharing=` of a cache mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// Several steps at once.
    #[default]
    Shared,
    /// A new folder when another step uses it.
    Private,
    /// One step waits for the other.
    Locked,
}

/// A mount of a `RUN` step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunMount {
    /// Type and its options.
    pub kind: MountKind,
    /// `target=`, as given (may be relative to the working directory); `None` where the type has a default.
    pub target: Option<String>,
}
