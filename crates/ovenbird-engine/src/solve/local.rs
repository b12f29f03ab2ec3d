//! What steps read of local folders: looked at before the keys are made, and once more after it was copied.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::{Failed, Solver};
use crate::cache::{self, CacheKey, Chain, Record};
use crate::error::BuildError;
use crate::event::Event;
use crate::ops::content::{self, Contents};
use crate::plan::{CopyAction, FileAction, FileOp, VertexId};
use crate::snapshot::stat_cache::StatCache;
use crate::trace;

/// The part of a context that a step reads; the name comes first.
pub(super) enum Reads<'p> {
    /// `COPY` and `ADD`.
    Copy(&'p str, &'p CopyAction),
    /// `RUN --mount`: this path and what is below it.
    Mount(&'p str, &'p str),
}

/// As traces call it.
pub(super) fn name_of(context: &str, path: &str) -> String {
    format!("{context}: {path}")
}

impl Reads<'_> {
    fn name(&self) -> String {
        match self {
            Self::Copy(context, copy) => name_of(context, &copy.sources.join(" ")),
            Self::Mount(context, path) => name_of(context, path),
        }
    }
}

impl Solver<'_> {
    fn look(&self, vertex: VertexId, reads: &Reads, known: &dyn StatCache) -> Result<Contents, BuildError> {
        let seen = match reads {
            Reads::Copy(context, copy) => content::of_copy(&*self.context(context)?, copy, known),
            Reads::Mount(context, path) => content::of_path(&*self.context(context)?, Path::new(path.trim_matches('/')), known),
        };
        seen.map_err(|error| self.file_error(vertex, error))
    }

    /// Key of what is read; it is looked at once in a build.
    pub(super) fn local_key(&self, vertex: VertexId, reads: &Reads) -> Result<CacheKey, Failed> {
        let mut known = self.nodes[vertex].contents.lock().unwrap_or_else(PoisonError::into_inner);
        let name = reads.name();
        if let Some(contents) = known.get(&name) {
            return Ok(CacheKey::of_content(contents.digest));
        }
        let contents = self.look(vertex, reads, &self.session.stat_cache).map_err(|error| self.fail(error))?;
        let key = CacheKey::of_content(contents.digest);
        known.insert(name, contents);
        Ok(key)
    }

    /// A second look at what was just copied. When it is still what the key was made of, the copy is, too. Else the key says nothing about
    /// the copy: the image has what was copied, and nothing of it may be found by a later build.
    pub(super) fn look_again(&self, vertex: VertexId, reads: &Reads) {
        let now = self.look(vertex, reads, &self.session.stat_cache.again());
        let known = self.nodes[vertex].contents.lock().unwrap_or_else(PoisonError::into_inner);
        let changes = match (known.get(&reads.name()), now) {
            (Some(before), Ok(now)) if before.digest == now.digest && self.session.stat_cache.is_settled() => return,
            (Some(before), Ok(now)) => trace::files::differences(&before.listing, &now.listing),
            _ => vec![],
        };
        self.session.unsettled.store(true, Ordering::Relaxed);
        let step = self.step(vertex);
        let changes = if changes.is_empty() { String::new() } else { format!(" ({})", changes.join(", ")) };
        self.session.sink.emit(Event::Warning {
            code: "context-changed".into(),
            message: format!(
                "{}: the context changed while it was read{changes}: the image has what was there when it was copied, and the next build \
                 copies again; leave what always changes out with .dockerignore",
                step.name
            ),
            line: step.line(),
        });
    }

    /// The part of a local folder that a step mounts, as a snapshot: what `.dockerignore` hides is not there, owners are 0:0.
    pub(super) fn local_chain(&self, vertex: VertexId, from: VertexId, name: &str, source: &str) -> Result<Chain, BuildError> {
        let reads = Reads::Mount(name, source);
        let key = self.local_key(vertex, &reads).map_err(|Failed| BuildError::Cancelled)?;
        if let Some(record) = cache::find(self.session.state, &key) {
            return Ok(record.chain);
        }
        let inside = source.trim_matches('/');
        let copy = CopyAction::new(from, if inside.is_empty() { "." } else { inside }, format!("/{inside}"));
        let chain = vec![Arc::new(self.write_files(vertex, &FileOp { base: None, actions: vec![FileAction::Copy(copy)] }, &[], None)?)];
        self.look_again(vertex, &reads);
        if self.session.is_settled() {
            cache::save(self.session.state, &[key], &Record { key, chain: chain.clone() })?;
        }
        Ok(chain)
    }
}
