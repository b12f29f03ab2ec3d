//! One build from request to image, and the engine that does it.

mod bases;
pub mod existing;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ovenbird_dockerfile::{Diagnostic, Parsed, Severity};
use ovenbird_oci::registry::{Client, HeadStarts};
use ovenbird_oci::store::Store;
use ovenbird_oci::{Descriptor, Platform, Reference};
use ovenbird_sandbox::Level;

use crate::error::BuildError;
use crate::event::{Event, EventSink};
use crate::export::leak::Gate;
use crate::export::{assemble, cache as cache_export, output};
use crate::frontend::{self, Images, Lowered, Options};
use crate::input::{BuildInput, BuildOutput, CacheExport, Cancel, Exportable};
use crate::ops::imports::{Borrowed, Imports};
use crate::ops::{LazyRuntime, Session, image, progress_events};
use crate::plan::{ExecMountKind, ImageRequest, Op, Plan, ResolvedImage};
use crate::prune::{self, CacheEntry, DiskUsage, PruneOptions, PruneReport};
use crate::solve::{self, Solved, identity};
use crate::state::State;
use crate::trace::{self, Trace};

/// Rounds of image look-ups (base images, then what their triggers need) before a Dockerfile counts as endless.
const MOST_ROUNDS: usize = 16;

/// How to open an [`Engine`].
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// State folder.
    pub root: PathBuf,
    /// Isolation level this process entered ([`ovenbird_sandbox::enter`]); `None`: no `RUN`.
    pub level: Option<Level>,
    /// Overlay mounts work (from the probe).
    pub overlay: bool,
    /// Registries.
    pub client: Client,
}

/// An open state folder and what is needed to build in it.
pub struct Engine {
    pub(crate) options: EngineOptions,
    pub(crate) state: State,
    pub(crate) runtime: LazyRuntime,
    pub(crate) borrowed: Borrowed,
    /// Layers that are on their way to where they will be published.
    pub(crate) head_starts: Arc<HeadStarts>,
}

impl Engine {
    /// Opens the state folder.
    pub fn open(options: EngineOptions) -> Result<Self, BuildError> {
        let state = State::open(&options.root, options.level)?;
        Ok(Self { options, state, runtime: LazyRuntime::default(), borrowed: Borrowed::default(), head_starts: Arc::default() })
    }

    /// The blob store.
    pub fn store(&self) -> &Store {
        self.state.store()
    }

