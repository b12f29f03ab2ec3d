//! What a build tells while it runs. Outward only: nothing ever comes back through a sink.

use std::time::Duration;

use ovenbird_oci::registry::Breaks;
use serde::{Deserialize, Serialize};

/// Number of a vertex in its plan; unique within one build, also over platforms.
pub type VertexIndex = usize;

/// `stdout` or `stderr` of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// The sandbox level, in one line.
    Isolation {
        /// `root`, `rootless`, `single-id`, `chroot`, `traced`, `none`.
        level: String,
        /// Why not a better one.
        detail: String,
    },
    /// A step began to run.
    Started {
        /// Which.
        vertex: VertexIndex,
        /// `[build 2/5] RUN make`.
        name: String,
        /// First line of the instruction, from 1.
        line: Option<u32>,
    },
    /// Why a step runs and did not come from the cache; follows `Started`.
    Explained {
        /// Which.
        vertex: VertexIndex,
        /// Exact causes, most important first.
        causes: Vec<String>,
    },
    /// A step was found in the cache (sent instead of `Started`).
    Cached {
        /// Which.
        vertex: VertexIndex,
        /// Name.
        name: String,
    },
    /// A piece of a step's output; not aligned to lines.
    Log {
        /// Which.
        vertex: VertexIndex,
        /// Stream.
        stream: LogStream,
        /// Text (invalid UTF-8 replaced, secrets masked).
        text: String,
    },
    /// A step ended well.
    Finished {
        /// Which.
        vertex: VertexIndex,
        /// How long.
        took: Duration,
    },
    /// A step failed.
    Failed {
        /// Which.
        vertex: VertexIndex,
        /// Why, one line.
        error: String,
    },
    /// Bytes moved by a transfer, a pack or an unpack; `id` is stable for one piece of work.
    Progress {
        /// Stable name (`pull sha256:…`).
        id: String,
        /// For people (`pulling debian:12 layer 1a2b3c`).
        label: String,
        /// Bytes done.
        current: u64,
        /// Bytes in all, when known.
        total: Option<u64>,
        /// No more events for this id.
        done: bool,
    },
    /// Something worth saying that does not stop the build (lint, ignored directive).
    Warning {
        /// Rule or code.
        code: String,
        /// Text.
        message: String,
        /// Line in the Dockerfile.
        line: Option<u32>,
    },
    /// The build, or a step of it, runs in a container of an engine.
    Container {
        /// Its id, or the first digits.
        id: String,
    },
    /// Transfers broke and went on; sent once after the work, and only when any did.
    Breaks(Breaks),
    /// A phase outside the plan (`exporting`, `pushing localhost:5000/a:1`).
    Message {
        /// Text.
        text: String,
    },
}

/// Takes events. Called from many threads; must not block for long.
pub trait EventSink: Send + Sync {
    /// Takes one event.
    fn emit(&self, event: Event);
}

/// Drops everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl EventSink for Silent {
    fn emit(&self, _event: Event) {}
}
