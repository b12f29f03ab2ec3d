//! What each kind of vertex does. Every operation reads its inputs from a [`Session`] and leaves a
//! committed snapshot; none of them knows the plan's shape or the cache.

pub mod account;
pub mod content;
pub mod exec;
pub mod file;
pub mod image;
pub mod imports;
pub mod log;
pub mod lowers;
pub mod merged;
pub mod mount;
pub mod remote;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ovenbird_oci::Digest;
use ovenbird_oci::layer::Packed;
use ovenbird_oci::registry::{Client, HeadStart, HeadStarts, ProgressFn};
use ovenbird_sandbox::Level;
use tokio::runtime::Runtime;

use crate::error::BuildError;
use crate::event::{Event, EventSink};
use crate::input::BuildInput;
use crate::snapshot::LayerDir;
use crate::snapshot::stat_cache::FileStatCache;
use crate::snapshot::tree::Tree;
use crate::state::{SnapshotId, State};

/// A tokio runtime that is started when something first needs the network.
#[derive(Debug, Default)]
pub struct LazyRuntime(OnceLock<Runtime>);

impl LazyRuntime {
    /// Runs a future to its end on this thread.
    ///
    /// # Panics
    /// When the system gives no threads at all.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.get().block_on(future)
    }

    fn get(&self) -> &Runtime {
        self.0.get_or_init(|| {
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .thread_name("ovenbird-net")
                .enable_all()
                .build()
                .unwrap_or_else(|error| panic!("cannot start the network threads: {error}"))
        })
    }
}

/// After this time without an answer the user is told who is waited for.
const LONG_WAIT: Duration = Duration::from_secs(5);
/// How often a waiting thread looks whether the build stopped.
const STOP_POLL: Duration = Duration::from_millis(20);

async fn attend<F: Future>(request: F, stop: &AtomicBool, patience: Duration, say: impl FnOnce()) -> Result<F::Output, BuildError> {
    let mut request = std::pin::pin!(request);
    let start = tokio::time::Instant::now();
    let mut say = Some(say);
    loop {
        tokio::select! {
            done = &mut request => return Ok(done),
            () = tokio::time::sleep(STOP_POLL) => {}
        }
        if stop.load(Ordering::SeqCst) {
            return Err(BuildError::Cancelled);
        }
        if start.elapsed() >= patience
            && let Some(say) = say.take()
        {
            say();
        }
    }
}

/// Everything the operations of one build share.
pub struct Session<'a> {
    /// The state folder.
    pub state: &'a State,
    /// How steps are isolated; `None`: no step can run.
    pub level: Option<Level>,
    /// Overlay mounts work.
    pub overlay: bool,
    /// Registries.
    pub client: &'a Client,
    /// The network's runtime.
    pub runtime: &'a LazyRuntime,
    /// Layers that are on their way to where they will be published.
    pub head_starts: &'a HeadStarts,
    /// The request.
    pub input: &'a BuildInput,
    /// Local contexts by name.
    pub contexts: BTreeMap<String, Arc<dyn Tree>>,
    /// Hashes of context files.
    pub stat_cache: FileStatCache,
    /// What no text that leaves the build may hold.
    pub masks: log::Masks,
    /// Takes events, and masks them.
    pub sink: Arc<dyn EventSink>,
    /// Set when the build must stop, for whatever reason.
    pub stop: Arc<AtomicBool>,
    /// Steps that may still start.
    pub slots: Slots,
    /// One unpacking per base layer at a time.
    pub(crate) unpacking: Mutex<HashMap<Digest, Arc<Mutex<()>>>>,
    /// What was merged for high stacks of layers.
    pub(crate) lowers: lowers::Lowers,
    /// A local folder changed between its key and its copy: from then on nothing of this build is filed.
    pub unsettled: AtomicBool,
    /// Caches of other machines.
    pub imports: imports::Imports,
    /// Layers that were opened, with what is remembered of them: each step reads all layers below it.
    pub(crate) opened: Mutex<HashMap<SnapshotId, Arc<LayerDir>>>,
}

impl<'a> Session<'a> {
    /// A session over these parts.
    #[expect(clippy::too_many_arguments, reason = "made in one place, from parts with different lives")]
    pub fn new(
        state: &'a State,
        level: Option<Level>,
        overlay: bool,
        client: &'a Client,
        runtime: &'a LazyRuntime,
        head_starts: &'a HeadStarts,
        input: &'a BuildInput,
        contexts: BTreeMap<String, Arc<dyn Tree>>,
        sink: Arc<dyn EventSink>,
        stop: Arc<AtomicBool>,
        imports: imports::Imports,
    ) -> Self {
        // A secret that cannot be read is an error of the step that needs it.
        let masks = log::Masks::of(input.secrets.values().filter_map(|secret| secret.read().ok()));
        Self {
            state,
            level,
            overlay,
            client,
            runtime,
            head_starts,
            input,
            contexts,
            stat_cache: FileStatCache::new(state.stat_cache(), state.temporary()),
            sink: masks.sink(sink),
            masks,
            stop,
            slots: Slots::new(input.parallelism.max(1)),
            unpacking: Mutex::default(),
            lowers: lowers::Lowers::default(),
            unsettled: AtomicBool::new(false),
            imports,
            opened: Mutex::default(),
        }
    }