    /// Builds. Blocks; must not be called from an async runtime's own threads.
    pub fn build(&self, input: &BuildInput, sink: &Arc<dyn EventSink>, cancel: &Cancel) -> Result<BuildOutput, BuildError> {
        let before = self.breaks();
        let parsed = ovenbird_dockerfile::parse(&input.dockerfile);
        if parsed.diagnostics.iter().any(|d| d.severity == Severity::Error) {
            return Err(broken(input, &parsed));
        }
        self.check_contexts(input)?;
        self.describe_isolation(&**sink);
        let session = self.session(input, sink, cancel);
        let sink = &session.sink.clone();
        let mut seen = std::collections::HashSet::new();
        let mut warn = |diagnostic: Diagnostic| {
            let line = input.dockerfile[..diagnostic.span.start.min(input.dockerfile.len())].matches('\n').count() as u32 + 1;
            if seen.insert((diagnostic.code.clone(), diagnostic.message.clone(), line)) {
                sink.emit(Event::Warning { code: diagnostic.code.into(), message: diagnostic.message, line: Some(line) });
            }
        };
        parsed.diagnostics.into_iter().for_each(&mut warn);
        let mut plans = vec![];
        for options in &input.options {
            let (plan, warnings) = lower(&session, &parsed.dockerfile, options)?;
            warnings.into_iter().for_each(&mut warn);
            check_emulator(&session, &plan, &options.build_platform)?;
            plans.push(plan);
        }
        self.warn_writable(&plans, &**sink);
        let epoch = input.source_date_epoch.or_else(|| plans.iter().find_map(|plan| plan.source_date_epoch));
        let dated = BuildInput { source_date_epoch: epoch, ..input.clone() };
        let session = Session { input: &dated, ..session };
        let described = bases::of_plans(&session, &plans)?;
        let bases = base_images(&plans);
        let gate = Gate::new(&self.state, &self.options.client, input, &bases)?;
        let built = loop {
            match run(&session, &gate, &plans) {
                // Each time there is one layer less that could be met.
                Err(error @ BuildError::SharedLayer { .. }) if !cancel.is_cancelled() => {
                    let message = format!("{error}; its step runs again");
                    sink.emit(Event::Warning { code: "cache-layer".into(), message, line: None });
                    session.resume(cancel);
                }
                other => break other,
            }
        };
        // Whatever failed, the hashes of context files are still right.
        let _ = session.stat_cache.save();
        let (images, solved) = match built {
            Err(_) if cancel.is_cancelled() => return Err(BuildError::Cancelled),
            other => other?,
        };
        let target = match &images[..] {
            [only] if !input.options.iter().any(|o| o.multi_platform) => only.manifest.clone(),
            _ => assemble::index(&session, &images)?,
        };
        let breaks = self.tell_breaks(before, &**sink);
        let exportable = Exportable {
            mounts: solved.iter().flat_map(|solved| solved.mounts.iter().copied()).collect(),
            images: images.iter().map(|image| image.chain.clone()).collect(),
            filed: solved.into_iter().flat_map(|solved| solved.filed).collect(),
            bases: bases.into_iter().cloned().collect(),
            epoch,
        };
        Ok(BuildOutput {
            target,
            exportable,
            breaks,
            bases: described,
            platforms: images.into_iter().map(|image| (image.platform, image.manifest, image.config)).collect(),
            ran: session.slots.ran.load(Ordering::Relaxed),
            cached: session.slots.cached.load(Ordering::Relaxed),
        })
    }

    /// What [`Engine::build`] would run, and why, one trace a platform. Base images and remote sources are looked up, nothing else is done.
    pub fn plan(&self, input: &BuildInput, sink: &Arc<dyn EventSink>, cancel: &Cancel) -> Result<Vec<Trace>, BuildError> {
        let parsed = ovenbird_dockerfile::parse(&input.dockerfile);
        if parsed.diagnostics.iter().any(|d| d.severity == Severity::Error) {
            return Err(broken(input, &parsed));
        }
        let session = self.session(input, sink, cancel);
        let traces = input.options.iter().map(|options| {
            let (plan, _) = lower(&session, &parsed.dockerfile, options)?;
            solve::foresee(&session, &plan)
        });
        let traces = traces.collect();
        let _ = session.stat_cache.save();
        traces
    }

    /// What decides the image of [`Engine::build`], as one digest, without building. Base images and remote sources are looked up, local
    /// folders are read, nothing else is done.
    pub fn identify(&self, input: &BuildInput, sink: &Arc<dyn EventSink>, cancel: &Cancel) -> Result<identity::ContentId, BuildError> {
        let parsed = ovenbird_dockerfile::parse(&input.dockerfile);
        if parsed.diagnostics.iter().any(|d| d.severity == Severity::Error) {
            return Err(broken(input, &parsed));
        }
        self.check_contexts(input)?;
        let session = self.session(input, sink, cancel);
        let plans: Result<Vec<Plan>, _> =
            input.options.iter().map(|options| lower(&session, &parsed.dockerfile, options).map(|(plan, _)| plan)).collect();
        let identity = plans.and_then(|plans| identity::identify(&session, &plans));
        let _ = session.stat_cache.save();
        match identity {
            Err(_) if cancel.is_cancelled() => Err(BuildError::Cancelled),
            other => other,
        }
    }

    /// Looks up one image for [`frontend::check`]: from the store, else from where it comes from. Layers stay where they are.
    pub fn resolve(
        &self,
        input: &BuildInput,
        request: &ImageRequest,
        sink: &Arc<dyn EventSink>,
        cancel: &Cancel,
    ) -> Result<ResolvedImage, BuildError> {
        image::resolve(&self.session(input, sink, cancel), request)
    }

    /// What the last builds in this state folder ran, and why; the last one first.
    pub fn traces(&self) -> Vec<Trace> {
        trace::all(&self.state)
    }

    /// Writes the results of a build where other machines find them; layers are mounted from `published` where they can be.
    pub fn export_cache(
        &self,
        input: &BuildInput,
        results: &Exportable,
        export: &CacheExport,
        published: &[Reference],
        sink: &Arc<dyn EventSink>,
        cancel: &Cancel,
    ) -> Result<(), BuildError> {
        let input =
            BuildInput { compression: export.compression.unwrap_or(input.compression), source_date_epoch: results.epoch, ..input.clone() };
        let session = self.session(&input, sink, cancel);
        let gate = Gate::new(&self.state, &self.options.client, &input, &results.bases.iter().collect::<Vec<_>>())?;
        cache_export::export(&session, &gate, results, export, published).map_err(|source| match source {
            BuildError::Cancelled => BuildError::Cancelled,
            source => BuildError::CacheExport { to: export.to.to_string(), source: Box::new(source) },
        })
    }

    /// Pulls an image into the store and names it there.
    pub fn pull(
        &self,
        from: &Reference,
        platform: Option<&Platform>,
        sink: &Arc<dyn EventSink>,
        cancel: &Cancel,
    ) -> Result<Descriptor, BuildError> {
        let (progress, before) = (progress_events(sink.clone(), "pulling"), self.breaks());
        let descriptor = self.cancellable(cancel, self.options.client.pull(from, platform, self.store(), &progress))??;
        self.tell_breaks(before, &**sink);
        // What is damaged later is fetched from here again.
        let place = from.with_digest(descriptor.digest);
        for layer in self.layers(&descriptor)? {
            self.state.set_origin(&layer.digest, &place)?;
        }
        if from.tag().is_some() {
            self.store().tag(from, &descriptor)?;
        }
        Ok(descriptor)
    }

    /// Writes an image of the store somewhere else.
    pub fn export(
        &self,
        target: &Descriptor,
        form: &output::Export,
        names: &[Reference],
        source_date_epoch: Option<i64>,
        sink: &Arc<dyn EventSink>,
        cancel: &Cancel,
    ) -> Result<(), BuildError> {
        let input = BuildInput { source_date_epoch, ..BuildInput::default() };
        output::export(&self.session(&input, sink, cancel), target, form, names)
    }

    /// Removes cached results.
    pub fn prune(&self, options: &PruneOptions) -> Result<PruneReport, BuildError> {
        Ok(prune::prune(&self.state, options)?)
    }

    /// What the state folder holds.
    pub fn disk_usage(&self) -> Result<DiskUsage, BuildError> {
        Ok(prune::disk_usage(&self.state)?)
    }

    /// Results of steps and cache mounts, those last used longest ago first.
    pub fn cache_entries(&self) -> Result<Vec<CacheEntry>, BuildError> {
        Ok(prune::cache_entries(&self.state)?)
    }

    pub(crate) fn session<'a>(&'a self, input: &'a BuildInput, sink: &Arc<dyn EventSink>, cancel: &Cancel) -> Session<'a> {
        let (device, inode) = self.state.root_inode();
        let contexts = input
            .contexts
            .iter()
            .map(|(name, context)| {
                // A copy that reads what it writes would never end.
                (name.clone(), context.tree_without(Some((device, inode))))
            })
            .collect();
        Session::new(
            &self.state,
            self.options.level,
            self.options.overlay,
            &self.options.client,
            &self.runtime,
            &self.head_starts,
            input,
            contexts,
            sink.clone(),
            cancel.follow(),
            Imports::new(self.borrowed.clone()),
        )
    }