    /// Are all local folders still what the keys were made of?
    pub fn is_settled(&self) -> bool {
        !self.unsettled.load(Ordering::Relaxed)
    }

    /// Goes on after a failure that another try can do without.
    pub fn resume(&self, cancel: &crate::input::Cancel) {
        self.slots.cached.store(0, Ordering::SeqCst);
        self.stop.store(false, Ordering::SeqCst);
        // Cancelled in between.
        if cancel.is_cancelled() {
            self.stop.store(true, Ordering::SeqCst);
        }
    }

    /// For a layer that is about to be packed: large ones are sent meanwhile, if the image will be published.
    pub fn head_start(&self) -> Option<HeadStart> {
        let to = self.input.head_start.as_ref()?;
        let _runtime = self.runtime.get().enter();
        // Who publishes will be told what is wrong.
        self.client.head_start(to, self.state.store()).ok()
    }

    /// The layer of a head start is packed, and no secret is in it.
    pub fn complete(&self, head_start: Option<HeadStart>, packed: &Packed) {
        if let Some(head_start) = head_start {
            self.head_starts.complete(head_start, &packed.digest, packed.size);
        }
    }

    /// Fails when the build was stopped.
    pub fn check_stop(&self) -> Result<(), BuildError> {
        if self.stop.load(Ordering::SeqCst) { Err(BuildError::Cancelled) } else { Ok(()) }
    }

    /// Asks a registry something short, until it answers or the build stops. Says so when it takes long.
    pub fn ask<F: Future>(&self, registry: &str, request: F) -> Result<F::Output, BuildError> {
        let say = || self.sink.emit(Event::Message { text: format!("waiting for {registry}") });
        self.runtime.block_on(attend(request, &self.stop, LONG_WAIT, say))
    }

    /// Waits for something long that reports its own progress, or until the build stops.
    pub fn wait<F: Future>(&self, work: F) -> Result<F::Output, BuildError> {
        self.runtime.block_on(attend(work, &self.stop, Duration::MAX, || {}))
    }

    /// A progress function that turns bytes into events.
    pub fn progress(&self, verb: &'static str) -> ProgressFn {
        progress_events(self.sink.clone(), verb)
    }

    /// Opens a snapshot's diff folder; `None` when it is gone.
    pub(crate) fn layer_dir(&self, id: &SnapshotId) -> Result<Option<Arc<LayerDir>>, BuildError> {
        let opened = || self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(layer) = opened().get(id) {
            return Ok(Some(layer.clone()));
        }
        let layer = self.state.layer_dir(id)?.map(Arc::new);
        if let Some(layer) = &layer {
            opened().insert(id.clone(), layer.clone());
        }
        Ok(layer)
    }

    fn unpack_lock(&self, layer: &Digest) -> Arc<Mutex<()>> {
        self.unpacking.lock().unwrap_or_else(PoisonError::into_inner).entry(*layer).or_default().clone()
    }
}

/// Turns the registry client's byte counts into [`Event::Progress`].
pub fn progress_events(sink: Arc<dyn EventSink>, verb: &'static str) -> ProgressFn {
    Arc::new(move |blob, current, total| {
        sink.emit(Event::Progress {
            id: format!("{verb} {blob}"),
            label: format!("{verb} {}", blob.short()),
            current,
            total: Some(total),
            done: current >= total,
        });
    })
}

/// A counting semaphore for running steps.
#[derive(Debug)]
pub struct Slots {
    free: Mutex<usize>,
    freed: Condvar,
    /// Steps that ran.
    pub ran: AtomicUsize,
    /// Steps found in the cache.
    pub cached: AtomicUsize,
}

impl Slots {
    fn new(count: usize) -> Self {
        Self { free: Mutex::new(count), freed: Condvar::new(), ran: AtomicUsize::new(0), cached: AtomicUsize::new(0) }
    }

    /// Waits for a slot; it is given back when the guard is dropped.
    pub fn take(&self) -> impl Drop + '_ {
        struct Guard<'s>(&'s Slots);
        impl Drop for Guard<'_> {
            fn drop(&mut self) {
                *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
                self.0.freed.notify_one();
            }
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            free = self.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        Guard(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_registry_is_named_and_can_be_left() {
        let runtime = LazyRuntime::default();
        let told = tokio::sync::Notify::new();
        let answered = runtime.block_on(attend(told.notified(), &AtomicBool::new(false), Duration::ZERO, || told.notify_one()));
        assert!(answered.is_ok());
        let stopped = runtime.block_on(attend(std::future::pending::<()>(), &AtomicBool::new(true), Duration::MAX, || {}));
        assert!(matches!(stopped, Err(BuildError::Cancelled)));
    }
}