    /// The state folder changes while a build runs: it is part of no context, and cannot be one itself.
    fn check_contexts(&self, input: &BuildInput) -> Result<(), BuildError> {
        use std::os::unix::fs::MetadataExt;
        for (name, context) in &input.contexts {
            if context.dir.metadata().is_ok_and(|meta| (meta.dev(), meta.ino()) == self.state.root_inode()) {
                return Err(BuildError::Refused {
                    option: format!("the build context {name:?}"),
                    reason: format!(
                        "{} is the folder where Ovenbird keeps its state; build another folder, or give another --root",
                        context.dir.display()
                    ),
                });
            }
        }
        Ok(())
    }

    fn describe_isolation(&self, sink: &dyn EventSink) {
        let (level, detail) = match self.options.level {
            Some(Level::Root) => ("root", "own namespaces, as root"),
            Some(Level::Rootless) => ("rootless", "user namespace with subordinate ids"),
            Some(Level::SingleId) => ("single-id", "user namespace with one id; owners are recorded"),
            Some(Level::Chroot) => ("chroot", "no namespaces here; steps see the machine's processes"),
            Some(Level::Traced) => (
                "traced",
                "no rights and no namespaces here: steps are traced, owners are recorded, and nothing keeps a step from this user's files",
            ),
            None => ("none", "only builds without RUN; see `ovenbird doctor`"),
        };
        sink.emit(Event::Isolation { level: level.into(), detail: detail.into() });
    }

    /// Without mounts of the kernel's own a read-only bind mount is a copy, which the step can change.
    fn warn_writable(&self, plans: &[Plan], sink: &dyn EventSink) {
        let bound = |op: &Op| match op {
            Op::Exec(exec) => exec.mounts.iter().any(|m| matches!(m.kind, ExecMountKind::Bind { writable: false, .. })),
            _ => false,
        };
        if self.options.level == Some(Level::Chroot) && plans.iter().flat_map(|plan| &plan.vertices).any(|vertex| bound(&vertex.op)) {
            let message = "at the chroot level a read-only bind mount is a copy that the step can write to; what it writes is dropped";
            sink.emit(Event::Warning { code: "writable-bind".into(), message: message.into(), line: None });
        }
    }

    /// Runs a future until it ends or the build is cancelled.
    fn cancellable<F: Future>(&self, cancel: &Cancel, future: F) -> Result<F::Output, BuildError> {
        let flag = cancel.follow();
        self.runtime.block_on(async {
            let stopped = async {
                while !flag.load(Ordering::SeqCst) {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
            };
            tokio::select! {
                done = future => Ok(done),
                () = stopped => Err(BuildError::Cancelled),
            }
        })
    }
}

fn lower(
    session: &Session,
    dockerfile: &ovenbird_dockerfile::Dockerfile,
    options: &Options,
) -> Result<(Plan, Vec<Diagnostic>), BuildError> {
    let mut images = Images::new();
    for _ in 0..MOST_ROUNDS {
        session.check_stop()?;
        let lowered = frontend::lower(dockerfile, &session.input.dockerfile, options, &images)
            .map_err(|diagnostics| dockerfile_error(session.input, diagnostics))?;
        match lowered {
            Lowered::Done(mut plan, warnings) => {
                for vertex in &mut plan.vertices {
                    vertex.name = session.masks.text(std::mem::take(&mut vertex.name));
                }
                return Ok((*plan, warnings));
            }
            Lowered::Needs(requests) => {
                for request in requests {
                    let resolved = image::resolve(session, &request)?;
                    images.insert(request, resolved);
                }
            }
        }
    }
    Err(BuildError::Refused {
        option: "the Dockerfile".into(),
        reason: format!("its images need more than {MOST_ROUNDS} rounds of triggers"),
    })
}

fn run(session: &Session, gate: &Gate, plans: &[Plan]) -> Result<(Vec<assemble::Assembled>, Vec<Solved>), BuildError> {
    let mut offsets = vec![0];
    offsets.extend(plans.iter().scan(0, |next, plan| {
        *next += plan.vertices.len();
        Some(*next)
    }));
    let mut solved: Vec<_> = std::thread::scope(|scope| {
        let running: Vec<_> =
            plans.iter().zip(&offsets).map(|(plan, offset)| scope.spawn(move || solve::solve(session, gate, plan, *offset))).collect();
        running.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    // The first real error counts, not the cancellation it caused elsewhere.
    if let Some(at) = solved.iter().position(|c| c.as_ref().is_err_and(|e| !matches!(e, BuildError::Cancelled))) {
        return solved.swap_remove(at).map(|_| (vec![], vec![]));
    }
    let solved = solved.into_iter().collect::<Result<Vec<_>, _>>()?;
    session.sink.emit(Event::Message { text: "exporting".into() });
    let images = plans.iter().zip(&solved).map(|(plan, solved)| {
        let inline = session.input.cache_inline.then_some(&solved.filed[..]);
        assemble::assemble(session, gate, plan, &solved.chain, inline)
    });
    Ok((images.collect::<Result<_, _>>()?, solved))
}

/// Names of all images that the plans read.
fn base_images(plans: &[Plan]) -> Vec<&Reference> {
    let vertices = plans.iter().flat_map(|plan| &plan.vertices);
    vertices.filter_map(|vertex| if let Op::Image(op) = &vertex.op { Some(&op.reference) } else { None }).collect()
}

/// A step for another architecture needs an emulator registered with the kernel; say so before any work. What counts is the architecture
/// of the image that the step runs in: `FROM --platform=$BUILDPLATFORM` steps run natively.
fn check_emulator(session: &Session, plan: &Plan, host: &Platform) -> Result<(), BuildError> {
    let mut architectures: Vec<String> = Vec::with_capacity(plan.vertices.len());
    for vertex in &plan.vertices {
        let architecture = match (&vertex.op, vertex.op.base()) {
            (Op::Image(op), _) => image::read_image(session, &op.manifest)?.1.architecture,
            (_, Some(base)) => architectures[base].clone(),
            (_, None) => plan.platform.architecture.clone(),
        };
        if matches!(vertex.op, Op::Exec(_)) && !runs_here(&architecture, host) {
            let option = if architecture == plan.platform.architecture && plan.platform != *host {
                format!("--platform {}", plan.platform)
            } else {
                vertex.name.clone()
            };
            let reason = format!(
                "the step runs in an image for {architecture}, and this machine ({}) has no emulator {} registered (Debian: install \
                 qemu-user-static and binfmt-support), or use an image for this machine",
                host.architecture,
                emulator(&architecture)
            );
            return Err(BuildError::Refused { option, reason });
        }
        architectures.push(architecture);
    }
    Ok(())
}

fn runs_here(architecture: &str, host: &Platform) -> bool {
    architecture == host.architecture
        || (host.architecture == "amd64" && architecture == "386")
        || std::path::Path::new("/proc/sys/fs/binfmt_misc").join(emulator(architecture)).exists()
}

/// As Debian's and Docker's packages register it.
fn emulator(architecture: &str) -> String {
    let name = match architecture {
        "arm64" => "aarch64",
        "amd64" => "x86_64",
        "386" => "i386",
        other => other,
    };
    format!("qemu-{name}")
}

/// A file with syntax errors, with what else there is to say of it.
fn broken(input: &BuildInput, parsed: &Parsed) -> BuildError {
    let diagnostics = match input.options.first() {
        Some(options) => frontend::broken(parsed, &input.dockerfile, options),
        None => parsed.diagnostics.clone(),
    };
    BuildError::Dockerfile { name: input.dockerfile_name.clone(), text: input.dockerfile.clone(), diagnostics, syntax: true }
}

fn dockerfile_error(input: &BuildInput, diagnostics: Vec<Diagnostic>) -> BuildError {
    BuildError::Dockerfile { name: input.dockerfile_name.clone(), text: input.dockerfile.clone(), diagnostics, syntax: false }
}
